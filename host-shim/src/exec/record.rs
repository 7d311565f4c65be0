//! What the audit log says of a session: who, what, when, and how it ended. Never what was typed or printed, and
//! of variables the names only.

use kiln_protocol::exec::{Copy, Exec, Open, Place};

use crate::build::{BuildId, Millis, Tenant};
use crate::instances::InstanceId;
use crate::store::Role;
use crate::token::Caller;

/// Of a command, and of the names of its variables, so many bytes are kept. A command may be larger than what a
/// list of sessions can show.
pub const MAX_KEPT: usize = 16 * 1024;

/// What was entered.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Subject {
    /// A build, while it ran.
    Build(BuildId),
    /// A running image.
    Instance(InstanceId),
}

impl std::fmt::Display for Subject {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Build(id) => write!(f, "build {id}"),
            Self::Instance(id) => write!(f, "instance {id}"),
        }
    }
}

/// Who entered: a token, as it was then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Who {
    /// The token's public id.
    pub token_id: String,
    /// The token's name, where it has one.
    pub token_name: Option<String>,
    /// The token's role.
    pub role: Role,
    /// The token's tenant.
    pub tenant: Tenant,
}

impl From<Caller> for Who {
    fn from(caller: Caller) -> Self {
        let Caller { token_id, token_name, role, tenant } = caller;
        Self { token_id, token_name, role, tenant }
    }
}

/// A session.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each says one thing of a session")]
pub struct Session {
    /// Its id.
    pub id: String,
    /// Whose build or instance it was.
    pub tenant: Tenant,
    /// What was entered.
    pub subject: Subject,
    /// Who entered.
    pub who: Who,
    /// The program and its arguments.
    pub command: Vec<String>,
    /// Whether the command, or the names of its variables, went on.
    pub cut: bool,
    /// Names of the variables that were given.
    pub env: Vec<String>,
    /// The directory that was asked for.
    pub directory: Option<String>,
    /// The user that was asked for.
    pub user: Option<String>,
    /// With a terminal.
    pub tty: bool,
    /// The VM itself, not the step or the program.
    pub vm: bool,
    /// With the step's secrets.
    pub with_secrets: bool,
    /// When it began.
    pub started_at: Millis,
    /// Its end; `None` while it goes on.
    pub end: Option<End>,
}

/// How a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// When.
    pub at: Millis,
    /// How.
    pub how: How,
    /// The command's, or the one that Kiln gave the client instead; `None` where nobody was left to give it to.
    pub exit_code: Option<u8>,
    /// Why, where the command did not end by itself.
    pub why: Option<String>,
}

/// The ways in which a session ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// The command ended.
    Exited,
    /// The client went away.
    ClientLost,
    /// The session's time was over.
    TimedOut,
    /// The VM, or its build, ended.
    VmEnded,
    /// The server was stopped.
    ServerStopped,
    /// The client's token was revoked, or expired.
    Revoked,
    /// No command was started.
    Refused,
    /// The client or the VM's agent broke the rules, or the host failed.
    Failed,
}

impl How {
    /// Every one.
    pub const ALL: [Self; 8] = [
        Self::Exited,
        Self::ClientLost,
        Self::TimedOut,
        Self::VmEnded,
        Self::ServerStopped,
        Self::Revoked,
        Self::Refused,
        Self::Failed,
    ];

    /// The API's and the store's name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Exited => "exited",
            Self::ClientLost => "client_lost",
            Self::TimedOut => "timed_out",
            Self::VmEnded => "vm_ended",
            Self::ServerStopped => "server_stopped",
            Self::Revoked => "revoked",
            Self::Refused => "refused",
            Self::Failed => "failed",
        }
    }

    /// The one of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|how| how.as_str() == name)
    }
}

impl Session {
    /// A session that begins now.
    pub fn begin(tenant: Tenant, subject: Subject, who: Who, exec: &Exec, now: Millis) -> Self {
        let (command, command_cut) = kept(exec.command.iter());
        let (env, env_cut) = kept(exec.env.iter().map(|(name, _)| name));
        Self {
            id: uuid::Uuid::now_v7().simple().to_string(),
            tenant,
            subject,
            who,
            command,
            cut: command_cut || env_cut,
            env,
            directory: exec.directory.clone(),
            user: exec.user.clone(),
            tty: exec.terminal.is_some(),
            vm: exec.place == Place::Vm,
            with_secrets: exec.place == Place::Job { secrets: true },
            started_at: now,
            end: None,
        }
    }
}

/// What the audit log says that was run: of a copy, `cp out PATH` or `cp in PATH`.
pub fn as_command(open: &Open) -> Exec {
    let (way, Copy { place, path }) = match open {
        Open::Exec(exec) => return exec.clone(),
        Open::CopyOut(copy) => ("out", copy),
        Open::CopyIn(copy) => ("in", copy),
    };
    Exec {
        place: *place,
        command: vec!["cp".into(), way.into(), path.clone()],
        env: vec![],
        directory: None,
        user: None,
        terminal: None,
    }
}

/// The first words, and whether there were more.
fn kept<'a>(words: impl Iterator<Item = &'a String>) -> (Vec<String>, bool) {
    let (mut kept, mut room) = (vec![], MAX_KEPT);
    for word in words {
        // An empty word costs something as well.
        if word.len() + 1 > room {
            let end = (0..room).rev().find(|at| word.is_char_boundary(*at)).unwrap_or(0);
            kept.push(word[..end].to_owned());
            return (kept, true);
        }
        room -= word.len() + 1;
        kept.push(word.clone());
    }
    (kept, false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_beginning_of_a_long_command_is_kept() {
        let words = |lens: &[usize]| lens.iter().map(|n| "é".repeat(*n)).collect::<Vec<_>>();
        let all = words(&[0, 3, 5]);
        assert_eq!(kept(all.iter()), (all.clone(), false));
        let fits = vec!["x".repeat(MAX_KEPT - 1)];
        assert_eq!(kept(fits.iter()), (fits.clone(), false));
        let (cut, was_cut) = kept(words(&[MAX_KEPT / 4, MAX_KEPT]).iter());
        assert!(was_cut && cut.len() == 2);
        assert!(cut.iter().map(String::len).sum::<usize>() <= MAX_KEPT);
        let many = vec![String::new(); MAX_KEPT + 1];
        let (cut, was_cut) = kept(many.iter());
        assert!(was_cut && cut.len() <= MAX_KEPT + 1);
    }

    #[test]
    fn names_of_ends_go_both_ways() {
        for how in How::ALL {
            assert_eq!(How::from_name(how.as_str()), Some(how));
        }
        assert_eq!(How::from_name("x"), None);
    }
}
