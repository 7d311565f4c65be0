//! Why a build is ended before its engine ends it, and what the outcome then says.

use kiln_protocol::event::{Event, Failure, FailureKind, Outcome, Phase, StepState, cut_text};
use tokio_util::sync::CancellationToken;

/// How a job is ended from outside. All clones are one.
#[derive(Clone, Debug, Default)]
pub struct Ending {
    /// All of it.
    pub whole: CancellationToken,
    /// Only the processes of the step that runs: it fails, and stays to be entered.
    pub step: CancellationToken,
}

/// The first of these decides the outcome.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// The host said so.
    Cancelled,
    /// The job's time is over.
    TimedOut {
        /// The limit.
        timeout_ms: u64,
    },
    /// The job has printed too much.
    LogLimit {
        /// The limit.
        log_bytes: u64,
    },
}

/// How far the build is, as its events tell.
#[derive(Debug, Default)]
pub struct Progress {
    phase: Option<Phase>,
    /// The step that runs, with its command.
    step: Option<(u32, String)>,
}

impl Progress {
    /// Takes note of an event.
    pub fn see(&mut self, event: &Event) {
        match event {
            Event::Phase(phase) => self.phase = Some(*phase),
            Event::Step(step) => match step.state {
                StepState::Started => self.step = Some((step.index, step.name.clone())),
                StepState::Ended(_)
                    if self.step.as_ref().is_some_and(|(i, _)| *i == step.index) =>
                {
                    self.step = None;
                }
                StepState::Ended(_) => {}
            },
            Event::Log(_) | Event::Name(_) => {}
        }
    }

    /// Whether a step runs.
    pub fn is_in_a_step(&self) -> bool {
        self.step.is_some()
    }

    fn what(&self) -> &'static str {
        if self.phase == Some(Phase::Running) { "instance" } else { "build" }
    }

    fn place(&self) -> String {
        let phase = match self.phase {
            None => "before it began",
            Some(Phase::Unpacking) => "while its source was unpacked",
            Some(Phase::Building) => "while its Dockerfile was run",
            Some(Phase::Pushing) => "while its image was pushed",
            Some(Phase::Running) => "while its program ran",
        };
        match &self.step {
            Some((index, name)) => format!("{phase}, in step {index} (`{name}`)"),
            None => phase.to_owned(),
        }
    }
}

impl Stop {
    /// The outcome of a build that was ended for this.
    pub fn outcome(self, progress: &Progress) -> Outcome {
        self.outcome_with(progress, None)
    }

    /// The same, with the last lines that there were.
    pub fn outcome_with(self, progress: &Progress, detail: Option<String>) -> Outcome {
        let (kind, message) = match self {
            Self::Cancelled => return Outcome::Cancelled,
            Self::TimedOut { timeout_ms } => (
                FailureKind::TimedOut,
                format!(
                    "the {} reached its time limit of {} {}; make it faster or raise its timeout",
                    progress.what(),
                    seconds(timeout_ms),
                    progress.place(),
                ),
            ),
            Self::LogLimit { log_bytes } => (
                FailureKind::LogLimit,
                format!(
                    "the {} printed more than its log limit of {log_bytes} bytes {}; make it \
                     print less or have the limit raised",
                    progress.what(),
                    progress.place(),
                ),
            ),
        };
        let step = progress.step.as_ref().map(|(index, _)| *index);
        let message = cut_text(&message);
        Outcome::Failed(Failure { kind, message, step, exit_code: None, detail })
    }
}

fn seconds(ms: u64) -> String {
    if ms.is_multiple_of(1000) { format!("{} s", ms / 1000) } else { format!("{ms} ms") }
}

#[cfg(test)]
mod tests {
    use kiln_protocol::event::{Step, StepEnd};

    use super::*;

    fn step(index: u32, state: StepState) -> Event {
        Event::Step(Step { index, name: format!("make {index}"), state })
    }

    fn message(stop: Stop, events: &[Event]) -> String {
        let mut progress = Progress::default();
        for event in events {
            progress.see(event);
        }
        match stop.outcome(&progress) {
            Outcome::Failed(failure) => failure.message,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn messages_name_the_limit_the_phase_and_the_step() {
        let ended = StepState::Ended(StepEnd {
            exit_code: 0,
            duration_ms: 1,
            memory_peak_bytes: 0,
            oom_kills: 0,
        });
        let building = Event::Phase(Phase::Building);
        let running = [
            building.clone(),
            step(1, StepState::Started),
            step(1, ended.clone()),
            step(2, StepState::Started),
        ];
        let timed_out = Stop::TimedOut { timeout_ms: 600_000 };
        assert_eq!(
            message(timed_out, &running),
            "the build reached its time limit of 600 s while its Dockerfile was run, in step 2 \
             (`make 2`); make it faster or raise its timeout"
        );
        let between = [building, step(1, StepState::Started), step(1, ended)];
        assert!(!message(timed_out, &between).contains("step"));
        assert!(message(timed_out, &[]).contains("before it began"));
        assert!(message(Stop::LogLimit { log_bytes: 77 }, &running).contains("77 bytes"));
    }

    #[test]
    fn a_cancelled_build_is_cancelled() {
        assert_eq!(Stop::Cancelled.outcome(&Progress::default()), Outcome::Cancelled);
    }
}
