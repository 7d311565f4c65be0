-- What its steps reached through the host: JSON, hosts with ports.
ALTER TABLE builds ADD COLUMN reached TEXT NOT NULL DEFAULT '[]';
