-- What their programs printed is in files, and goes with them.
CREATE TABLE instances (
    id           TEXT   NOT NULL PRIMARY KEY,
    tenant       TEXT   NOT NULL,
    name         TEXT   NOT NULL,
    image        TEXT   NOT NULL,
    image_digest TEXT   NOT NULL,
    vcpus        BIGINT NOT NULL,
    memory_mb    BIGINT NOT NULL,
    state        TEXT   NOT NULL CHECK (state IN ('Created', 'Initializing', 'Running', 'Stopped')),
    created_at   BIGINT NOT NULL,
    started_at   BIGINT,
    stopped_at   BIGINT,
    exit_code    BIGINT,
    exit_message TEXT,
    UNIQUE (tenant, name)
);

CREATE INDEX instances_newest ON instances (created_at, id);
CREATE INDEX instances_of_tenant ON instances (tenant, created_at, id);
