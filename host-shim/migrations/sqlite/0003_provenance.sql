-- What a build was made with, as JSON: more than the bundle's digest.
ALTER TABLE builds ADD COLUMN provenance TEXT NOT NULL DEFAULT '{}';
UPDATE builds SET provenance = json_object('builder_digest', builder_digest) WHERE builder_digest IS NOT NULL;
ALTER TABLE builds DROP COLUMN builder_digest;
