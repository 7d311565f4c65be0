//! One question of DNS and its answer (RFC 1035, section 4): that there is no such name. Pure.
//!
//! What a client asks for is hostile: every length is looked at before it is used, no pointer is followed, and of what
//! stands behind the question nothing is read.

use kiln_protocol::event::MAX_NAME;

/// A question with what clients usually put behind it.
pub const MAX_MESSAGE: usize = 1500;

/// Identification, flags and four counts.
const HEADER: usize = 12;

/// Longest name as it is sent, with the lengths of its labels and the root.
const MAX_ENCODED: usize = 255;

/// Longest label; what is greater is a pointer, or reserved.
const MAX_LABEL: u8 = 63;

/// A message is an answer.
const RESPONSE: u8 = 0x80;
/// What is wanted: 0 is a question.
const OPERATION: u8 = 0x78;
/// Recursion is wished for; an answer says it again.
const RECURSION: u8 = 0x01;
/// The server would do it.
const RECURSIVE: u8 = 0x80;

const MALFORMED: u8 = 1;
const NO_SUCH_NAME: u8 = 3;
const NOT_DONE: u8 = 4;

/// What to send, and which name was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    pub bytes: Vec<u8>,
    /// `None` where nothing is to be told of it.
    pub name: Option<String>,
}

/// The answer to a message, if it gets one: an answer does not.
pub fn reply(message: &[u8]) -> Option<Reply> {
    let (header, rest) = message.split_at_checked(HEADER)?;
    let [id_high, id_low, flags, _, questions @ ..] = header else { return None };
    if flags & RESPONSE != 0 {
        return None;
    }
    let answer = |code: u8, question: &[u8]| {
        let flags = RESPONSE | flags & (OPERATION | RECURSION);
        let count = u8::from(!question.is_empty());
        let mut bytes = vec![*id_high, *id_low, flags, RECURSIVE | code, 0, count];
        bytes.resize(HEADER, 0);
        bytes.extend_from_slice(question);
        bytes
    };
    if flags & OPERATION != 0 {
        return Some(Reply { bytes: answer(NOT_DONE, &[]), name: None });
    }
    match (&questions[..2], question(rest)) {
        ([0, 1], Some((question, name))) => {
            Some(Reply { bytes: answer(NO_SUCH_NAME, question), name: told(name) })
        }
        _ => Some(Reply { bytes: answer(MALFORMED, &[]), name: None }),
    }
}

/// The question at the beginning, with type and class; and its name as text.
fn question(bytes: &[u8]) -> Option<(&[u8], String)> {
    let mut name = String::new();
    let mut at = 0;
    loop {
        let length = *bytes.get(at)?;
        at += 1;
        if length == 0 {
            break;
        }
        let end = at + usize::from(length);
        // With the root's own byte.
        if length > MAX_LABEL || end >= MAX_ENCODED {
            return None;
        }
        if !name.is_empty() {
            name.push('.');
        }
        name.extend(bytes.get(at..end)?.iter().copied().map(shown));
        at = end;
    }
    Some((bytes.get(..at + 4)?, name))
}

/// As [`kiln_protocol::event::Name`] has it.
fn shown(byte: u8) -> char {
    match byte {
        b'A'..=b'Z' | b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' => byte.to_ascii_lowercase().into(),
        _ => '?',
    }
}

/// A name that leads to some host. This machine's own names and the names of addresses do not.
fn told(name: String) -> Option<String> {
    let is_below = |zone: &str| {
        name.strip_suffix(zone).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
    };
    let is_told = (1..=MAX_NAME).contains(&name.len())
        && !["localhost", "in-addr.arpa", "ip6.arpa"].into_iter().any(is_below);
    is_told.then_some(name)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(super) mod tests {
    use kiln_protocol::event::{Event, Name};
    use proptest::prelude::*;

    use super::*;

    /// A question for an address, as glibc sends it, with an OPT record behind it.
    pub fn with_more(name: &[u8]) -> Vec<u8> {
        let opt = [0, 0, 41, 4, 0xd0, 0, 0, 0, 0, 0, 0];
        let mut message = question(name);
        message[11] = 1;
        message.extend(opt);
        message
    }

    pub fn question(name: &[u8]) -> Vec<u8> {
        let header = [0xab, 0xcd, 0x01, 0x20, 0, 1, 0, 0, 0, 0, 0, 0];
        [&header[..], name, &[0, 1, 0, 1]].concat()
    }

    fn name(encoded: &[u8]) -> Option<String> {
        reply(&question(encoded)).unwrap().name
    }

    #[test]
    fn a_question_is_answered_with_itself_and_no_such_name() {
        let name = b"\x03deb\x07Example\x03org\x00";
        let Reply { bytes, name: asked } = reply(&with_more(name)).unwrap();
        assert_eq!(asked.as_deref(), Some("deb.example.org"));
        let expected =
            [&[0xab, 0xcd, 0x81, 0x83, 0, 1, 0, 0, 0, 0, 0, 0][..], name, &[0, 1, 0, 1]].concat();
        assert_eq!(bytes, expected);
    }

    #[test]
    fn what_is_no_question_gets_an_error_or_nothing() {
        let code = |message: &[u8]| reply(message).map(|reply| (reply.bytes[3] & 0xf, reply.name));
        let good = question(b"\x01a\x00");
        assert_eq!(code(&good[..11]), None);
        assert_eq!(code(&[]), None);
        let mut answer = good.clone();
        answer[2] |= RESPONSE;
        assert_eq!(code(&answer), None, "two servers would answer each other for ever");
        let mut update = good.clone();
        update[2] |= 5 << 3;
        assert_eq!(code(&update), Some((NOT_DONE, None)));
        for count in [[0, 0], [0, 2], [1, 1]] {
            let mut counted = good.clone();
            counted[4..6].copy_from_slice(&count);
            assert_eq!(code(&counted), Some((MALFORMED, None)));
        }
        for end in HEADER..good.len() {
            assert_eq!(code(&good[..end]), Some((MALFORMED, None)), "{end}");
        }
        for pointer in [&b"\xc0\x0c"[..], b"\x01a\xc0\x0c", b"\x40a\x00", b"\x80a\x00"] {
            assert_eq!(code(&question(pointer)), Some((MALFORMED, None)));
        }
    }

    #[test]
    fn names_are_as_long_as_they_may_be_and_no_longer() {
        let label = |n: u8| [&[n][..], &vec![b'a'; n.into()]].concat();
        let longest = [label(63), label(63), label(63), label(61), vec![0]].concat();
        assert_eq!(longest.len(), MAX_ENCODED);
        assert_eq!(name(&longest).unwrap().len(), MAX_NAME);
        let longer = [label(63), label(63), label(63), label(62), vec![0]].concat();
        assert_eq!(name(&longer), None);
        assert_eq!(reply(&question(&longer)).unwrap().bytes[3] & 0xf, MALFORMED);
    }

    #[test]
    fn odd_bytes_are_shown_as_such_and_local_names_are_not_told() {
        assert_eq!(name(b"\x05a.b\x00\xff\x00").as_deref(), Some("a?b??"));
        assert_eq!(name(b"\x04_tcp\x03X-y\x00").as_deref(), Some("_tcp.x-y"));
        assert_eq!(name(b"\x00"), None);
        assert_eq!(name(b"\x09localhost\x00"), None);
        assert_eq!(name(b"\x01a\x09localhost\x00"), None);
        assert_eq!(name(b"\x0bnolocalhost\x00").as_deref(), Some("nolocalhost"));
        assert_eq!(name(b"\x011\x01\x30\x07in-addr\x04arpa\x00"), None);
        assert_eq!(name(b"\x04arpa\x00").as_deref(), Some("arpa"));
    }

    /// Whether the host would take it.
    fn is_taken(host: String) -> bool {
        Event::Name(Name { step: None, host }).check().is_ok()
    }

    proptest! {
        #[test]
        fn anything_is_answered_within_its_length_or_not_at_all(
            message in proptest::collection::vec(any::<u8>(), 0..400),
        ) {
            if let Some(Reply { bytes, name }) = reply(&message) {
                prop_assert!(bytes.len() <= message.len() && bytes[..2] == message[..2]);
                if let Some(host) = name {
                    prop_assert!(is_taken(host));
                }
            }
        }

        #[test]
        fn any_labels_are_a_name_that_the_host_takes(
            labels in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..80), 1..6),
        ) {
            let mut encoded: Vec<u8> = labels
                .iter()
                .flat_map(|label| [&[u8::try_from(label.len()).unwrap()][..], label].concat())
                .collect();
            encoded.push(0);
            let fits = encoded.len() <= MAX_ENCODED && labels.iter().all(|l| l.len() <= 63);
            let reply = reply(&question(&encoded)).unwrap();
            prop_assert_eq!(reply.bytes[3] & 0xf == NO_SUCH_NAME, fits);
            if let Some(host) = reply.name {
                prop_assert!(is_taken(host));
            }
        }
    }
}
