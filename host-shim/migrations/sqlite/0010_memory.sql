-- What a build's VM wants, in MiB, for claims where there is not as much.
ALTER TABLE builds ADD COLUMN memory_mb BIGINT NOT NULL DEFAULT 0;
UPDATE builds SET memory_mb = json_extract(request, '$.memory_mb') WHERE status = 'queued';
