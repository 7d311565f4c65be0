-- SQLite uses a partial index only for a query that repeats its condition word for word. The one for all
-- active builds at once was therefore never used, and each claim read every build that ever was.
DROP INDEX builds_active;

CREATE INDEX builds_queued ON builds (created_at, id) WHERE status = 'queued';
CREATE INDEX builds_queued_of_tenant ON builds (tenant) WHERE status = 'queued';
CREATE INDEX builds_claimed ON builds (id) WHERE status IN ('building', 'pushing');
