//! A step that failed after it was refused something: then that is the cause to tell. Pure.
//!
//! Which step wanted a host is the guest's word, and so is that the step failed. That it was refused is the host's.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::Next;
use crate::build::{Failure, FailureKind};
use crate::egress::Denied;
use crate::queue::egress_log::{Fate, Seen};

/// Hosts that a message names.
const MOST_NAMED: usize = 5;

/// Blames the network for a step that failed where the step was refused something.
pub(in crate::queue) fn denied(next: Next, seen: &[Seen]) -> Next {
    let Next::Fail(failure) = next else { return next };
    let (FailureKind::StepFailed, Some(step)) = (failure.kind, failure.step) else {
        return Next::Fail(failure);
    };
    let of_step: Vec<_> = seen.iter().filter(|seen| seen.step == Some(step)).collect();
    // A program may ask for an address in vain and then use the proxy.
    let was_reached =
        |host: &str| of_step.iter().any(|seen| seen.fate == Fate::Reached && seen.host == host);
    let refused: Vec<_> = of_step
        .iter()
        .filter(|seen| match seen.fate {
            Fate::Reached => false,
            Fate::Denied(_) => true,
            Fate::Asked { .. } => !was_reached(&seen.host),
        })
        .copied()
        .collect();
    if refused.is_empty() {
        return Next::Fail(failure);
    }
    let message = format!("step {step} was refused {}. {}", reasons(&refused), failure.message);
    Next::Fail(Failure { kind: FailureKind::EgressDenied, message, ..failure })
}

/// What was refused, by what can be done about it.
fn reasons(refused: &[&Seen]) -> String {
    let mut by_remedy = BTreeMap::<Remedy, BTreeSet<String>>::new();
    for seen in refused {
        by_remedy.entry(Remedy::of(seen)).or_default().insert(named(seen));
    }
    let told = by_remedy.iter().map(|(remedy, hosts)| {
        let why = match remedy {
            Remedy::Allow => {
                let flags = list(hosts, "--allow ");
                return format!(
                    "{}: not on the build's list, allow what it needs with allowed_domains ({flags})",
                    list(hosts, "")
                );
            }
            Remedy::Name => "an address, and a list is of names",
            Remedy::Permit => {
                "an address that builds may not reach, the host's operator can permit it (--egress-permit)"
            }
            Remedy::Proxy => {
                "it asked for the address itself, but only the proxy in HTTP_PROXY and HTTPS_PROXY leads out"
            }
        };
        format!("{}: {why}", list(hosts, ""))
    });
    told.collect::<Vec<_>>().join("; ")
}

/// What helps against a refusal.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Remedy {
    /// An entry of the list.
    Allow,
    /// Another entry than this.
    Name,
    /// The operator.
    Permit,
    /// Another way out.
    Proxy,
}

impl Remedy {
    fn of(seen: &Seen) -> Self {
        let is_address = seen.host.parse::<IpAddr>().is_ok();
        match seen.fate {
            Fate::Denied(Denied::NotListed) if is_address => Self::Name,
            Fate::Denied(Denied::NotListed) | Fate::Asked { listed: false } => Self::Allow,
            Fate::Denied(Denied::Address(_) | Denied::NoNetwork) => Self::Permit,
            // Nobody is refused what was reached.
            Fate::Asked { listed: true } | Fate::Reached => Self::Proxy,
        }
    }
}

/// As an entry of a list would have it.
fn named(seen: &Seen) -> String {
    match seen.port {
        None | Some(80 | 443) => seen.host.clone(),
        Some(port) if seen.host.contains(':') => format!("[{}]:{port}", seen.host),
        Some(port) => format!("{}:{port}", seen.host),
    }
}

fn list(hosts: &BTreeSet<String>, before: &str) -> String {
    let named: Vec<_> =
        hosts.iter().take(MOST_NAMED).map(|host| format!("{before}{host}")).collect();
    let separator = if before.is_empty() { ", " } else { " " };
    match hosts.len().saturating_sub(MOST_NAMED) {
        0 => named.join(separator),
        more if before.is_empty() => format!("{} and {more} more", named.join(separator)),
        _ => format!("{} …", named.join(separator)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::egress::policy::Class;

    fn seen(step: u32, host: &str, port: Option<u16>, fate: Fate) -> Seen {
        Seen { step: Some(step), host: host.into(), port, fate }
    }

    fn failed(kind: FailureKind, step: Option<u32>) -> Next {
        let failure = Failure::new(kind, "step 2 failed with exit code 100: RUN x");
        Next::Fail(Failure { step, exit_code: Some(100), ..failure }.with_detail("last words"))
    }

    const NOT_LISTED: Fate = Fate::Denied(Denied::NotListed);

    /// The kind and the message of step 2.
    #[track_caller]
    fn told(seen: &[Seen]) -> (FailureKind, String) {
        let Next::Fail(failure) = denied(failed(FailureKind::StepFailed, Some(2)), seen) else {
            panic!("it failed")
        };
        assert_eq!((failure.step, failure.exit_code), (Some(2), Some(100)));
        assert_eq!(failure.detail.as_deref(), Some("last words"));
        (failure.kind, failure.message)
    }

    #[test]
    fn a_step_that_was_refused_something_failed_for_it() {
        let (kind, message) = told(&[
            seen(2, "deb.test", Some(80), NOT_LISTED),
            seen(2, "a.test", Some(8443), NOT_LISTED),
            seen(2, "b.test", None, Fate::Asked { listed: false }),
            seen(1, "other.test", Some(80), NOT_LISTED),
        ]);
        assert_eq!(kind, FailureKind::EgressDenied);
        assert_eq!(
            message,
            "step 2 was refused a.test:8443, b.test, deb.test: not on the build's list, allow what it needs with \
             allowed_domains (--allow a.test:8443 --allow b.test --allow deb.test). \
             step 2 failed with exit code 100: RUN x"
        );
    }

    #[test]
    fn each_refusal_says_what_to_do() {
        let address = Fate::Denied(Denied::Address(Class::Private));
        let (_, message) = told(&[
            seen(2, "10.0.0.1", Some(22), address),
            seen(2, "fd00::1", Some(22), address),
            seen(2, "192.0.2.1", Some(443), NOT_LISTED),
            seen(2, "c.test", None, Fate::Asked { listed: true }),
        ]);
        assert!(message.contains("192.0.2.1: an address, and a list"), "{message}");
        assert!(message.contains("10.0.0.1:22, [fd00::1]:22: an address"), "{message}");
        assert!(message.contains("--egress-permit"), "{message}");
        assert!(message.contains("c.test: it asked"), "{message}");
        assert!(!message.contains("--allow"), "{message}");
    }

    #[test]
    fn a_message_names_some_of_many() {
        let many: Vec<_> =
            (0..9).map(|n| seen(2, &format!("n{n}.test"), Some(443), NOT_LISTED)).collect();
        let (_, message) = told(&many);
        assert!(message.contains("n4.test and 4 more: "), "{message}");
        assert!(
            message.contains("--allow n4.test …)") && !message.contains("n5.test"),
            "{message}"
        );
    }

    #[test]
    fn nothing_else_is_blamed_on_the_network() {
        let refused = [seen(2, "a.test", Some(80), NOT_LISTED)];
        for (kind, step) in [
            (FailureKind::StepFailed, Some(1)),
            (FailureKind::StepFailed, None),
            (FailureKind::OutOfMemory, Some(2)),
            (FailureKind::Internal, Some(2)),
        ] {
            assert_eq!(denied(failed(kind, step), &refused), failed(kind, step));
        }
        assert_eq!(denied(Next::Cancel, &refused), Next::Cancel);
        let nobody = Seen { step: None, ..refused[0].clone() };
        assert_eq!(told(&[nobody]).0, FailureKind::StepFailed);
        assert_eq!(told(&[seen(2, "a.test", Some(443), Fate::Reached)]).0, FailureKind::StepFailed);
        let asked_and_reached = [
            seen(2, "a.test", None, Fate::Asked { listed: true }),
            seen(2, "a.test", Some(443), Fate::Reached),
        ];
        assert_eq!(told(&asked_and_reached).0, FailureKind::StepFailed);
    }
}
