//! Who is next: the order of queued builds, fair between tenants. Pure.
//!
//! Next is, of the tenants that wait, the one with the fewest builds under way; among those, the one whose build was claimed
//! longest ago; among those that never had one, the one that waits longest. Of that tenant it is the build with the highest
//! priority, and of those the oldest: a priority moves nothing of another tenant's.
//!
//! So with one VM tenants take turns, with more they share them, and a tenant's hundred builds delay another's one by no
//! more than the next end of one of them.

use crate::build::{Millis, Tenant};

/// A tenant that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Who.
    pub tenant: Tenant,
    /// Its queued builds: at least one.
    pub queued: u32,
    /// Its builds under way.
    pub active: u32,
    /// Which claim of all was its last; 0 for none.
    pub turn: i64,
    /// Since when its oldest build is queued.
    pub oldest: Millis,
}

/// The number in the line of a tenant's build that has so many of its tenant's before it: 1 is next. `None` when the tenant does not wait.
///
/// So many claims there will be until it is claimed, if none of the builds under way ended before, and nothing
/// was submitted or cancelled.
pub fn position(line: &[Waiting], tenant: &Tenant, ahead: u32) -> Option<u32> {
    let own = line.iter().find(|waiting| waiting.tenant == *tenant)?;
    // It is claimed when its tenant has so many under way.
    let level = own.active.saturating_add(ahead);
    let before = line.iter().filter(|other| other.tenant != *tenant).map(|other| {
        // Each claim adds one: those of others at lower levels come before.
        let lower = level.saturating_sub(other.active);
        // At the same level is first who got there first: who was there from the start, then who came from the next lower one.
        let first = (std::cmp::Reverse(other.active), other.turn, other.oldest, &other.tenant)
            < (std::cmp::Reverse(own.active), own.turn, own.oldest, &own.tenant);
        let same = u32::from(other.active <= level && first);
        other.queued.min(lower.saturating_add(same))
    });
    Some(before.fold(ahead.saturating_add(1), u32::saturating_add))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The claims of a queue, one by one, by the words at the top: tenant and which of its builds.
    fn claims(mut line: Vec<Waiting>) -> Vec<(Tenant, u32)> {
        let mut turn = line.iter().map(|waiting| waiting.turn).max().unwrap_or(0);
        let mut had = vec![0; line.len()];
        let mut all = vec![];
        loop {
            let waiting = line.iter_mut().enumerate().filter(|(_, w)| w.queued > 0);
            let next = waiting.min_by_key(|(_, w)| (w.active, w.turn, w.oldest, w.tenant.clone()));
            let Some((at, next)) = next else { return all };
            turn += 1;
            (next.queued, next.active, next.turn) = (next.queued - 1, next.active + 1, turn);
            all.push((next.tenant.clone(), had[at]));
            had[at] += 1;
        }
    }

    proptest! {
        #[test]
        fn positions_are_the_order_of_claims(
            tenants in proptest::collection::vec((1..6_u32, 0..4_u32, any::<bool>(), 0..3_i64), 1..6),
        ) {
            let line: Vec<_> = tenants.into_iter().enumerate().map(|(n, (queued, active, fresh, oldest))| {
                // Turns differ, but for those that never had one.
                let turn = if fresh { 0 } else { 1 + i64::try_from((n * 7) % 11).unwrap() };
                Waiting { tenant: Tenant::new(format!("t{n}")).unwrap(), queued, active, turn, oldest }
            }).collect();
            for (number, (tenant, ahead)) in (1..).zip(claims(line.clone())) {
                prop_assert_eq!(position(&line, &tenant, ahead), Some(number), "{} {} in {:?}", tenant, ahead, line);
            }
        }
    }

    #[test]
    fn one_who_does_not_wait_has_no_number() {
        assert_eq!(position(&[], &Tenant::new("a").unwrap(), 0), None);
    }
}
