-- Until when a claim holds without being renewed, in milliseconds since 1970; NULL before the first claim, and in claims of earlier versions.
ALTER TABLE builds ADD COLUMN lease_until BIGINT;
