-- Which of a tenant's queued builds is next: those of a higher priority go first, and of one priority the oldest.
ALTER TABLE builds ADD COLUMN priority BIGINT NOT NULL DEFAULT 50;
CREATE INDEX builds_line_of_tenant ON builds (tenant, status, priority DESC, created_at, id) WHERE status = 'queued';
