-- Times are milliseconds since the Unix epoch. JSON is text. The queries that run over these
-- tables keep to what PostgreSQL speaks too; only this file is SQLite's own.

CREATE TABLE builds (
    id             TEXT   NOT NULL PRIMARY KEY,
    tenant         TEXT   NOT NULL,
    status         TEXT   NOT NULL
        CHECK (status IN ('queued', 'building', 'pushing', 'ready', 'failed', 'cancelled')),
    request        TEXT   NOT NULL,
    created_at     BIGINT NOT NULL,
    started_at     BIGINT,
    completed_at   BIGINT,
    attempt        BIGINT NOT NULL,
    -- Increases with every claim; a write that shows an older one is refused.
    fence          BIGINT NOT NULL DEFAULT 0,
    owner          TEXT,
    publishing     TEXT,
    failure        TEXT,
    used           TEXT   NOT NULL,
    pulled         TEXT   NOT NULL,
    builder_digest TEXT
);

CREATE INDEX builds_newest ON builds (created_at, id);
CREATE INDEX builds_of_tenant ON builds (tenant, created_at, id);
-- Partial, so that claims and positions cost by what is active and not by all that ever was.
CREATE INDEX builds_active ON builds (status, created_at, id)
    WHERE status IN ('queued', 'building', 'pushing');

CREATE TABLE build_tags (
    build_id TEXT NOT NULL REFERENCES builds (id) ON DELETE CASCADE,
    name     TEXT NOT NULL,
    content  TEXT NOT NULL,
    PRIMARY KEY (build_id, name)
);

CREATE TABLE idempotency_keys (
    tenant   TEXT NOT NULL,
    name     TEXT NOT NULL,
    digest   TEXT NOT NULL,
    build_id TEXT NOT NULL REFERENCES builds (id) ON DELETE CASCADE,
    PRIMARY KEY (tenant, name)
);

CREATE INDEX idempotency_keys_of_build ON idempotency_keys (build_id);

-- A build's rows lie together, in order, which is how they are read.
CREATE TABLE events (
    build_id  TEXT   NOT NULL REFERENCES builds (id) ON DELETE CASCADE,
    seq       BIGINT NOT NULL,
    at        BIGINT NOT NULL,
    attempt   BIGINT NOT NULL,
    agent_seq BIGINT,
    payload   TEXT   NOT NULL,
    PRIMARY KEY (build_id, seq)
) WITHOUT ROWID;

CREATE UNIQUE INDEX events_of_agent ON events (build_id, attempt, agent_seq)
    WHERE agent_seq IS NOT NULL;

CREATE TABLE tokens (
    id         TEXT    NOT NULL PRIMARY KEY,
    hash       TEXT    NOT NULL UNIQUE,
    name       TEXT,
    tenant     TEXT    NOT NULL,
    role       TEXT    NOT NULL CHECK (role IN ('reader', 'tenant', 'admin')),
    created_at BIGINT  NOT NULL,
    expires_at BIGINT,
    revoked    BOOLEAN NOT NULL DEFAULT FALSE
);
