//! Why a build failed: from the steps' records, the engine's end, and last its words. Pure.

use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use kiln_protocol::event::{Failure, FailureKind, MAX_REPORT_TEXT, cut_text};

use super::parse::{self, Cause, DISK_FULL, Words};
use crate::runtime::{StepRecord, Usage};

/// With less than this free, a step that failed most likely failed for want of space: the last
/// blocks of a disk go to nobody.
const NEARLY_FULL: u64 = 4 * 1024 * 1024;

/// The failure of a build whose engine ended with `status`, after the kernel had killed this many of its
/// own processes for want of memory.
pub fn of_build(
    status: ExitStatus,
    steps: &[StepRecord],
    oom_kills: u32,
    words: Words<'_>,
    detail: String,
) -> Failure {
    // The engine stops at the first step that fails, so it is the last one.
    if let Some(step) = steps.last().filter(|step| step.exit_code != 0) {
        return of_step(step, detail);
    }
    let cause = (oom_kills > 0)
        .then(|| parse::out_of_memory(words.stderr))
        .or_else(|| engine_killed(status))
        .or_else(|| parse::build_failure(words))
        .unwrap_or_else(|| without_words(status));
    failure(cause, detail)
}

/// The failure of a push that ended with `status`; `oom_kills` as of a build.
pub fn of_push(status: ExitStatus, oom_kills: u32, stderr: &[String], detail: String) -> Failure {
    let cause = (oom_kills > 0)
        .then(|| parse::out_of_memory(stderr))
        .or_else(|| engine_killed(status))
        .unwrap_or_else(|| parse::push_failure(stderr));
    failure(cause, detail)
}

/// A failure of the agent itself: what it could not do.
pub fn internal(message: String) -> Failure {
    failure(Cause { kind: FailureKind::Internal, message }, String::new())
}

/// A cause as a failure.
#[allow(clippy::needless_pass_by_value, reason = "both end here")]
pub fn failure(cause: Cause, detail: String) -> Failure {
    Failure {
        kind: cause.kind,
        message: cut_text(&cause.message),
        step: None,
        exit_code: None,
        detail: Some(last_lines(&detail)).filter(|detail| !detail.is_empty()),
    }
}

pub fn of_step(step: &StepRecord, detail: String) -> Failure {
    let StepRecord { index, name, exit_code, .. } = step;
    let Usage { oom_kills, forks_refused, .. } = step.usage;
    let (kind, message) = if !step.started {
        let why = &step.last_words;
        (FailureKind::StepFailed, format!("step {index} could not be started: RUN {name}: {why}"))
    } else if oom_kills > 0 {
        (
            FailureKind::OutOfMemory,
            format!("step {index} ran out of memory: RUN {name}: ask for more with memory_mb"),
        )
    } else if step.disk_free.is_some_and(|free| free < NEARLY_FULL) {
        (FailureKind::DiskFull, format!("step {index}: RUN {name}: {DISK_FULL}"))
    } else if forks_refused > 0 {
        (
            FailureKind::ProcessLimit,
            format!("step {index} had too many processes at one time: RUN {name}"),
        )
    } else {
        (
            FailureKind::StepFailed,
            format!("step {index} failed with exit code {exit_code}: RUN {name}"),
        )
    };
    let cause = Cause { kind, message };
    // What the step printed tells more than what the engine says of it.
    let detail = if step.tail.is_empty() { detail } else { step.tail.clone() };
    Failure { step: Some(*index), exit_code: Some(*exit_code), ..failure(cause, detail) }
}

fn engine_killed(status: ExitStatus) -> Option<Cause> {
    let signal = status.signal()?;
    let message = format!("the build engine was killed by signal {signal}");
    Some(Cause { kind: FailureKind::EngineCrashed, message })
}

fn without_words(status: ExitStatus) -> Cause {
    let code = status.code().unwrap_or_default();
    let message = format!("the build engine ended with exit code {code} and no reason");
    Cause { kind: FailureKind::EngineCrashed, message }
}

/// Cuts a text to the bound of a report: the end tells the cause, so the first lines go. Whole ones: the host, which
/// takes secrets out of a text, could not tell the rest of one from anything else.
fn last_lines(text: &str) -> String {
    let surplus = text.len().saturating_sub(MAX_REPORT_TEXT);
    let starts = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1));
    let fits = starts.filter(|start| *start < text.len()).find(|start| *start >= surplus);
    // One line that is too long is cut at its end, and marked.
    let last = || text.trim_end_matches('\n').rfind('\n').map_or(0, |at| at + 1);
    cut_text(&text[fits.unwrap_or_else(last)..])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use kiln_protocol::event::Outcome;

    fn step() -> StepRecord {
        StepRecord {
            index: 2,
            name: "make".into(),
            started: true,
            exit_code: 7,
            usage: Usage::default(),
            disk_free: Some(1 << 30),
            last_words: "make: *** [all] Error 7".into(),
            tail: String::new(),
        }
    }

    fn exited(code: i32) -> ExitStatus {
        ExitStatus::from_raw(code << 8)
    }

    #[test]
    fn the_step_that_failed_is_named() {
        let failure = of_build(
            exited(7),
            &[step()],
            0,
            Words { stderr: &["Error: whatever".into()], upstreams: &[] },
            "tail".into(),
        );
        assert_eq!(failure.kind, FailureKind::StepFailed);
        assert_eq!(failure.message, "step 2 failed with exit code 7: RUN make");
        assert_eq!((failure.step, failure.exit_code), (Some(2), Some(7)));
        assert_eq!(failure.detail.as_deref(), Some("tail"));
    }

    #[test]
    fn the_steps_last_lines_are_the_detail() {
        let printed = StepRecord { tail: "cc: no such file\nmake: *** [all]".into(), ..step() };
        let failure = of_build(exited(7), &[printed], 0, Words::default(), "STEP 1/9".into());
        assert_eq!(failure.detail.as_deref(), Some("cc: no such file\nmake: *** [all]"));
    }

    #[test]
    fn what_the_kernel_counted_outweighs_the_exit_code() {
        let kind = |change: fn(&mut StepRecord)| {
            let mut step = step();
            change(&mut step);
            of_build(exited(1), &[step], 1, Words::default(), String::new()).kind
        };
        assert_eq!(kind(|step| step.usage.oom_kills = 1), FailureKind::OutOfMemory);
        assert_eq!(kind(|step| step.usage.forks_refused = 1), FailureKind::ProcessLimit);
        assert_eq!(kind(|step| step.disk_free = Some(NEARLY_FULL - 1)), FailureKind::DiskFull);
        assert_eq!(kind(|step| step.disk_free = Some(NEARLY_FULL)), FailureKind::StepFailed);
        assert_eq!(kind(|step| step.disk_free = None), FailureKind::StepFailed);
    }

    #[test]
    fn a_step_that_succeeded_is_not_to_blame() {
        let mut done = step();
        done.exit_code = 0;
        done.usage.oom_kills = 1;
        let lost = of_build(exited(125), &[done.clone()], 0, Words::default(), String::new());
        assert_eq!((lost.kind, lost.step), (FailureKind::EngineCrashed, None));
        let killed =
            of_build(ExitStatus::from_raw(9), &[done.clone()], 0, Words::default(), String::new());
        assert_eq!(killed.message, "the build engine was killed by signal 9");
        let starved =
            of_build(ExitStatus::from_raw(9), &[done], 1, Words::default(), String::new());
        assert_eq!((starved.kind, starved.step), (FailureKind::OutOfMemory, None));
        let crashed = of_build(ExitStatus::from_raw(11), &[], 0, Words::default(), String::new());
        assert_eq!(crashed.message, "the build engine was killed by signal 11");
    }

    #[test]
    fn a_step_that_could_not_start_says_why() {
        let not_started = StepRecord {
            started: false,
            exit_code: 127,
            last_words: "executable file `nosuch` not found".into(),
            ..step()
        };
        let failure = of_build(exited(1), &[not_started], 0, Words::default(), String::new());
        assert_eq!(
            failure.message,
            "step 2 could not be started: RUN make: executable file `nosuch` not found"
        );
        assert_eq!(failure.exit_code, Some(127));
    }

    #[test]
    fn reports_keep_their_bounds() {
        let mut long = step();
        long.name = "n".repeat(MAX_REPORT_TEXT);
        let detail = format!("{}\nend", "é".repeat(MAX_REPORT_TEXT));
        let failure = of_build(exited(1), &[long], 0, Words::default(), detail);
        assert_eq!(failure.detail.as_deref(), Some("end"));
        assert_eq!(Outcome::Failed(failure).check(), Ok(()));
    }

    /// Half a secret is masked by nobody.
    #[test]
    fn a_text_is_cut_between_lines() {
        let line = format!("{}-secret", "x".repeat(1000));
        for count in 1..12 {
            let kept = last_lines(&[line.as_str()].repeat(count).join("\n"));
            assert!(kept.lines().all(|kept| kept == line), "{kept}");
            assert_eq!(kept.lines().count(), count.min(8));
        }
        let at = ["x".repeat(MAX_REPORT_TEXT - 2), "y".into()].join("\n");
        assert_eq!(last_lines(&at), at);
        assert_eq!(last_lines(&format!("x{at}")), "y");
        // What cannot be cut so is cut where it is marked.
        let long = "é".repeat(MAX_REPORT_TEXT);
        for text in [long.clone(), format!("first\n{long}"), format!("first\n{long}\n")] {
            let kept = last_lines(&text);
            assert!(kept.starts_with('é') && kept.ends_with('…'), "{}", &kept[..20]);
            assert!(kept.len() <= MAX_REPORT_TEXT);
        }
    }
}
