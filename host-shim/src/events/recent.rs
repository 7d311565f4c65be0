//! The last events of a build that is followed, which those who follow share. Pure.
//!
//! One reads the store for all ([`Recent::push`]), from where the first of them had come to the end of what was stored. Whoever is behind what
//! is kept reads the store alone until it is there. Numbers alone say where somebody is, so nothing is lost or told twice at the seam.

use std::collections::VecDeque;

use super::blocks::Blocks;

/// Most bytes that are kept, however many follow; the last blocks always are.
const MAX_BYTES: usize = 512 * 1024;

/// What is kept.
#[derive(Debug, Default)]
pub(super) struct Recent {
    /// All up to this number was read for all; `None` while nobody reads for all.
    read: Option<u64>,
    /// What of it is kept, in order and without a gap: it ends with that number.
    blocks: VecDeque<Blocks>,
    bytes: usize,
    /// The number before the first that is kept.
    before: u64,
}

/// What there is for somebody.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Look {
    /// The next events.
    Found(Blocks),
    /// Nothing until more is read for all.
    Nothing,
    /// There is nothing after this.
    Ended,
    /// Not known: the store is to be asked.
    Unknown,
}

impl Recent {
    /// What there is after a number.
    pub(super) fn look(&self, after: u64) -> Look {
        match self.read {
            Some(read) if after >= read => match self.blocks.back() {
                Some(last) if last.is_final() => Look::Ended,
                _ => Look::Nothing,
            },
            Some(_) if after >= self.before => {
                let at = self.blocks.partition_point(|blocks| blocks.last() <= after);
                let next = self.blocks.get(at).and_then(|blocks| blocks.after(after));
                next.map_or(Look::Unknown, Look::Found)
            }
            _ => Look::Unknown,
        }
    }

    /// All up to this number was stored when the store was last asked, and somebody has seen it: from there on it is read for all,
    /// unless it is already. Whether that is new.
    pub(super) fn begin(&mut self, at: u64) -> bool {
        // One who asked for what is after the end would leave out what comes up to there.
        let begins = self.read.is_none_or(|read| at < read && self.blocks.is_empty());
        if begins {
            *self = Self { read: Some(at), before: at, ..Self::default() };
        }
        begins
    }

    /// Up to where it was read for all.
    pub(super) fn read(&self) -> Option<u64> {
        self.read
    }

    /// The next events after a number were read for all. Left out where it was begun anew meanwhile.
    pub(super) fn push(&mut self, after: u64, blocks: Blocks) {
        if self.read != Some(after) {
            return;
        }
        self.read = Some(blocks.last());
        self.bytes += blocks.text().len();
        self.blocks.push_back(blocks);
        while self.bytes > MAX_BYTES && self.blocks.len() > 1 {
            let Some(oldest) = self.blocks.pop_front() else { break };
            self.bytes -= oldest.text().len();
            self.before = oldest.last();
        }
    }

    /// From here on each reads alone.
    pub(super) fn give_up(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::build::Status;
    use crate::events::payload;
    use crate::store::StoredEvent;

    fn event(seq: u64, bytes: usize) -> StoredEvent {
        StoredEvent { seq, at: 1, payload: payload::kiln_log(&"x".repeat(bytes)) }
    }

    fn blocks(seqs: std::ops::RangeInclusive<u64>) -> Blocks {
        Blocks::new(seqs.map(|seq| event(seq, 1)).collect()).unwrap()
    }

    fn found(look: &Look) -> Vec<u64> {
        match look {
            Look::Found(blocks) => blocks.seqs().collect(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_kept_is_found_from_anywhere_in_it() {
        let mut recent = Recent::default();
        assert_eq!(recent.look(0), Look::Unknown);
        assert!(recent.begin(5) && !recent.begin(5) && !recent.begin(9));
        assert_eq!(
            (recent.look(4), recent.look(5), recent.look(9)),
            (Look::Unknown, Look::Nothing, Look::Nothing)
        );
        recent.push(5, blocks(6..=8));
        recent.push(8, blocks(9..=9));
        recent.push(5, blocks(6..=9));
        assert_eq!(recent.read(), Some(9));
        assert_eq!(recent.look(4), Look::Unknown);
        assert_eq!(found(&recent.look(5)), [6, 7, 8]);
        assert_eq!(found(&recent.look(7)), [8]);
        assert_eq!(found(&recent.look(8)), [9]);
        assert_eq!((recent.look(9), recent.look(99)), (Look::Nothing, Look::Nothing));
        assert!(!recent.begin(3), "what is kept stays");
        recent.give_up();
        assert_eq!((recent.look(7), recent.read()), (Look::Unknown, None));
    }

    #[test]
    fn one_who_asks_for_what_is_after_the_end_keeps_nothing_from_the_others() {
        let mut recent = Recent::default();
        assert!(recent.begin(99) && recent.begin(3));
        // Read from 99 on before it began anew.
        recent.push(99, blocks(100..=101));
        assert_eq!((recent.read(), recent.look(3)), (Some(3), Look::Nothing));
    }

    #[test]
    fn nothing_comes_after_the_final_status() {
        let mut recent = Recent::default();
        recent.begin(1);
        let last = StoredEvent { payload: payload::status(Status::Ready, None), ..event(2, 0) };
        recent.push(1, Blocks::new(vec![last]).unwrap());
        assert_eq!(found(&recent.look(1)), [2]);
        assert_eq!((recent.look(2), recent.look(9)), (Look::Ended, Look::Ended));
    }

    #[test]
    fn no_more_is_kept_than_may_be() {
        let mut recent = Recent::default();
        recent.begin(0);
        let large = MAX_BYTES / 4;
        for seq in 1..=10 {
            recent.push(seq - 1, Blocks::new(vec![event(seq, large)]).unwrap());
            assert!(recent.bytes <= MAX_BYTES);
        }
        assert_eq!((recent.blocks.len(), recent.before), (3, 7));
        assert_eq!((recent.look(6), found(&recent.look(7))), (Look::Unknown, vec![8]));
        // One that is larger than all that is kept is kept alone.
        recent.push(10, Blocks::new(vec![event(11, 2 * MAX_BYTES)]).unwrap());
        assert_eq!((recent.blocks.len(), found(&recent.look(10))), (1, vec![11]));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever is read for all in whatever pieces, and wherever somebody begins and stops for a while: each number once and in
        /// order, from here or from the store.
        #[test]
        fn each_number_is_found_once(
            pieces in prop::collection::vec((1_u64..9, 1_usize..200_000), 1..30),
            begins in 0_u64..10,
            turns in prop::collection::vec(0_usize..4, 0..60),
            after in 0_u64..12,
        ) {
            let mut recent = Recent::default();
            recent.begin(begins);
            let (mut stored, mut at, mut seen) = (begins, after, vec![]);
            let mut turns = turns.into_iter();
            for (count, bytes) in pieces {
                let events = (stored + 1..=stored + count).map(|seq| event(seq, bytes));
                recent.push(stored, Blocks::new(events.collect()).unwrap());
                stored += count;
                for _ in 0..turns.next().unwrap_or(9) {
                    match recent.look(at) {
                        Look::Found(blocks) => {
                            seen.extend(blocks.seqs());
                            at = blocks.last();
                        }
                        // What the store would answer: some of what is there.
                        Look::Unknown => {
                            let last = stored.min(at + 3);
                            seen.extend(at + 1..=last);
                            at = at.max(last);
                        }
                        Look::Nothing => prop_assert!(at >= stored),
                        Look::Ended => prop_assert!(false, "it goes on"),
                    }
                }
            }
            prop_assert_eq!(seen, (after + 1..=at).collect::<Vec<_>>());
        }
    }
}
