-- Sealed under the host's key file, which is not in here.
CREATE TABLE secrets (
    tenant     TEXT   NOT NULL,
    id         TEXT   NOT NULL,
    sealed     BLOB   NOT NULL,
    created_at BIGINT NOT NULL,
    updated_at BIGINT NOT NULL,
    PRIMARY KEY (tenant, id)
);

-- A build's own, until it ends.
CREATE TABLE build_secrets (
    build_id TEXT NOT NULL REFERENCES builds (id) ON DELETE CASCADE,
    id       TEXT NOT NULL,
    sealed   BLOB NOT NULL,
    PRIMARY KEY (build_id, id)
);
