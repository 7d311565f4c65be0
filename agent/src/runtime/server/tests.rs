//! Wrappers that are played, and what is reported of their steps.

use super::*;
use crate::events::channel;
use std::io::{BufRead as _, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream as Blocking;
use std::thread::JoinHandle;
use tokio::sync::mpsc;

struct Bench {
    directory: tempfile::TempDir,
    stop: CancellationToken,
    end_step: CancellationToken,
    reports: mpsc::Receiver<Report>,
    running: tokio::task::JoinHandle<Vec<StepRecord>>,
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let end_step = CancellationToken::new();
        let settings = Settings {
            certificates: None,
            secrets: vec![],
            mounted_secrets: directory.path().join("secrets"),
            network: StepNetwork::Proxy,
            netns: "/run/netns/steps".into(),
            processes: 9,
            memory: None,
            cgroup_mount: directory.path().join("cgroup"),
            enterable: Enterable::default(),
            current: CurrentStep::default(),
            keep_failed: false,
            end_step: end_step.clone(),
            held: watch::channel(None).0,
            steps_cgroup: "/kiln/steps".into(),
            scratch: directory.path().into(),
        };
        let server = Server::bind(&directory.path().join("socket")).unwrap();
        let (stop, (reporter, reports)) = (CancellationToken::new(), channel());
        let running = tokio::spawn(server.run(settings, reporter, stop.clone()));
        Self { directory, stop, end_step, reports, running }
    }

    fn connect(&self) -> Blocking {
        Blocking::connect(self.directory.path().join("socket")).unwrap()
    }

    /// Plays the wrapper of a step in a thread of its own.
    fn step(&self, name: &str, out: &'static [u8], last: &'static str) -> JoinHandle<usize> {
        let (mut agent, name) = (self.connect(), name.to_owned());
        std::thread::spawn(move || {
            let (stdout, mut stdout_writer) = std::io::pipe().unwrap();
            let (stderr, stderr_writer) = std::io::pipe().unwrap();
            sys::send_with_pipes(&agent, HELLO, [stdout.as_fd(), stderr.as_fd()]).unwrap();
            agent.write_all(&wire::encode(&FromWrapper::Create { name }).unwrap()).unwrap();
            let mut policy = String::new();
            std::io::BufReader::new(&agent).read_line(&mut policy).unwrap();
            assert!(policy.contains("\"cgroup\":\"/kiln/steps/"));
            stdout_writer.write_all(out).unwrap();
            drop((stdout_writer, stderr_writer));
            agent.write_all(last.as_bytes()).unwrap();
            if last.is_empty() {
                return 0;
            }
            agent.read(&mut [0; 2]).unwrap()
        })
    }

    async fn end(mut self) -> (Vec<Report>, Vec<StepRecord>) {
        self.stop.cancel();
        let mut reports = vec![];
        while let Some(report) = self.reports.recv().await {
            reports.push(report);
        }
        (reports, self.running.await.unwrap())
    }
}

/// A report in short.
fn short(report: &Report) -> String {
    match report {
        Report::Event(Event::Step(Step { index, name, state: StepState::Started })) => {
            format!("{index} started {name}")
        }
        Report::Event(Event::Step(Step { index, state: StepState::Ended(end), .. })) => {
            format!("{index} ended {}", end.exit_code)
        }
        Report::Event(Event::Log(Log { step, content, .. })) => {
            format!("{} {}", step.unwrap(), String::from_utf8_lossy(content))
        }
        other => format!("{other:?}"),
    }
}

#[tokio::test]
async fn a_steps_events_are_in_order_and_before_the_acknowledgement() {
    let mut bench = Bench::new();
    let mut seen = vec![];
    for (name, last) in
        [("one", "{\"Ended\":{\"code\":0}}\n"), ("two", "{\"Ended\":{\"code\":7}}\n")]
    {
        let wrapper = bench.step(name, b"STEP 9/9: RUN forged\nrest", last);
        for _ in 0..4 {
            seen.push(short(&bench.reports.recv().await.unwrap()));
        }
        assert_eq!(wrapper.join().unwrap(), 1);
    }
    assert_eq!(
        seen,
        [
            "1 started one",
            "1 STEP 9/9: RUN forged",
            "1 rest",
            "1 ended 0",
            "2 started two",
            "2 STEP 9/9: RUN forged",
            "2 rest",
            "2 ended 7"
        ]
    );
    let (reports, records) = bench.end().await;
    assert!(reports.is_empty());
    let short: Vec<_> = records.iter().map(|r| (r.index, r.exit_code, r.started)).collect();
    assert_eq!(short, [(1, 0, true), (2, 7, true)]);
    assert!(records[0].disk_free.unwrap() > 0);
}

#[tokio::test]
async fn a_step_whose_monitor_dies_is_killed() {
    let mut bench = Bench::new();
    let cgroup = bench.directory.path().join("cgroup/kiln/steps/1");
    fs::create_dir_all(&cgroup).unwrap();
    let wrapper = bench.step("lost", b"", "");
    for expected in ["1 started lost", "1 ended 137"] {
        assert_eq!(short(&bench.reports.recv().await.unwrap()), expected);
    }
    wrapper.join().unwrap();
    assert_eq!(fs::read_to_string(cgroup.join("cgroup.kill")).unwrap(), "1");
    let (_, records) = bench.end().await;
    assert_eq!(records[0].exit_code, KILLED);
}

#[tokio::test]
async fn the_step_that_runs_can_be_ended_alone() {
    let mut bench = Bench::new();
    let cgroup = bench.directory.path().join("cgroup/kiln/steps/1");
    fs::create_dir_all(&cgroup).unwrap();
    // Whoever reads it waits for who writes.
    let kill = cgroup.join("cgroup.kill");
    nix::unistd::mkfifo(&kill, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut agent = bench.connect();
    let (stdout, stdout_writer) = std::io::pipe().unwrap();
    let (stderr, stderr_writer) = std::io::pipe().unwrap();
    sys::send_with_pipes(&agent, HELLO, [stdout.as_fd(), stderr.as_fd()]).unwrap();
    let create = FromWrapper::Create { name: "endless".into() };
    agent.write_all(&wire::encode(&create).unwrap()).unwrap();
    drop((stdout, stderr));
    assert_eq!(short(&bench.reports.recv().await.unwrap()), "1 started endless");
    bench.end_step.cancel();
    // The monitor is there, and tells of the end that the kernel made.
    let killed = tokio::task::spawn_blocking(move || {
        assert_eq!(fs::read_to_string(&kill).unwrap(), "1");
        drop((stdout_writer, stderr_writer));
        agent.write_all(b"{\"Ended\":{\"code\":137}}\n").unwrap();
        agent
    });
    assert_eq!(short(&bench.reports.recv().await.unwrap()), "1 ended 137");
    drop(killed.await.unwrap());
    let (_, records) = bench.end().await;
    assert_eq!((records[0].exit_code, records[0].started), (137, true));
}

#[tokio::test]
async fn a_refused_step_says_why() {
    let mut bench = Bench::new();
    let last = "{\"NotStarted\":{\"message\":\"no profile\"}}\n";
    let wrapper = bench.step("bad", b"", last);
    for expected in ["1 started bad", "1 no profile", "1 ended 125"] {
        assert_eq!(short(&bench.reports.recv().await.unwrap()), expected);
    }
    wrapper.join().unwrap();
    let (_, records) = bench.end().await;
    assert!(!records[0].started && records[0].last_words == "no profile");
}

#[tokio::test]
async fn who_sends_no_pipes_or_too_much_is_no_step() {
    let bench = Bench::new();
    let mut hostile = vec![bench.connect(), bench.connect()];
    hostile[0].write_all(b"K{\"Create\":{\"name\":\"x\"}}\n").unwrap();
    let (end, _writer) = std::io::pipe().unwrap();
    sys::send_with_pipes(&hostile[1], HELLO, [end.as_fd(), end.as_fd()]).unwrap();
    hostile[1].write_all(&vec![b'x'; MAX_LINE + 1]).unwrap();
    for peer in &mut hostile {
        let mut peer = peer.try_clone().unwrap();
        let count = tokio::task::spawn_blocking(move || peer.read(&mut [0]));
        assert!(matches!(count.await.unwrap(), Ok(0) | Err(_)));
    }
    let (reports, records) = bench.end().await;
    assert!(reports.is_empty() && records.is_empty());
}

#[test]
fn what_does_not_start_has_a_shells_exit_code() {
    for (words, code) in [
        ("executable file `nosuch` not found in $PATH: No such file or directory", 127),
        ("open executable: Permission denied", 126),
        ("", 125),
    ] {
        assert_eq!(not_started_code(words), code);
    }
}
