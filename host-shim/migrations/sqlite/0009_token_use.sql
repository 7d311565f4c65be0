-- When a token was last shown, by the minute; NULL while it never was.
ALTER TABLE tokens ADD COLUMN last_used_at INTEGER;
