//! Containers whose runtime is a script.

use std::os::unix::fs::PermissionsExt;

use kiln_protocol::event::Log;
use tokio::sync::mpsc;

use super::*;
use crate::events::channel;

/// A container whose runtime is a script: `$here` is a directory of the test's, `started` and `failed` say it as
/// the container's first process.
struct Bench {
    directory: tempfile::TempDir,
    places: Places,
}

impl Bench {
    fn new(script: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let here = directory.path().to_owned();
        let program = here.join("crun");
        let head = format!(
            "#!/bin/sh\nhere={}\nstarted() {{ echo $$ > $here/pid; printf 'S\\0\\0\\0\\0' >&0; }}\n\
             failed() {{ printf \"N\\\\0\\\\0\\\\0\\\\$1\" >&0; }}\n",
            here.display()
        );
        fs::write(&program, head + script).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
        let cgroup_mount = here.join("cgroup");
        fs::create_dir_all(cgroup_mount.join("kiln/instance")).unwrap();
        let places = Places { program, files: here, cgroup_mount, ..Places::default() };
        Self { directory, places }
    }

    fn start(
        self,
    ) -> (tokio::task::JoinHandle<anyhow::Result<Ended>>, mpsc::Receiver<Report>, CancellationToken)
    {
        let (reporter, reports) = channel();
        let cancel = CancellationToken::new();
        let token = cancel.clone();
        let task = tokio::spawn(async move {
            let container = Container::new(&self.places, Signal::SIGTERM as u8);
            let ended = container.run(&reporter, &token).await;
            drop(self.directory);
            ended
        });
        (task, reports, cancel)
    }

    async fn run(self) -> (anyhow::Result<Ended>, Vec<Event>) {
        let (task, mut reports, _cancel) = self.start();
        let mut events = vec![];
        while let Some(Report::Event(event)) = reports.recv().await {
            events.push(event);
        }
        (task.await.unwrap(), events)
    }
}

fn exited(code: u8) -> Ended {
    Ended::Exited { code, oom_kills: 0 }
}

fn said(events: &[Event], wanted: LogStream) -> Vec<(String, bool)> {
    let text = |log: &Log| (String::from_utf8_lossy(&log.content).into_owned(), log.partial);
    let logs = events.iter().filter_map(|event| match event {
        Event::Log(log) if log.stream == wanted => Some(text(log)),
        _ => None,
    });
    logs.collect()
}

#[tokio::test]
async fn what_it_says_and_how_it_ends_is_told() {
    let bench = Bench::new("started; echo out; echo err >&2; printf tail; exit 7");
    let (ended, events) = bench.run().await;
    assert_eq!(ended.unwrap(), exited(7));
    assert_eq!(events[0], Event::Phase(Phase::Running), "{events:?}");
    let line = |text: &str, partial| (text.to_owned(), partial);
    assert_eq!(said(&events, LogStream::Stdout), [line("out", false), line("tail", true)]);
    assert_eq!(said(&events, LogStream::Stderr), [line("err", false)]);
}

#[tokio::test]
async fn a_program_that_is_not_there_or_not_executable_has_its_code() {
    for (errno, expected) in [("002", 127), ("024", 127), ("015", 126), ("010", 126)] {
        let (ended, events) = Bench::new(&format!("failed {errno}; exit 127")).run().await;
        match ended.unwrap() {
            Ended::NotStarted { code, why } => {
                assert_eq!(code, expected, "{errno}");
                assert!(!why.is_empty());
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(events, []);
    }
}

#[tokio::test]
async fn a_runtime_that_gives_up_is_quoted() {
    let script = "echo first > $here/crun.log; echo why >> $here/crun.log; exit 1";
    let (ended, _) = Bench::new(script).run().await;
    let error = ended.unwrap_err().to_string();
    assert!(error.contains("gave up (exit status: 1): why"), "{error}");
}

#[tokio::test]
async fn a_stop_is_a_signal_first() {
    let script = "trap 'echo bye; exit 3' TERM; started; echo up; while :; do sleep 0.01; done";
    let (task, mut reports, cancel) = Bench::new(script).start();
    loop {
        match reports.recv().await.unwrap() {
            Report::Event(Event::Log(log)) if log.content == b"up" => break,
            _ => {}
        }
    }
    cancel.cancel();
    let mut bye = false;
    while let Some(report) = reports.recv().await {
        bye |= matches!(report, Report::Event(Event::Log(log)) if log.content == b"bye");
    }
    assert!(bye);
    assert_eq!(task.await.unwrap().unwrap(), exited(3));
}

#[tokio::test]
async fn before_its_program_runs_there_is_nothing_to_be_gentle_with() {
    let (task, _reports, cancel) = Bench::new("exec sleep 1000").start();
    cancel.cancel();
    assert_eq!(task.await.unwrap().unwrap(), Ended::Stopped);
}

#[tokio::test]
async fn a_signal_that_ends_it_and_lost_memory_are_told() {
    let script = "started; mkdir -p $here/cgroup/kiln/instance; \
                  echo oom_kill 2 > $here/cgroup/kiln/instance/memory.events; kill -9 $$";
    let (ended, _) = Bench::new(script).run().await;
    assert_eq!(ended.unwrap(), Ended::Exited { code: 137, oom_kills: 2 });
}
