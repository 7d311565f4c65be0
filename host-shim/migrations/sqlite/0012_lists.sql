-- A tenant's list by status or by tag costs by what it shows, however many builds there ever were.

-- Only of finished builds: those that are not have indexes of their own, and a claim pays for no other.
CREATE INDEX builds_finished_of_tenant ON builds (tenant, status, created_at, id) WHERE completed_at IS NOT NULL;

-- The build's, which never change.
ALTER TABLE build_tags ADD COLUMN tenant TEXT NOT NULL DEFAULT '';
ALTER TABLE build_tags ADD COLUMN created_at BIGINT NOT NULL DEFAULT 0;
UPDATE build_tags
SET (tenant, created_at) = (SELECT b.tenant, b.created_at FROM builds AS b WHERE b.id = build_tags.build_id);
CREATE INDEX build_tags_of_tenant ON build_tags (tenant, name, content, created_at, build_id);
