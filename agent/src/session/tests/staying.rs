//! Builds whose failed step is to stay.

use kiln_protocol::event::StepEnd;

use super::*;

fn kept_job() -> Job {
    let mut job = job();
    if let Role::Build(build) = &mut job.role {
        build.keep_failed = true;
    }
    job
}

/// What the agent says up to its outcome, which it says after that it keeps a step, or without.
async fn outcome_of(peer: &mut Peer) -> (bool, Outcome) {
    let mut kept = false;
    loop {
        match peer.next().await {
            AgentToHost::Kept => kept = true,
            AgentToHost::Outcome(outcome) => return (kept, outcome),
            _ => {}
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_failed_step_that_stays_outlives_the_connection_until_finish() {
    let (over, mut ended) = mpsc::unbounded_channel::<()>();
    let mut fixture = start(move |work: Work, reporter, cancel: CancellationToken| {
        let over = over.clone();
        async move {
            assert!(work.keep_failed);
            let failure = fail(FailureKind::StepFailed, "make ended with 2");
            reporter.report(Report::Held(Box::new(failure))).await;
            let _until_it_is_dropped = over;
            cancel.cancelled().await;
            Outcome::Cancelled
        }
    });
    let mut peer = fixture.building(kept_job()).await;
    let (kept, outcome) = outcome_of(&mut peer).await;
    assert!(kept, "before the outcome");
    assert!(matches!(outcome, Outcome::Failed(failure) if failure.message == "make ended with 2"));
    drop(peer);
    // It does not dial again, and has no deadline: not the build's, and not Finish's.
    tokio::time::sleep(Duration::from_hours(100)).await;
    assert!(fixture.dials.try_recv().is_err());
    assert!(!fixture.session.is_finished());
    assert!(matches!(ended.try_recv(), Err(mpsc::error::TryRecvError::Empty)), "it stays");
    fixture.session.abort();
}

/// A step that runs until it is ended, and then stays, as the engine has it.
async fn endless_step(work: Work, reporter: Reporter, cancel: CancellationToken) -> Outcome {
    let step = |state| Report::Event(Event::Step(Step { index: 4, name: "make".into(), state }));
    reporter.report(step(StepState::Started)).await;
    tokio::select! {
        () = work.end_step.cancelled() => {}
        () = cancel.cancelled() => return Outcome::Cancelled,
    }
    let end = StepEnd { exit_code: 137, duration_ms: 1, memory_peak_bytes: 0, oom_kills: 0 };
    reporter.report(step(StepState::Ended(end))).await;
    let mut failure = fail(FailureKind::StepFailed, "make ended with 137");
    failure.detail = Some("its last line".into());
    reporter.report(Report::Held(Box::new(failure))).await;
    std::future::pending().await
}

#[tokio::test(start_paused = true)]
async fn a_step_whose_time_is_over_is_ended_and_stays() {
    let mut fixture = start(endless_step);
    let mut peer = fixture.building(kept_job()).await;
    let (kept, outcome) = outcome_of(&mut peer).await;
    let failure = failure(outcome);
    assert!(kept);
    assert_eq!((failure.kind, failure.step), (FailureKind::TimedOut, Some(4)));
    assert!(failure.message.contains("in step 4 (`make`)"), "{}", failure.message);
    assert_eq!(failure.detail.as_deref(), Some("its last line"));
    fixture.session.abort();
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_step_does_not_stay() {
    let mut fixture = start(endless_step);
    let mut peer = fixture.building(kept_job()).await;
    // The step has begun.
    while !matches!(peer.next_event().await.event, Event::Step(_)) {}
    peer.send(HostToAgent::Cancel).await;
    assert_eq!(outcome_of(&mut peer).await, (false, Outcome::Cancelled));
    peer.finish(fixture).await;
}

#[tokio::test(start_paused = true)]
async fn a_step_that_does_not_end_when_its_time_is_over_goes_with_the_build() {
    let mut fixture = start(async |work: Work, reporter: Reporter, _| {
        let step = Step { index: 4, name: "make".into(), state: StepState::Started };
        reporter.report(Report::Event(Event::Step(step))).await;
        work.end_step.cancelled().await;
        std::future::pending().await
    });
    let mut peer = fixture.building(kept_job()).await;
    let begun = Instant::now();
    let (kept, outcome) = outcome_of(&mut peer).await;
    assert!(!kept && failure(outcome).kind == FailureKind::TimedOut);
    let limit = Duration::from_millis(job().limits.timeout_ms);
    assert!(begun.elapsed() <= limit + KEEP_GRACE + Duration::from_millis(50));
    peer.finish(fixture).await;
}

#[tokio::test(start_paused = true)]
async fn a_build_whose_time_is_over_between_steps_does_not_stay() {
    let mut fixture = start(async |_, _, cancel: CancellationToken| {
        cancel.cancelled().await;
        Outcome::Cancelled
    });
    let mut peer = fixture.building(kept_job()).await;
    let (kept, outcome) = outcome_of(&mut peer).await;
    assert!(!kept && failure(outcome).kind == FailureKind::TimedOut);
    peer.finish(fixture).await;
}
