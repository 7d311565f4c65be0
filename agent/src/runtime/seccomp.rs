//! The seccomp profile of a step: what the engine asked for, minus every way to AF_VSOCK.
//!
//! The VM's only link to the outside is vsock, and the host trusts what arrives there as the
//! agent's. So a step must not open such a socket: not by `socket`, not by the 32-bit multiplexer
//! `socketcall`, not by io_uring's own socket operation. Families are an allow-list.

use oci_spec::runtime::{
    LinuxSeccomp, LinuxSeccompAction as Action, LinuxSeccompArg, LinuxSeccompArgBuilder,
    LinuxSeccompOperator as Operator, LinuxSyscall,
};

/// A profile that cannot be made safe: the step does not run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProfileError {
    /// There is nothing to start from.
    #[error("the engine gave the step no seccomp profile")]
    Missing,
    /// It permits what it does not name, so that removing rules would not forbid anything.
    #[error("the engine's seccomp profile permits system calls that it does not name ({0})")]
    OpenByDefault(Action),
    /// A rule of ours could not be put into words.
    #[error("a seccomp rule could not be made: {0}")]
    Rule(String),
}

/// The families that a step may open, with any protocol. AF_NETLINK is apart: see
/// [`NETLINK_PROTOCOLS`].
const FAMILIES: [u64; 3] = [AF_UNIX, AF_INET, AF_INET6];
const AF_UNIX: u64 = 1;
const AF_INET: u64 = 2;
const AF_INET6: u64 = 10;
const AF_NETLINK: u64 = 16;

/// What programs in containers ask the kernel over netlink: ROUTE (`getaddrinfo` and Go's net
/// package do), SOCK_DIAG, XFRM, NETFILTER, KOBJECT_UEVENT, GENERIC. Not AUDIT, as in the usual
/// profile.
const NETLINK_PROTOCOLS: [u64; 6] = [0, 4, 6, 12, 15, 16];

/// The kernel takes family and protocol as `int` and drops the upper half of the register, so the
/// upper half must not take part in the comparison: 0x1_0000_0028 is AF_VSOCK (0x28) too.
const INT_MASK: u64 = 0xffff_ffff;

/// System calls that make sockets, or rings that make sockets.
const SOCKET_MAKERS: [&str; 6] =
    ["socket", "socketcall", "socketpair", "io_uring_setup", "io_uring_enter", "io_uring_register"];

/// The audit system's protocol: see [`deny_audit`].
const NETLINK_AUDIT: u64 = 9;

const EPERM: u32 = 1;
const EINVAL: u32 = 22;
const ENOSYS: u32 = 38;

/// A profile like the engine's that leads nowhere near AF_VSOCK.
pub fn tighten(profile: Option<&LinuxSeccomp>) -> Result<LinuxSeccomp, ProfileError> {
    let mut tight = profile.ok_or(ProfileError::Missing)?.clone();
    match tight.default_action() {
        Action::ScmpActErrno
        | Action::ScmpActKill
        | Action::ScmpActKillThread
        | Action::ScmpActKillProcess => {}
        open => return Err(ProfileError::OpenByDefault(open)),
    }
    let mut rules: Vec<LinuxSyscall> =
        tight.syscalls().iter().flatten().filter_map(without_socket_makers).collect();
    for family in FAMILIES {
        rules.push(allow("socket", vec![equals(0, family)?]));
    }
    for protocol in NETLINK_PROTOCOLS {
        rules.push(allow("socket", vec![equals(0, AF_NETLINK)?, equals(2, protocol)?]));
    }
    rules.push(allow("socketpair", vec![equals(0, AF_UNIX)?]));
    rules.push(deny_audit()?);
    rules.push(deny_socketcall(&tight));
    tight.set_syscalls(Some(rules));
    // Nobody of ours listens for notifications.
    tight.set_listener_path(None).set_listener_metadata(None);
    Ok(tight)
}

/// The rule without the calls that we decide on, or nothing if that was all it had.
fn without_socket_makers(rule: &LinuxSyscall) -> Option<LinuxSyscall> {
    let names: Vec<String> = rule
        .names()
        .iter()
        .filter(|name| !SOCKET_MAKERS.contains(&name.as_str()))
        .cloned()
        .collect();
    if names.is_empty() {
        return None;
    }
    let mut rule = rule.clone();
    rule.set_names(names);
    Some(rule)
}

/// To programs that log to the audit system (`useradd` does) this error says that the kernel has none; any other
/// makes them give up. So does the usual profile.
fn deny_audit() -> Result<LinuxSyscall, ProfileError> {
    let mut rule = LinuxSyscall::default();
    rule.set_names(vec!["socket".to_owned()])
        .set_action(Action::ScmpActErrno)
        .set_errno_ret(Some(EINVAL))
        .set_args(Some(vec![equals(0, AF_NETLINK)?, equals(2, NETLINK_AUDIT)?]));
    Ok(rule)
}

/// `socketcall` takes its arguments from memory, where a filter cannot look. And leaving it
/// unnamed is not enough: for 32-bit x86, libseccomp turns every rule for `socket` into one for
/// `socketcall(SYS_SOCKET)` as well and drops its arguments. A rule without conditions outweighs
/// all those.
fn deny_socketcall(profile: &LinuxSeccomp) -> LinuxSyscall {
    // libseccomp refuses a rule that repeats the default action, and runtimes skip it.
    let default_is_eperm = profile.default_action() == Action::ScmpActErrno
        && profile.default_errno_ret().unwrap_or(EPERM) == EPERM;
    let mut rule = LinuxSyscall::default();
    rule.set_names(vec!["socketcall".to_owned()])
        .set_action(Action::ScmpActErrno)
        .set_errno_ret(Some(if default_is_eperm { ENOSYS } else { EPERM }));
    rule
}

fn allow(name: &str, args: Vec<LinuxSeccompArg>) -> LinuxSyscall {
    let mut rule = LinuxSyscall::default();
    rule.set_names(vec![name.to_owned()]).set_action(Action::ScmpActAllow).set_args(Some(args));
    rule
}

/// `(argument & INT_MASK) == expected`.
fn equals(index: usize, expected: u64) -> Result<LinuxSeccompArg, ProfileError> {
    LinuxSeccompArgBuilder::default()
        .index(index)
        .op(Operator::ScmpCmpMaskedEq)
        .value(INT_MASK)
        .value_two(expected)
        .build()
        .map_err(|error| ProfileError::Rule(error.to_string()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn profile(json: &str) -> LinuxSeccomp {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn without_a_profile_or_with_an_open_one_nothing_runs() {
        assert_eq!(tighten(None), Err(ProfileError::Missing));
        for action in ["SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_NOTIFY", "SCMP_ACT_TRACE"] {
            let open = profile(&format!(r#"{{"defaultAction":"{action}"}}"#));
            assert!(
                matches!(tighten(Some(&open)), Err(ProfileError::OpenByDefault(_))),
                "{action}"
            );
        }
    }

    #[test]
    fn what_makes_sockets_is_only_there_by_our_rules() {
        let given = profile(
            r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38,"syscalls":[
                {"names":["read","socket","socketpair"],"action":"SCMP_ACT_ALLOW"},
                {"names":["socketcall"],"action":"SCMP_ACT_LOG"},
                {"names":["io_uring_setup","io_uring_enter","io_uring_register"],"action":"SCMP_ACT_ALLOW"},
                {"names":["socket"],"action":"SCMP_ACT_ALLOW","args":[{"index":0,"value":40,"op":"SCMP_CMP_NE"}]}
            ]}"#,
        );
        let tight = tighten(Some(&given)).unwrap();
        let rules = tight.syscalls().clone().unwrap();
        assert_eq!(rules[0].names(), &["read"]);
        for rule in &rules[1..] {
            match (rule.names()[0].as_str(), rule.action()) {
                ("socket" | "socketpair", Action::ScmpActAllow) => {
                    let family = rule.args().clone().unwrap()[0];
                    assert_eq!((family.index(), family.op()), (0, Operator::ScmpCmpMaskedEq));
                    assert_eq!(family.value(), INT_MASK);
                    assert!([1, 2, 10, 16].contains(&family.value_two().unwrap()));
                }
                ("socket", Action::ScmpActErrno) => {
                    let args = rule.args().clone().unwrap();
                    let values = (args[0].value_two(), args[1].value_two());
                    assert_eq!(values, (Some(AF_NETLINK), Some(NETLINK_AUDIT)));
                    assert_eq!(rule.errno_ret(), Some(EINVAL));
                }
                ("socketcall", Action::ScmpActErrno) => {
                    assert_eq!((rule.args(), rule.errno_ret()), (&None, Some(EPERM)));
                }
                other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn the_denial_of_socketcall_never_repeats_the_default() {
        for (json, errno) in [
            (r#"{"defaultAction":"SCMP_ACT_ERRNO"}"#, ENOSYS),
            (r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":1}"#, ENOSYS),
            (r#"{"defaultAction":"SCMP_ACT_ERRNO","defaultErrnoRet":38}"#, EPERM),
            (r#"{"defaultAction":"SCMP_ACT_KILL_PROCESS"}"#, EPERM),
        ] {
            let tight = tighten(Some(&profile(json))).unwrap();
            let last = tight.syscalls().clone().unwrap().pop().unwrap();
            assert_eq!((last.names()[0].as_str(), last.errno_ret()), ("socketcall", Some(errno)));
        }
    }
}
