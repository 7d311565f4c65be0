//! An instance: its states, and the pure transitions between them.
//!
//! ```text
//! Created ──a VM is free──▶ Initializing ──its program runs──▶ Running ──▶ Stopped
//!    └────────────────────────────┴───────────────────────────────────────▶ Stopped
//! ```
//! **Invariant**: a stopped instance never changes, and only the task that owns an instance changes it.

use kiln_protocol::job::BuildId;

use crate::build::{Millis, Tenant};

/// Identifies an instance. It has the form of a build's id, and is never one.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstanceId(BuildId);

impl InstanceId {
    /// A new one, later than those before it.
    pub fn generate() -> Self {
        let text = uuid::Uuid::now_v7().simple().to_string();
        #[allow(clippy::expect_used, reason = "32 hex digits are of an id's form")]
        Self(BuildId::new(text).expect("hex digits are an id"))
    }

    /// The id that the text writes, if it is one.
    pub fn parse(text: &str) -> Option<Self> {
        BuildId::new(text).ok().map(Self)
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }

    /// As a job names whose it is.
    pub fn as_job(&self) -> &BuildId {
        &self.0
    }
}

impl std::fmt::Display for InstanceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

/// Where an instance is, in hypeman's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// It waits for a VM.
    Created,
    /// Its disk is made and its VM boots.
    Initializing,
    /// Its program runs.
    Running,
    /// Nothing of it runs.
    Stopped,
}

impl State {
    /// Every state.
    pub const ALL: [Self; 4] = [Self::Created, Self::Initializing, Self::Running, Self::Stopped];

    /// The API's and the store's name.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Created => "Created",
            Self::Initializing => "Initializing",
            Self::Running => "Running",
            Self::Stopped => "Stopped",
        }
    }

    /// The state of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.as_str() == name)
    }
}

impl std::fmt::Display for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An instance as the store knows it. What its program is given is not kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Instance {
    /// Its id.
    pub id: InstanceId,
    /// Whose it is.
    pub tenant: Tenant,
    /// Its name, the tenant's only one.
    pub name: String,
    /// The image as it was asked for.
    pub image: String,
    /// Of the image's manifest.
    pub image_digest: String,
    /// Of its VM.
    pub vcpus: u32,
    /// Of its VM.
    pub memory_mb: u32,
    /// Where it is.
    pub state: State,
    /// When it was asked for.
    pub created_at: Millis,
    /// When its program started.
    pub started_at: Option<Millis>,
    /// When it stopped.
    pub stopped_at: Option<Millis>,
    /// Of its program, once it has ended.
    pub exit_code: Option<u8>,
    /// Why it ended, where it was not its program's own end.
    pub exit_message: Option<String>,
}

/// What happens to an instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// There is a VM for it.
    Initialize,
    /// Its program runs.
    Run,
    /// It is over.
    Stop(End),
}

/// How an instance ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct End {
    /// Its program's exit code, where it ran and ended.
    pub exit_code: Option<u8>,
    /// Why, where there is more to say.
    pub message: Option<String>,
}

impl End {
    /// The program ended.
    pub fn exited(code: u8) -> Self {
        Self { exit_code: Some(code), message: None }
    }

    /// The same of an instance that was not asked to end by anybody but the server, which stops.
    #[must_use]
    pub fn with_the_server(self) -> Self {
        let message = match self.message {
            None => "the server stopped".to_owned(),
            Some(why) => format!("the server stopped; {why}"),
        };
        Self { message: Some(message), ..self }
    }

    /// Kiln could not run it, or ended it.
    pub fn failed(message: impl Into<String>) -> Self {
        Self { exit_code: None, message: Some(message.into()) }
    }
}

/// A change that does not follow from the state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an instance that is {state} cannot become {wanted}")]
pub struct Refused {
    /// Where it is.
    pub state: State,
    /// Where it would be.
    pub wanted: State,
}

impl Instance {
    /// The instance after a change.
    pub fn apply(&self, change: Change, now: Millis) -> Result<Self, Refused> {
        let mut next = self.clone();
        let (state, allowed) = match &change {
            Change::Initialize => (State::Initializing, self.state == State::Created),
            Change::Run => (State::Running, self.state == State::Initializing),
            Change::Stop(_) => (State::Stopped, self.state != State::Stopped),
        };
        if !allowed {
            return Err(Refused { state: self.state, wanted: state });
        }
        next.state = state;
        match change {
            Change::Initialize => {}
            Change::Run => next.started_at = Some(now),
            Change::Stop(end) => {
                next.stopped_at = Some(now);
                next.exit_code = end.exit_code;
                next.exit_message = end.message;
            }
        }
        Ok(next)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn instance(state: State) -> Instance {
        Instance {
            id: InstanceId::parse("i1").unwrap(),
            tenant: Tenant::new("a").unwrap(),
            name: "web".into(),
            image: "a/web".into(),
            image_digest: "sha256:0".into(),
            vcpus: 1,
            memory_mb: 1024,
            state,
            created_at: 1,
            started_at: None,
            stopped_at: None,
            exit_code: None,
            exit_message: None,
        }
    }

    /// Rows are states, columns are changes: initialize, run, stop.
    #[test]
    fn the_table_holds() {
        use State::{Created, Initializing, Running, Stopped};
        let rows = [
            (Created, [Some(Initializing), None, Some(Stopped)]),
            (Initializing, [None, Some(Running), Some(Stopped)]),
            (Running, [None, None, Some(Stopped)]),
            (Stopped, [None, None, None]),
        ];
        for (state, expected) in rows {
            let changes = [Change::Initialize, Change::Run, Change::Stop(End::exited(3))];
            for (change, expected) in changes.into_iter().zip(expected) {
                let next = instance(state).apply(change.clone(), 9).ok().map(|next| next.state);
                assert_eq!(next, expected, "{state} {change:?}");
            }
        }
    }

    #[test]
    fn times_and_the_end_are_kept() {
        let running = instance(State::Initializing).apply(Change::Run, 5).unwrap();
        let end = End { exit_code: Some(7), message: Some("m".into()) };
        let stopped = running.apply(Change::Stop(end), 8).unwrap();
        assert_eq!((stopped.started_at, stopped.stopped_at), (Some(5), Some(8)));
        assert_eq!((stopped.exit_code, stopped.exit_message.as_deref()), (Some(7), Some("m")));
    }

    #[test]
    fn what_ends_with_the_server_says_so_and_keeps_its_code() {
        let end = End::exited(143).with_the_server();
        assert_eq!(
            (end.exit_code, end.message.as_deref()),
            (Some(143), Some("the server stopped"))
        );
        let end = End::failed("it was killed").with_the_server();
        assert_eq!(end, End::failed("the server stopped; it was killed"));
    }

    #[test]
    fn names_of_states_go_both_ways_and_ids_are_an_ids() {
        for state in State::ALL {
            assert_eq!(State::from_name(state.as_str()), Some(state));
        }
        assert_eq!(State::from_name("running"), None);
        let id = InstanceId::generate();
        assert_eq!(InstanceId::parse(id.as_str()), Some(id));
        assert_eq!(InstanceId::parse("../x"), None);
    }
}
