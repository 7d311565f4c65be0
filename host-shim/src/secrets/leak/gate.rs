//! What is a leak: weighs what is found of the secrets in one text, or in one file of a layer.

use std::collections::HashMap;
use std::sync::Arc;

use crate::secrets::Masker;
use crate::secrets::cut::Marks;
use crate::secrets::search::{Hit, Search};

/// A build's secrets, as its image is searched for them.
pub struct Gate {
    masker: Masker,
    /// Of what says something only: what is masked besides may be everywhere.
    search: Option<Arc<Search>>,
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Gate({:?})", self.masker)
    }
}

impl Gate {
    pub(in crate::secrets) fn new(masker: Masker, search: Option<Arc<Search>>) -> Self {
        Self { masker, search }
    }

    /// What it was made of, to mask what is told of a leak.
    pub fn into_masker(self) -> Masker {
        self.masker
    }

    /// What a text holds of the secrets, by each place; of what ends behind `from` only.
    pub(super) fn hits<'g, 't>(
        &'g self,
        text: &'t [u8],
        from: usize,
    ) -> impl Iterator<Item = Hit<'g>> + use<'g, 't> {
        self.search.iter().flat_map(move |search| search.hits(text, from))
    }
}

/// What was found so far in one file.
pub(super) struct Evidence<'g> {
    gate: &'g Gate,
    /// Of each way to cut a secret the different parts; never more than are a leak.
    parts: HashMap<usize, Vec<usize>>,
    leaked: Option<&'g str>,
}

impl<'g> Evidence<'g> {
    pub(super) fn new(gate: &'g Gate) -> Self {
        Self { gate, parts: HashMap::new(), leaked: None }
    }

    /// The id of the first secret that is there.
    pub(super) fn leaked(&self) -> Option<&'g str> {
        self.leaked
    }

    /// Another file begins.
    pub(super) fn clear(&mut self) {
        self.parts.clear();
        self.leaked = None;
    }

    pub(super) fn take(&mut self, marks: &Marks) {
        if self.leaked.is_some() {
            return;
        }
        self.leaked = marks.alone.and_then(|owner| self.gate.masker.id(owner));
        for part in &marks.parts {
            let Some(way) = self.gate.masker.way(part.way) else { continue };
            let seen = self.parts.entry(part.way).or_default();
            if !seen.contains(&part.number) {
                seen.push(part.number);
            }
            if seen.len() >= way.needed {
                self.leaked = self.gate.masker.id(way.owner);
                return;
            }
        }
    }

    /// Takes all of a text.
    pub(super) fn text(&mut self, text: &[u8]) {
        for hit in self.gate.hits(text, 0) {
            self.take(hit.marks);
            if self.leaked.is_some() {
                return;
            }
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde_json::json;
    use sha2::{Digest as _, Sha256};

    use super::super::fixture::{archive, bounds, file, gzip};
    use super::super::{in_json, in_layer};
    use super::*;
    use crate::secrets::samples;
    use crate::secrets::weight::{Weight, Weights};

    fn gate(values: &[(&str, &[u8])]) -> Gate {
        let mut masker = Masker::default();
        for (id, value) in values {
            // What is too large is looked for all the same.
            let _ = masker.add(id, value);
        }
        masker.into_gate()
    }

    /// The secret that is found in a layer with these files, and in which of them.
    fn found(gate: &Gate, files: &[(&str, &[u8])]) -> Option<(String, String)> {
        let layer = file(&gzip(&archive(files)));
        let leak = in_layer(gate, layer, &bounds(1 << 30)).unwrap()?;
        Some((leak.secret, leak.path.unwrap()))
    }

    #[expect(clippy::unnecessary_wraps, reason = "stands for what may be missing")]
    fn at(secret: &str, path: &str) -> Option<(String, String)> {
        Some((secret.into(), path.into()))
    }

    /// Bytes as if by chance, others for each seed.
    fn random(seed: u32, length: usize) -> Vec<u8> {
        let blocks = 0..u32::try_from(length.div_ceil(32)).unwrap();
        let block = |block: u32| Sha256::digest([seed.to_be_bytes(), block.to_be_bytes()].concat());
        let mut bytes: Vec<u8> = blocks.flat_map(|number| block(number).to_vec()).collect();
        bytes.truncate(length);
        bytes
    }

    /// As `base64 -w`, `openssl base64` and `xxd -p` write it.
    fn wrapped(digits: &str, columns: usize) -> Vec<u8> {
        digits.as_bytes().chunks(columns).flat_map(|line| [line, b"\n"].concat()).collect()
    }

    /// All ways in which tools write a value into a file.
    fn copies(value: &[u8]) -> Vec<Vec<u8>> {
        let (b64, hex) = (STANDARD.encode(value), hex::encode(value));
        let lines = [(&b64, 76), (&b64, 64), (&hex, 60)];
        let wrapped = lines.map(|(digits, columns)| wrapped(digits, columns));
        [wrapped.to_vec(), vec![value.to_vec(), b64.into_bytes(), hex.into_bytes()]].concat()
    }

    fn pem(seed: u32) -> Vec<u8> {
        let body = wrapped(&STANDARD.encode(random(seed, 1190)), 64);
        let (begin, end) = ("-----BEGIN PRIVATE KEY-----\n", "-----END PRIVATE KEY-----\n");
        [begin.as_bytes(), &body, end.as_bytes()].concat()
    }

    const PIP: &[u8] = b"[global]\nindex-url = https://me:hunter2hunter2@pypi.example.com/simple\n";
    const NPMRC: &[u8] = b"registry=https://registry.npmjs.org/\nfund=false\naudit=false\n\
        //registry.npmjs.org/:_authToken=npm_0123456789abcdefghij\n";
    const KUBECONFIG: &[u8] = b"apiVersion: v1\nkind: Config\ncurrent-context: default\nusers:\n\
        - name: admin\n  user:\n    token: eyJhbGciOiJSUzI1NiIsImtpZCI6IkQ1\n";

    #[test]
    fn what_other_files_have_too_is_no_leak() {
        let key = pem(1);
        let gate = gate(&[("pip", PIP), ("npm", NPMRC), ("kube", KUBECONFIG), ("key", &key)]);
        let other = pem(2);
        let armor = STANDARD.encode("-----BEGIN PRIVATE KEY-----\n");
        let files: [(&str, &[u8]); 6] = [
            ("etc/pip.conf", b"[global]\nno-cache-dir = true\n"),
            ("root/.npmrc", b"registry=https://registry.npmjs.org/\n"),
            ("app/.npmrc", b"audit=false\nloglevel=warn\nregistry=https://registry.npmjs.org/\n"),
            ("etc/deployment.yaml", b"apiVersion: v1\nkind: Config\nmetadata:\n"),
            ("etc/ssl/key.pem", &other),
            ("app/encoded", armor.as_bytes()),
        ];
        assert_eq!(found(&gate, &files), None);
    }

    #[test]
    fn each_is_found_by_what_only_it_has() {
        let key = pem(1);
        let secrets: [(&str, &[u8]); 4] =
            [("pip", PIP), ("npm", NPMRC), ("kube", KUBECONFIG), ("key", &key)];
        let gate = gate(&secrets);
        for (id, value) in secrets {
            for (number, copy) in copies(value).iter().enumerate() {
                let files: [(&str, &[u8]); 3] = [("a", b"[global]"), ("b", copy), ("c", b"")];
                assert_eq!(found(&gate, &files), at(id, "b"), "{id} {number}");
            }
        }
        let line = b"x //registry.npmjs.org/:_authToken=npm_0123456789abcdefghij y";
        assert_eq!(found(&gate, &[("b", line)]), at("npm", "b"));
        let line = key.split(|byte| *byte == b'\n').nth(3).unwrap();
        assert_eq!(found(&gate, &[("b", line)]), at("key", "b"));
        // One line of it in base64, and one line of all of it in base64.
        let inner = STANDARD.encode([b"x\n", line].concat());
        assert_eq!(found(&gate, &[("b", inner.as_bytes())]), at("key", "b"));
        let outer = copies(&key)[0].split(|byte| *byte == b'\n').nth(5).unwrap().to_vec();
        assert_eq!(found(&gate, &[("b", &outer)]), at("key", "b"));
    }

    const PARTS: &[u8] = b"host = db.internal\nuser = somebody\npassword = hunter2\nport = 5432\n";

    #[test]
    fn parts_are_a_leak_together_in_one_file() {
        let gate = gate(&[("parts", PARTS), ("two", b"TOKEN=hunter\nOTHER=hunter\n")]);
        let two: &[u8] = b"user = somebody\nport = 5432\nport = 5432\n";
        let third = hex::encode("password = hunter2");
        let three = [two, &vec![b'-'; 200_000], b"hex: ", third.as_bytes()].concat();
        assert_eq!(found(&gate, &[("a", two), ("b", b"password = hunter2")]), None);
        assert_eq!(found(&gate, &[("a", two), ("b", &three)]), at("parts", "b"));
        // There are no more than two.
        assert_eq!(found(&gate, &[("a", b"TOKEN=hunter"), ("b", b"OTHER=hunter")]), None);
        assert_eq!(found(&gate, &[("a", b"OTHER=hunter TOKEN=hunter")]), at("two", "a"));
        // What is no archive is one file.
        let layer = |text: &[u8]| in_layer(&gate, file(text), &bounds(1 << 30)).unwrap();
        assert_eq!(layer(two), None);
        assert_eq!(layer(&three).unwrap().secret, "parts");
    }

    /// What a read has kept of the file before is not counted with the next.
    #[test]
    fn parts_are_counted_by_file_wherever_reads_begin() {
        let gate = gate(&[("parts", PARTS)]);
        for shift in (0..2600).step_by(24) {
            let filler = vec![b'-'; 62_000 + shift];
            let parts: [(&str, &[u8]); 4] = [
                ("filler", &filler),
                ("a", b"user = somebody\nport = 5432\n"),
                ("b", b"password = hunter2"),
                ("c", b"host = db.internal"),
            ];
            assert_eq!(found(&gate, &parts), None, "{shift}");
            let whole = [&filler[..], PARTS].concat();
            assert_eq!(found(&gate, &[("a", &whole)]), at("parts", "a"), "{shift}");
        }
    }

    #[test]
    fn a_configuration_is_one_text() {
        let gate = gate(&[("two", b"TOKEN=\"hunter\"\nOTHER=\"hunter\"\n")]);
        let config = |env: serde_json::Value| {
            let config = json!({"config": {"Env": env, "Labels": {"a": "OTHER=\"hunter\""}}});
            in_json(&gate, config.to_string().as_bytes()).map(|leak| leak.secret)
        };
        assert_eq!(config(json!(["OTHER=\"hunter\"", "PATH=/bin"])), None);
        assert_eq!(config(json!(["PATH=/bin", "TOKEN=\"hunter\""])), Some("two".into()));
    }

    #[test]
    fn a_secret_within_a_part_of_another_is_found() {
        for value in ["https://host", "host.local/", "local/x and more"] {
            let gate =
                gate(&[("npm", b"https://host.local/x\nfund=false\n"), ("v", value.as_bytes())]);
            let text = b"[https://host.local/x and more]";
            assert_eq!(found(&gate, &[("a", text)]), at("v", "a"), "{value}");
        }
    }

    #[test]
    fn a_secret_of_512_kib_is_found_by_its_samples() {
        let binary = random(1, 512 * 1024);
        let text = wrapped(&STANDARD.encode(random(2, 388_000)), 100);
        for value in [&binary, &text] {
            let gate = gate(&[("other", b"hunter2hunter2"), ("big", value)]);
            for (number, copy) in copies(value).iter().enumerate() {
                assert_eq!(
                    found(&gate, &[("a", b""), ("big", copy)]),
                    at("big", "big"),
                    "{number}"
                );
            }
            assert_eq!(found(&gate, &[("a", &random(3, 50_000)), ("b", &vec![0; 100_000])]), None);
        }
        let gate = gate(&[("big", &binary)]);
        assert_eq!(found(&gate, &[("a", &binary[200_000..300_000])]), at("big", "a"));
        // A sample alone, wherever reads cut it.
        let samples = samples::of(&binary, &Weights::new(&binary));
        let weights = Weights::new(&binary);
        let sample = samples.into_iter().find(|sample| weights.of(sample.clone()) == Weight::Alone);
        let sample = hex::encode(&binary[sample.unwrap()]);
        for shift in 0..600 {
            let copy = [&vec![b'x'; 65_000 + shift][..], sample.as_bytes()].concat();
            assert_eq!(found(&gate, &[("a", &copy)]), at("big", "a"), "{shift}");
        }
    }

    /// What only is masked costs no time, and a leak is of whom it is.
    #[test]
    fn many_secrets_are_told_from_each_other() {
        let lines = |n: usize| -> Vec<u8> {
            (0..100).flat_map(|line| format!("{n:04}!{line:04}\n").into_bytes()).collect()
        };
        let values: Vec<_> = (0..20).map(|n| (n.to_string(), lines(n))).collect();
        let values: Vec<_> = values.iter().map(|(id, value)| (id.as_str(), &value[..])).collect();
        let gate = gate(&values);
        assert_eq!(found(&gate, &[("a", b"0001!0001")]), None);
        for (id, value) in values {
            assert_eq!(found(&gate, &[("a", value)]), at(id, "a"));
        }
    }
}
