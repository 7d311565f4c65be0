//! How much a line of a value says where it is found by itself. Pure.
//!
//! The lines of a key file, or of a configuration with a password in it, are not all secret: an image has many of
//! them for other reasons.

use std::ops::Range;

use super::forms::LEAST;

/// What a find of a stretch of a value says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Weight {
    /// Nothing at all.
    Nothing,
    /// Something, together with others.
    Part,
    /// That the value is there.
    Alone,
}

/// How lines begin that are in all files of their kind: PEM's armor, and the first line of an OpenSSH key, which has
/// only the names of algorithms.
const COMMON: [&[u8]; 2] = [b"-----", b"b3BlbnNzaC1rZXktdjE"];
/// Fewer different bytes are a ruler, or padding.
const LEAST_VARIETY: usize = 5;
/// Shortest word that tells a line from others: longer than versions, dates, addresses and regions.
const LEAST_WORD: usize = 10;
/// Shortest one that is taken for something encoded, by what it is made of.
const LEAST_ENCODED: usize = 24;
/// In which another kind of digit comes once in so many at least. By chance it is one in two; in names it is one in six.
const MOST_FOR_TURN: usize = 4;
/// What stands between words, besides blanks.
const BETWEEN: &[u8] = b"\"'`=:,;./\\-_|()[]{}<>";

/// How many different bytes there are.
pub(super) fn variety(bytes: &[u8]) -> usize {
    let mut seen = [false; 256];
    for byte in bytes {
        seen[usize::from(*byte)] = true;
    }
    seen.iter().filter(|seen| **seen).count()
}

/// Of a line without blanks at its ends.
pub(super) fn of_line(line: &[u8]) -> Weight {
    let has = |what: &[u8]| line.windows(what.len()).any(|window| window == what);
    if line.len() < LEAST
        || variety(line) < LEAST_VARIETY
        || COMMON.iter().any(|common| line.starts_with(common))
    {
        Weight::Nothing
    } else if has(b"://") && !has(b"@")
        || !(line.split(|byte| between(*byte)).any(is_distinctive) || has_encoded(line))
    {
        Weight::Part
    } else {
        Weight::Alone
    }
}

fn between(byte: u8) -> bool {
    byte.is_ascii_whitespace() || BETWEEN.contains(&byte)
}

fn is_distinctive(word: &[u8]) -> bool {
    word.len() >= LEAST_WORD && word.iter().any(|byte| byte.is_ascii_digit() || !byte.is_ascii())
}

/// Whether there is a long word of base64's digits that is of no language and no path: small letters, capitals and
/// figures are in it, and take turns.
fn has_encoded(line: &[u8]) -> bool {
    line.split(|byte| kind(*byte).is_none()).any(|word| {
        let has = |wanted| word.iter().any(|byte| kind(*byte) == Some(wanted));
        word.len() >= LEAST_ENCODED
            && [Kind::Small, Kind::Capital, Kind::Figure].into_iter().all(has)
            && turns(word) * MOST_FOR_TURN >= word.len()
    })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Small,
    Capital,
    Figure,
    Sign,
}

/// Of a digit of base64.
fn kind(byte: u8) -> Option<Kind> {
    match byte {
        b'a'..=b'z' => Some(Kind::Small),
        b'A'..=b'Z' => Some(Kind::Capital),
        b'0'..=b'9' => Some(Kind::Figure),
        b'+' | b'/' | b'-' | b'_' => Some(Kind::Sign),
        _ => None,
    }
}

/// How often another kind follows. Signs stand between a language's words too, and count for nothing.
fn turns(word: &[u8]) -> usize {
    let pairs = word.windows(2).map(|pair| (kind(pair[0]), kind(pair[1])));
    let sign = Some(Kind::Sign);
    pairs.filter(|(one, next)| one != next && *one != sign && *next != sign).count()
}

/// The weights of stretches of a text, by the lines that they have something of.
pub(super) struct Weights<'t> {
    text: &'t [u8],
    /// Of its line, for each byte.
    of: Vec<Weight>,
}

impl<'t> Weights<'t> {
    pub(super) fn new(text: &'t [u8]) -> Self {
        let mut of = Vec::with_capacity(text.len());
        for line in text.split_inclusive(|byte| *byte == b'\n') {
            of.resize(of.len() + line.len(), of_line(line.trim_ascii()));
        }
        Self { text, of }
    }

    pub(super) fn of(&self, stretch: Range<usize>) -> Weight {
        let mut at = stretch.start;
        let mut most = Weight::Nothing;
        let bytes = &self.text[stretch];
        for line in bytes.split_inclusive(|byte| *byte == b'\n') {
            // What is left of a line says no more than the line.
            most = most.max(self.of[at].min(of_line(line.trim_ascii())));
            at += line.len();
        }
        // Behind armor comes what keys of a kind have in common.
        if COMMON.iter().any(|common| bytes.starts_with(common)) {
            most = most.min(Weight::Part);
        }
        most
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_in_many_files_says_nothing_by_itself() {
        for line in [
            "-----BEGIN OPENSSH PRIVATE KEY-----",
            "-----END RSA PRIVATE KEY-----",
            "b3BlbnNzaC1rZXktdjEAAAAABG5vbmUAAAAEbm9uZQAAAAAAAAABAAAAMwAAAAtzc2gtZW",
            "================0000",
            "AAAAAAAAAAAAAAA0AA==",
            "short12",
        ] {
            assert_eq!(of_line(line.as_bytes()), Weight::Nothing, "{line}");
        }
        for line in [
            "\"type\": \"service_account\",",
            "\"auth_provider_x509_cert_url\": \"https://www.googleapis.com/oauth2/v1/certs\",",
            "registry=https://registry.npmjs.org/0123456789ab/",
            "apiVersion: v1",
            "apiVersion: client.authentication.k8s.io/v1beta1",
            "\"port\": 5432,",
            "DB_HOST=127.0.0.1",
            "region = ap-southeast-2",
            "collation = utf8mb4_general_ci",
            "collation = Latin1_General_CP1_CI_AS",
            "CELLAR=/opt/Homebrew/Cellar/openssl3/lib",
            "#!/usr/bin/env python3",
            "DEK_PASSWORD=hunter2",
            "aaaaaaaa8bcd",
        ] {
            let expected = if line == "aaaaaaaa8bcd" { Weight::Alone } else { Weight::Part };
            assert_eq!(of_line(line.as_bytes()), expected, "{line}");
        }
    }

    #[test]
    fn a_line_that_no_other_file_has_says_all() {
        for line in [
            "QyNTUxOQAAACDUVQX3y4nM5fXWbYyqzJ0lZ0cK0VJj0uH7v2n8Q3rV5wAAAJgQ0n5cENJ+",
            "aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
            "index-url = https://user:hunter2hunter2@pypi.example.com/simple",
            "\"private_key_id\": \"1234567890abcdef1234567890abcdef12345678\",",
            "tenant: 550e8400-e29b-41d4-a716-446655440000",
            "p\u{e4}\u{df}w\u{f6}rterb\u{fc}cher",
        ] {
            assert_eq!(of_line(line.as_bytes()), Weight::Alone, "{line}");
        }
    }

    #[test]
    fn a_stretch_says_what_is_left_of_its_lines() {
        let key = b"-----BEGIN X-----\nabcdefgh1jklmnop\ntwo words\n-----END X-----";
        let weights = Weights::new(key);
        for (stretch, weight) in [
            (0..17, Weight::Nothing),
            (0..34, Weight::Part),
            (3..34, Weight::Alone),
            (18..34, Weight::Alone),
            (18..27, Weight::Part),
            (18..23, Weight::Nothing),
            (25..34, Weight::Part),
            (29..48, Weight::Part),
            (46..59, Weight::Nothing),
        ] {
            assert_eq!(weights.of(stretch.clone()), weight, "{stretch:?}");
        }
    }
}
