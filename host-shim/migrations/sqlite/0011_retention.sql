-- What the log events of a build take as they are stored, kept up with them: what is to go is found without a look at events. A build
-- whose log has gone has no row.
CREATE TABLE build_logs (
    build_id     TEXT   NOT NULL PRIMARY KEY REFERENCES builds (id) ON DELETE CASCADE,
    bytes        BIGINT NOT NULL,
    -- The build's, once it has ended.
    completed_at BIGINT
) WITHOUT ROWID;

INSERT INTO build_logs (build_id, bytes, completed_at)
SELECT e.build_id, SUM(OCTET_LENGTH(e.payload)), b.completed_at
FROM events AS e JOIN builds AS b ON b.id = e.build_id
WHERE e.payload ->> 'type' = 'log'
GROUP BY e.build_id;

-- With the bytes, so that their sum comes from here alone.
CREATE INDEX build_logs_finished ON build_logs (completed_at, build_id, bytes) WHERE completed_at IS NOT NULL;

CREATE INDEX builds_finished ON builds (completed_at, id) WHERE completed_at IS NOT NULL;
