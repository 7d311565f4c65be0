//! What is known of a build's secrets: what is searched for, in bounded memory, and what became of each value. Pure.

use std::collections::HashMap;
use std::sync::Arc;

use kiln_protocol::secret::MAX_SECRETS;

use super::cut::{Cut, Marks, Part, Pieces};
use super::forms;

/// Most bytes of all values that are looked for whole in one build: they are kept in memory, in some thirty forms.
pub(super) const MAX_BYTES: usize = 64 * 1024;
/// Most bytes of all forms of these values. Their search takes some twenty times as much memory, and forty-five times
/// while it is built; with as many samples as there may be 90 MiB, then 40.
pub(super) const MAX_FORM_BYTES: usize = 1024 * 1024;
/// Most pieces that these forms are cut into, each counted as often as it is a part of something: many short lines
/// have many.
pub(super) const MAX_PIECES: usize = 32 * 1024;
/// Most values that samples are looked for of. Sixteen samples of 24 bytes have some 400 bytes each in all forms, and
/// 1,176 at most: besides the above 1.2 MiB.
pub(super) const MAX_SAMPLED: usize = MAX_SECRETS;

/// Why a secret is not looked for, or not all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unmasked {
    /// It would be found everywhere.
    #[error(
        "is not masked in the log, nor looked for in the image: it is shorter than {} bytes",
        forms::LEAST
    )]
    Short,
    /// Too much to be searched for.
    #[error("{}: it is, with the others, longer than {MAX_BYTES} bytes", held(*sampled))]
    Long {
        /// Whether its samples are searched for.
        sampled: bool,
    },
    /// Too much to be searched for in all the ways in which it can be written.
    #[error(
        "{}: it and the others have more than {MAX_FORM_BYTES} bytes or {MAX_PIECES} lines in all forms that are looked \
         for",
        held(*sampled)
    )]
    Forms {
        /// Whether its samples are searched for.
        sampled: bool,
    },
}

/// What holds for a value that is too large.
fn held(sampled: bool) -> &'static str {
    if sampled {
        "is not looked for whole. Samples of it are masked in the log and looked for in the image, \
         the rest of it is not masked"
    } else {
        "is not masked in the log, nor looked for in the image, and has no samples that could be"
    }
}

/// How many stretches of a secret that were cut in one way are a leak together.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way {
    pub owner: usize,
    pub needed: usize,
}

/// A value that was made ready elsewhere.
pub(super) struct Made {
    /// None when it was known to be too long.
    pub whole: Option<Cut>,
    pub samples: Cut,
}

impl Made {
    /// It takes time by the value's length: not for an async worker.
    pub(super) fn new(value: &[u8], too_long: bool) -> Self {
        let whole = (!too_long).then(|| Cut::whole(value));
        Self { whole, samples: Cut::samples(value) }
    }
}

/// All that is known.
#[derive(Default)]
pub(super) struct Known {
    pub pieces: Arc<Pieces>,
    /// The ids of the secrets, by their numbers.
    pub owners: Vec<String>,
    pub ways: Vec<Way>,
    bytes: usize,
    pub form_bytes: usize,
    /// Of the values that are looked for whole, as [`MAX_PIECES`] counts them.
    pub counted: usize,
    pub sampled: usize,
    /// What became of each value that came, by its digest.
    verdicts: HashMap<[u8; 32], Result<(), Unmasked>>,
}

impl Known {
    /// What became of a value that came before, as after a broken connection.
    pub(super) fn verdict(&self, digest: &[u8; 32]) -> Option<Result<(), Unmasked>> {
        self.verdicts.get(digest).copied()
    }

    /// Whether a value of a length cannot be looked for whole, whatever it is.
    pub(super) fn is_too_long(&self, length: usize) -> bool {
        self.bytes + length > MAX_BYTES
    }

    /// Takes a value: whole if there is room, else its samples.
    pub(super) fn enter(
        &mut self,
        digest: [u8; 32],
        id: &str,
        length: usize,
        made: Made,
    ) -> Result<(), Unmasked> {
        let verdict = match made.whole {
            None => Err(Unmasked::Long { sampled: self.sample(id, made.samples) }),
            Some(whole) if whole.pieces.is_empty() => Err(Unmasked::Short),
            Some(whole) => {
                let (bytes, counted) = self.cost(&whole);
                if self.form_bytes + bytes > MAX_FORM_BYTES || self.counted + counted > MAX_PIECES {
                    Err(Unmasked::Forms { sampled: self.sample(id, made.samples) })
                } else {
                    self.bytes += length;
                    self.form_bytes += bytes;
                    self.counted += counted;
                    self.add(id, whole);
                    Ok(())
                }
            }
        };
        self.verdicts.insert(digest, verdict);
        verdict
    }

    /// What is new of a value: bytes, and how much there is to keep of pieces.
    fn cost(&self, cut: &Cut) -> (usize, usize) {
        let each = cut.pieces.iter().map(|(piece, marks)| {
            if self.pieces.contains_key(piece) {
                (0, marks.parts.len())
            } else {
                (piece.len(), marks.parts.len().max(1))
            }
        });
        each.fold((0, 0), |all, one| (all.0 + one.0, all.1 + one.1))
    }

    /// Takes a value's samples. False when it has none, or there is no room.
    fn sample(&mut self, id: &str, samples: Cut) -> bool {
        if samples.pieces.is_empty() || self.sampled == MAX_SAMPLED {
            return false;
        }
        self.sampled += 1;
        self.add(id, samples);
        true
    }

    fn add(&mut self, id: &str, cut: Cut) {
        let (owner, first) = (self.owners.len(), self.ways.len());
        self.owners.push(id.to_owned());
        self.ways.extend(cut.needed.into_iter().map(|needed| Way { owner, needed }));
        let all = Arc::make_mut(&mut self.pieces);
        for (piece, marks) in cut.pieces {
            let parts = marks.parts.iter().map(|part| Part { way: first + part.way, ..*part });
            let marks = Marks { alone: marks.alone.map(|_| owner), parts: parts.collect() };
            all.entry(piece).or_default().join(marks);
        }
    }
}

#[cfg(test)]
mod tests {
    use sha2::{Digest as _, Sha256};

    use super::*;
    use crate::secrets::samples;

    fn enter(known: &mut Known, id: &str, value: &[u8]) -> Result<(), Unmasked> {
        let made = Made::new(value, known.is_too_long(value.len()));
        known.enter(Sha256::digest(value).into(), id, value.len(), made)
    }

    /// Bytes as if by chance, others for each seed.
    fn random(seed: u32, length: u32) -> Vec<u8> {
        let blocks = (0..length.div_ceil(32)).flat_map(|block| {
            Sha256::digest([seed.to_be_bytes(), block.to_be_bytes()].concat()).to_vec()
        });
        blocks.take(length as usize).collect()
    }

    #[test]
    fn every_secret_of_a_build_that_is_too_large_has_sixteen_samples() {
        let mut known = Known::default();
        let partly = Err(Unmasked::Long { sampled: true });
        let mut before = 0;
        for number in 0..64 {
            let value = random(number, 512 * 1024);
            assert_eq!(enter(&mut known, &number.to_string(), &value), partly);
            let samples = samples::of(&value, &super::super::weight::Weights::new(&value));
            assert_eq!(samples.len(), 16);
            assert!(
                samples
                    .iter()
                    .all(|sample| known.pieces.contains_key(value[sample.clone()].trim_ascii()))
            );
            // At least as it is, in both cases of hex, and in base64.
            assert!(known.pieces.len() - before >= 16 * 6, "{number}");
            before = known.pieces.len();
        }
        let bytes: usize = known.pieces.keys().map(Vec::len).sum();
        assert!(bytes <= 64 * 16 * 1176, "{bytes}");
        assert_eq!((known.form_bytes, known.counted), (0, 0));
        // An agent that asks again after the tenant has changed a value gets no more of the host's memory.
        let verdict = enter(&mut known, "0", &random(64, 512 * 1024));
        assert_eq!(verdict, Err(Unmasked::Long { sampled: false }));
        assert_eq!(known.pieces.len(), before);
        // Small ones have room left.
        assert_eq!(enter(&mut known, "small", b"hunter2hunter2"), Ok(()));
    }

    #[test]
    fn a_line_of_two_secrets_is_a_part_of_both() {
        let mut known = Known::default();
        for id in ["a", "b"] {
            let value = format!("[global]\nhost = {id}.local\nuser = {id}{id}{id}\n");
            assert_eq!(enter(&mut known, id, value.as_bytes()), Ok(()));
        }
        let parts = &known.pieces[&b"[global]"[..]].parts;
        let owners: Vec<_> = parts.iter().map(|part| known.ways[part.way].owner).collect();
        assert_eq!(owners, [0, 1]);
        assert!(parts.iter().all(|part| known.ways[part.way].needed == 3));
        // One whose value it is has it alone.
        assert_eq!(enter(&mut known, "c", b"[global]"), Ok(()));
        assert_eq!(known.pieces[&b"[global]"[..]], Marks { alone: Some(2), parts: vec![] });
        assert_eq!(known.owners, ["a", "b", "c"]);
    }

    #[test]
    fn what_holds_is_told() {
        let told = |why: Unmasked| why.to_string();
        let long = told(Unmasked::Long { sampled: true });
        assert!(long.contains("Samples of it are masked in the log and looked for"), "{long}");
        assert!(long.contains("the rest of it is not masked"), "{long}");
        assert!(long.contains("longer than 65536 bytes"), "{long}");
        for none in [Unmasked::Short, Unmasked::Long { sampled: false }] {
            assert!(told(none).starts_with("is not masked in the log, nor looked for"), "{none}");
        }
    }
}
