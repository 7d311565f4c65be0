//! What readers are told of events that are not kept any more. Pure.
//!
//! A build's numbers have no gaps but where log events were removed after its end ([`Store::trim_log`]). So a reader sees a gap as soon
//! as it sees what follows, in whatever pages it reads, and something always follows: the final status stays.
//!
//! [`Store::trim_log`]: crate::store::Store::trim_log

use super::payload;
use crate::store::StoredEvent;

/// The events after a number, with one of type `trimmed` in the place of those that are missing among them. It has the
/// last of their numbers: who goes on after it misses nothing, and is told nothing twice.
pub(super) fn told(after: u64, events: Vec<StoredEvent>) -> Vec<StoredEvent> {
    let mut told = Vec::with_capacity(events.len());
    let mut seen = after;
    for event in events {
        let (from, to) = (seen.saturating_add(1), event.seq.saturating_sub(1));
        if from <= to {
            // Nobody knows when they were removed; it was before this one that they came.
            told.push(StoredEvent { seq: to, at: event.at, payload: payload::trimmed(from, to) });
        }
        seen = event.seq;
        told.push(event);
    }
    told
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn stored(seq: u64) -> StoredEvent {
        StoredEvent { seq, at: 7, payload: json!({ "type": "log", "content": seq.to_string() }) }
    }

    fn trimmed(from: u64, to: u64) -> StoredEvent {
        StoredEvent { seq: to, at: 7, payload: payload::trimmed(from, to) }
    }

    #[test]
    fn a_gap_is_told_before_what_follows_it() {
        assert_eq!(told(0, vec![]), []);
        assert_eq!(told(9, vec![]), []);
        assert_eq!(told(0, vec![stored(1), stored(2)]), [stored(1), stored(2)]);
        assert_eq!(
            told(0, vec![stored(2), stored(5)]),
            [trimmed(1, 1), stored(2), trimmed(3, 4), stored(5)]
        );
        // Inside of the gap, and behind it.
        assert_eq!(told(3, vec![stored(5)]), [trimmed(4, 4), stored(5)]);
        assert_eq!(told(4, vec![stored(5)]), [stored(5)]);
        assert_eq!(told(u64::MAX, vec![]), []);
    }

    proptest! {
        /// Whatever is gone, whatever pages it is read in and wherever it is begun.
        #[test]
        fn each_number_is_covered_once(
            gone in prop::collection::btree_set(1_u64..60, 0..60),
            after in 0_u64..70,
            page in 1_usize..9,
        ) {
            const LAST: u64 = 60;
            let (mut covered, mut at) = (vec![], after);
            loop {
                let left = (at + 1..=LAST).filter(|seq| !gone.contains(seq));
                let events: Vec<_> = left.take(page).map(stored).collect();
                let Some(last) = events.last().map(|event| event.seq) else { break };
                let before = std::mem::replace(&mut at, last);
                for event in told(before, events) {
                    let from = event.payload["from"].as_u64();
                    let seqs = from.unwrap_or(event.seq)..=event.payload["to"].as_u64().unwrap_or(event.seq);
                    prop_assert!(seqs.clone().all(|seq| gone.contains(&seq) == from.is_some()));
                    covered.extend(seqs);
                    prop_assert_eq!(covered.last(), Some(&event.seq));
                }
            }
            prop_assert_eq!(covered, (after + 1..=LAST).collect::<Vec<_>>());
        }
    }
}
