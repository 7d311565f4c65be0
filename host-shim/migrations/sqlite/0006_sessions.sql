-- Who entered which VM with what, and how that ended. Rows outlive their builds and instances.
CREATE TABLE sessions (
    id           TEXT    NOT NULL PRIMARY KEY,
    -- Of the build or the instance.
    tenant       TEXT    NOT NULL,
    build_id     TEXT,
    instance_id  TEXT,
    token_id     TEXT    NOT NULL,
    token_name   TEXT,
    token_role   TEXT    NOT NULL CHECK (token_role IN ('reader', 'tenant', 'admin')),
    token_tenant TEXT    NOT NULL,
    -- JSON: words of the command, and names of variables.
    command      TEXT    NOT NULL,
    env          TEXT    NOT NULL,
    cut          BOOLEAN NOT NULL,
    directory    TEXT,
    run_as       TEXT,
    tty          BOOLEAN NOT NULL,
    vm           BOOLEAN NOT NULL,
    with_secrets BOOLEAN NOT NULL,
    started_at   BIGINT  NOT NULL,
    ended_at     BIGINT,
    how          TEXT,
    exit_code    BIGINT,
    why          TEXT,
    CHECK ((build_id IS NULL) <> (instance_id IS NULL)),
    CHECK ((ended_at IS NULL) = (how IS NULL))
);

CREATE INDEX sessions_newest ON sessions (started_at, id);
CREATE INDEX sessions_of_tenant ON sessions (tenant, started_at, id);
CREATE INDEX sessions_of_build ON sessions (build_id, started_at, id) WHERE build_id IS NOT NULL;
CREATE INDEX sessions_of_instance ON sessions (instance_id, started_at, id) WHERE instance_id IS NOT NULL;
CREATE INDEX sessions_open ON sessions (id) WHERE ended_at IS NULL;

-- Somebody was in its VM while it ran: what it made may be theirs.
ALTER TABLE builds ADD COLUMN entered BOOLEAN NOT NULL DEFAULT FALSE;
