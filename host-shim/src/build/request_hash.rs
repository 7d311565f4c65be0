//! The digest of what a build was asked to make of its source. Pure.
//!
//! The source has a digest of its own, but a Dockerfile that is sent apart, the stage, the arguments, the pin of the
//! base and the names of the secrets are not in it, and another image comes of each. What does not change what the
//! Dockerfile asks for is left out: labels, the image's name, limits and the network. So are the secrets' values.
//!
//! ```text
//! "kiln request 1\n"
//! option(dockerfile) option(target) option(base_image_digest)
//! count(build_args) { text(name) text(value) }     by name
//! count(secrets)    { text(id) option(env_var) }   by id
//!
//! count   8 bytes, big-endian        text    count of its bytes, then its UTF-8
//! option  00, or 01 and the text     by      in the order of their bytes
//! ```
//! Nobody can move a byte from one field to the next: every length comes first. **Invariant**: the form never changes
//! under this first line; another form has another line.

use sha2::{Digest, Sha256};

use super::Request;

/// The form's name, which begins it.
const FORM: &str = "kiln request 1\n";

impl Request {
    /// SHA-256 over what was asked for beside the source, `sha256:…`.
    pub fn hash(&self) -> String {
        let mut form = Form(Sha256::new_with_prefix(FORM));
        form.option(self.dockerfile.as_deref());
        form.option(self.target.as_deref());
        form.option(self.base_image_digest.as_deref());
        form.count(self.build_args.len());
        for (name, value) in &self.build_args {
            form.text(name);
            form.text(value);
        }
        // In whatever order they are declared, the build is the same.
        let mut secrets: Vec<_> = self.secrets.iter().collect();
        secrets.sort_by_key(|secret| secret.id.as_str());
        form.count(secrets.len());
        for secret in secrets {
            form.text(secret.id.as_str());
            form.option(secret.variable.as_deref());
        }
        format!("sha256:{}", hex::encode(form.0.finalize()))
    }
}

/// Hashes the form while it is written.
struct Form(Sha256);

impl Form {
    fn count(&mut self, count: usize) {
        self.0.update((count as u64).to_be_bytes());
    }

    fn text(&mut self, text: &str) {
        self.count(text.len());
        self.0.update(text);
    }

    fn option(&mut self, text: Option<&str>) {
        self.0.update([u8::from(text.is_some())]);
        if let Some(text) = text {
            self.text(text);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeSet;

    use kiln_protocol::secret::{SecretId, SecretSpec};

    use super::super::tests::request;
    use super::super::{ImageName, NetworkMode};
    use super::*;

    fn secret(id: &str, variable: Option<&str>) -> SecretSpec {
        SecretSpec { id: SecretId::new(id).unwrap(), variable: variable.map(str::to_owned) }
    }

    fn full() -> Request {
        Request {
            dockerfile: Some("FROM x\n".into()),
            target: Some("t".into()),
            base_image_digest: Some("sha256:aa".into()),
            build_args: [("A", "1"), ("B", "")].map(|(k, v)| (k.into(), v.into())).into(),
            secrets: vec![secret("npm", Some("TOKEN")), secret("key", None)],
            ..request()
        }
    }

    #[test]
    fn the_digests_are_what_they_always_were() {
        // Both by another program, from the form above.
        assert_eq!(
            request().hash(),
            "sha256:e50628d590c394bfcba52c53a0e6db808000fcbc6213578ce48439c3554e03de"
        );
        assert_eq!(
            full().hash(),
            "sha256:2be1b7d608619d793069bebd3f6e8f6f7beb2e81e46921c4f4439ddda3e8ce23"
        );
    }

    #[test]
    fn every_change_of_what_is_asked_for_is_another_digest() {
        let changes: [fn(&mut Request); 18] = [
            |_| {},
            |r| r.dockerfile = None,
            |r| r.dockerfile = Some("FROM x".into()),
            |r| r.dockerfile = Some(String::new()),
            |r| r.target = None,
            |r| r.target = Some("T".into()),
            |r| r.target = Some("tt".into()),
            |r| r.base_image_digest = None,
            |r| r.base_image_digest = Some("sha256:ab".into()),
            // The same bytes in other fields.
            |r| std::mem::swap(&mut r.target, &mut r.base_image_digest),
            |r| r.build_args.clear(),
            |r| drop(r.build_args.insert("A".into(), "2".into())),
            |r| drop(r.build_args.insert("C".into(), String::new())),
            |r| r.build_args = [("A".into(), "1B".into())].into(),
            |r| r.secrets.clear(),
            |r| r.secrets[0].variable = None,
            |r| r.secrets[1].variable = Some("TOKEN".into()),
            |r| r.secrets[1].id = SecretId::new("kez").unwrap(),
        ];
        let digests: BTreeSet<_> = changes
            .iter()
            .map(|change| {
                let mut request = full();
                change(&mut request);
                request.hash()
            })
            .collect();
        assert_eq!(digests.len(), changes.len());
    }

    #[test]
    fn the_same_request_is_the_same_digest_whatever_else_it_says() {
        let mut other = Request {
            image_name: Some(ImageName { name: "n".into(), tag: "t".into() }),
            tags: [("k".into(), "v".into())].into(),
            network: NetworkMode::Open,
            timeout_seconds: 1,
            memory_mb: 1,
            cpus: 1,
            disk_gb: 1,
            source_digest: "sha256:bb".into(),
            source_bytes: 7,
            ..full()
        };
        other.secrets.reverse();
        assert_eq!(other.hash(), full().hash());
    }
}
