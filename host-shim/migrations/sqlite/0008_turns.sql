-- Which claim of all was the build's last, counted from 1: whose tenant's is the lowest was claimed longest ago.
ALTER TABLE builds ADD COLUMN turn BIGINT NOT NULL DEFAULT 0;

-- A claim looks at each tenant that waits: who, its oldest build, its active ones, its last turn. Each by an index of its own, at its one
-- end, so that it costs by tenants that wait and not by builds. The status is in them though it is
-- always the same: without it SQLite takes an index of all of the tenant's builds.
DROP INDEX builds_queued_of_tenant;
CREATE INDEX builds_queued_of_tenant ON builds (tenant, status, created_at, id) WHERE status = 'queued';
DROP INDEX builds_claimed;
CREATE INDEX builds_claimed ON builds (tenant, status) WHERE status IN ('building', 'pushing');
CREATE INDEX builds_turns ON builds (turn);
CREATE INDEX builds_turns_of_tenant ON builds (tenant, turn);
