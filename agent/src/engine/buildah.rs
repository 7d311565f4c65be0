//! buildah as the engine: one `build`, one `push`, each a process of its own.
//!
//! Everything that it starts (steps, their monitors) is below one cgroup, so that ending it leaves
//! nothing behind.

use std::convert::Infallible;
use std::ffi::OsString;
use std::future::pending;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Instant;

use kiln_protocol::event::{Built, Event, Outcome, Phase};
use kiln_protocol::event::{Failure, FailureKind};
use kiln_protocol::name;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use tokio::process::Command;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::files::{Files, GATEWAY};
use super::output::LastLines;
use super::parse::{self, Cause, Words};
use super::process::Process;
use super::{Engine, Work, command, failure};
use crate::events::{Report, Reporter};
use crate::exec::Enterable;
use crate::runtime::{self, Cgroup, CurrentStep, Server, Settings, StepRecord, StepSecret};
use crate::secrets::Secret;

/// Memory that is the agent's and the engine's own. A step may have the rest, but never less than
/// half of a small VM.
const RESERVED_MEMORY: u64 = 192 * 1024 * 1024;

/// buildah with its places. The default is how they are in the VM.
#[derive(Clone, Debug)]
pub struct Buildah {
    /// The program.
    pub program: PathBuf,
    /// The agent's binary under the name of the runtime's wrapper.
    pub wrapper: PathBuf,
    /// The runtime that the wrapper calls.
    pub runtime: PathBuf,
    /// Where wrappers reach the agent.
    pub socket: PathBuf,
    /// Images and working containers; not on an overlay.
    pub storage: PathBuf,
    /// The storage's state.
    pub run_root: PathBuf,
    /// Bundles, and blobs on their way.
    pub tmp: PathBuf,
    /// Where its configuration is written.
    pub files: PathBuf,
    /// The network namespace of steps.
    pub netns: PathBuf,
    /// Where the cgroup hierarchy (version 2) is mounted.
    pub cgroup_mount: PathBuf,
    /// The cgroup of the engine and its steps, from the hierarchy's root.
    pub cgroup: PathBuf,
    /// Copies of secrets that steps mount, in memory.
    pub mounted_secrets: PathBuf,
    /// What the built image is called in the storage.
    pub image: String,
    /// Where the built image goes, with its transport.
    pub destination: String,
    /// What sessions enter: the step that runs.
    pub enterable: Enterable,
    /// Its number.
    pub step: CurrentStep,
}

impl Default for Buildah {
    fn default() -> Self {
        let staging = format!("{}:{}", name::STAGING_REPOSITORY, name::STAGING_TAG);
        Self {
            program: "/usr/bin/buildah".into(),
            wrapper: Path::new("/run/kiln").join(runtime::WRAPPER_NAME),
            runtime: runtime::DEFAULT_PROGRAM.into(),
            socket: runtime::DEFAULT_SOCKET.into(),
            storage: "/var/lib/containers/storage".into(),
            run_root: "/run/containers/storage".into(),
            tmp: "/var/lib/containers/tmp".into(),
            files: "/run/kiln/engine".into(),
            netns: "/run/netns/steps".into(),
            cgroup_mount: "/sys/fs/cgroup".into(),
            cgroup: "/kiln".into(),
            mounted_secrets: "/run/kiln/secrets/mounted".into(),
            image: format!("{}/{staging}", name::REGISTRY),
            destination: format!("docker://{GATEWAY}/{staging}"),
            enterable: Enterable::default(),
            step: CurrentStep::default(),
        }
    }
}

/// buildah when all that every build needs is there.
#[derive(Debug)]
pub struct Prepared {
    buildah: Buildah,
    /// Listens for the runtime's wrappers.
    server: Server,
}

impl Engine for Prepared {
    async fn run(self, work: Work, reporter: Reporter, cancel: CancellationToken) -> Outcome {
        let Self { buildah, server } = self;
        let run = Run { buildah: &buildah, reporter: &reporter, last: LastLines::default() };
        let ended = tokio::select! {
            ended = run.build_and_push(&work, server) => Some(ended),
            () = cancel.cancelled() => None,
        };
        // Whatever happened, nothing of it runs on.
        buildah.whole_cgroup().kill();
        match ended {
            Some(Ok(built)) => Outcome::Built(built),
            Some(Err(failure)) => Outcome::Failed(*failure),
            None => Outcome::Cancelled,
        }
    }
}

impl Buildah {
    /// Makes what every build needs, before there is one. It blocks.
    pub fn prepare(self) -> io::Result<Prepared> {
        read_ahead(&self.program);
        std::fs::create_dir_all(&self.tmp)?;
        std::fs::create_dir_all(&self.storage)?;
        self.files().write(&self.storage, &self.run_root)?;
        self.engine_cgroup().make()?;
        self.whole_cgroup().count_memory_below()?;
        let server = Server::bind(&self.socket)?;
        Ok(Prepared { buildah: self, server })
    }

    fn files(&self) -> Files {
        Files::new(&self.files)
    }

    fn engine_cgroup(&self) -> Cgroup {
        Cgroup::new(&self.cgroup_mount, &self.cgroup.join("engine"))
    }

    fn whole_cgroup(&self) -> Cgroup {
        Cgroup::new(&self.cgroup_mount, &self.cgroup)
    }

    fn settings(&self, work: &Work, held: watch::Sender<Option<StepRecord>>) -> Settings {
        Settings {
            network: work.network,
            certificates: work.certificates.clone(),
            secrets: work.secrets.iter().map(step_secret).collect(),
            mounted_secrets: self.mounted_secrets.clone(),
            netns: self.netns.clone(),
            processes: work.processes,
            memory: std::fs::read_to_string("/proc/meminfo").ok().and_then(|m| step_memory(&m)),
            cgroup_mount: self.cgroup_mount.clone(),
            steps_cgroup: self.cgroup.join("steps"),
            enterable: self.enterable.clone(),
            current: self.step.clone(),
            keep_failed: work.keep_failed,
            end_step: work.end_step.clone(),
            held,
            scratch: self.storage.clone(),
        }
    }

    /// A process of buildah, in a process group of its own. Dropping it kills it.
    fn spawn(&self, files: &Files, args: &[OsString]) -> io::Result<Process> {
        let child = Command::new(&self.program)
            .args(args)
            .env_clear()
            .envs(command::environment(self, files))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()?;
        Process::new(child, self.engine_cgroup(), self.whole_cgroup())
    }

    /// What the engine calls itself. It takes a while to start, so this is asked while the image
    /// is pushed.
    async fn version(&self, files: &Files) -> String {
        let asked = Command::new(&self.program)
            .arg("--version")
            .env_clear()
            .envs(command::environment(self, files))
            .stdin(Stdio::null())
            .stderr(Stdio::null())
            .kill_on_drop(true)
            .output()
            .await;
        let text = asked.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
        version_of(&text.unwrap_or_default())
    }
}

/// One build on its way.
struct Run<'a> {
    buildah: &'a Buildah,
    reporter: &'a Reporter,
    last: LastLines,
}

type Ended<T> = Result<T, Box<Failure>>;

impl Run<'_> {
    async fn build_and_push(&self, work: &Work, server: Server) -> Ended<Built> {
        if tokio::fs::metadata(&work.dockerfile).await.is_err() {
            return Err(Box::new(missing_dockerfile(work)));
        }
        let files = self.buildah.files();
        self.build(&files, work, server).await?;
        self.push(&files).await
    }

    async fn build(&self, files: &Files, work: &Work, server: Server) -> Ended<()> {
        let buildah = self.buildah;
        files.lead_to(&work.upstreams).map_err(could_not("name the registries to the engine"))?;
        let begun = Instant::now();
        let engine = buildah
            .spawn(files, &command::build(buildah, files, work))
            .map_err(could_not("start the build engine"))?;
        self.reporter.report(Report::EngineStarted { spawn: begun.elapsed() }).await;

        let stop = CancellationToken::new();
        let engine = async {
            let status = engine.finish(self.reporter, &self.last).await;
            stop.cancel();
            status
        };
        let (held, failed) = watch::channel(None);
        let steps = server.run(buildah.settings(work, held), self.reporter.clone(), stop.clone());
        let both = async { tokio::join!(engine, steps) };
        let (status, steps) = tokio::select! {
            done = both => done,
            never = self.stays(failed) => match never {},
        };
        let status = status.map_err(could_not("wait for the build engine"))?;
        if !status.success() {
            return Err(Box::new(self.build_failure(status, &steps, &work.upstreams)));
        }
        match self.last.passed_over() {
            Some(instruction) => {
                let cause = parse::not_built(&instruction);
                Err(Box::new(failure::failure(cause, self.last.text())))
            }
            None => Ok(()),
        }
    }

    /// Once a failed step stays: tells that the build has failed. The engine waits for the step's end, which does
    /// not come.
    async fn stays(&self, mut failed: watch::Receiver<Option<StepRecord>>) -> Infallible {
        let record = failed.wait_for(Option::is_some).await.ok().and_then(|record| record.clone());
        if let Some(record) = record {
            let failure = failure::of_step(&record, self.last.text());
            self.reporter.report(Report::Held(Box::new(failure))).await;
        }
        pending().await
    }

    fn build_failure(
        &self,
        status: ExitStatus,
        steps: &[StepRecord],
        upstreams: &[String],
    ) -> Failure {
        let words = Words { stderr: &self.last.stderr(), upstreams };
        failure::of_build(status, steps, self.oom_kills(), words, self.last.text())
    }

    /// Of the engine's own processes, since the VM's start.
    fn oom_kills(&self) -> u32 {
        self.buildah.engine_cgroup().usage().oom_kills
    }

    async fn push(&self, files: &Files) -> Ended<Built> {
        let buildah = self.buildah;
        self.reporter.report(Report::Event(Event::Phase(Phase::Pushing))).await;
        let digest_file = buildah.files.join("digest");
        let engine = buildah
            .spawn(files, &command::push(buildah, files, &digest_file))
            .map_err(could_not("start the build engine to push"))?;
        let (status, engine) =
            tokio::join!(engine.finish(self.reporter, &self.last), buildah.version(files));
        let status = status.map_err(could_not("wait for the push"))?;
        if !status.success() {
            let (stderr, text) = (self.last.stderr(), self.last.text());
            return Err(Box::new(failure::of_push(status, self.oom_kills(), &stderr, text)));
        }
        let digest = tokio::fs::read_to_string(&digest_file)
            .await
            .map_err(could_not("read the digest of the pushed image"))?;
        Ok(Built { digest: checked_digest(digest.trim())?, engine, lockfiles: Vec::new() })
    }
}

/// Has a program read from the disk before it is needed. Nobody waits for it.
fn read_ahead(program: &Path) {
    let program = program.to_owned();
    std::thread::spawn(move || {
        let file = std::fs::File::open(program)?;
        posix_fadvise(&file, 0, 0, PosixFadviseAdvice::POSIX_FADV_WILLNEED)?;
        Ok::<_, io::Error>(())
    });
}

fn step_secret(secret: &Secret) -> StepSecret {
    let Secret { id: _, file, placeholder: _, marker, variable } = secret.clone();
    StepSecret { marker, file, variable }
}

fn missing_dockerfile(work: &Work) -> Failure {
    // Outside, the path is known relative to the source.
    let path = work.dockerfile.strip_prefix(&work.context).unwrap_or(&work.dockerfile);
    let message =
        format!("the source has no {}: name the Dockerfile if it is elsewhere", path.display());
    failure::failure(Cause { kind: FailureKind::DockerfileMissing, message }, String::new())
}

fn could_not(action: &'static str) -> impl FnOnce(io::Error) -> Box<Failure> {
    move |error| Box::new(failure::internal(format!("the agent could not {action}: {error}")))
}

fn checked_digest(digest: &str) -> Ended<String> {
    let hex = digest.strip_prefix("sha256:").unwrap_or_default();
    if hex.len() == 64 && hex.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)) {
        Ok(digest.to_owned())
    } else {
        let message = "the build engine pushed the image but gave no digest of it".to_owned();
        Err(Box::new(failure::internal(message)))
    }
}

/// `buildah version 1.39.3 (image-spec …)` as `buildah 1.39.3`.
fn version_of(text: &str) -> String {
    let version = text.split_whitespace().nth(2).filter(|word| word.len() <= 64);
    version.map_or_else(|| "buildah".to_owned(), |version| format!("buildah {version}"))
}

/// How much memory a step may have, by `/proc/meminfo`.
pub fn step_memory(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    let total = kib.checked_mul(1024)?;
    Some(total.saturating_sub(RESERVED_MEMORY).max(total / 2))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::events::channel;
    use kiln_protocol::job::StepNetwork;
    use std::os::unix::fs::PermissionsExt as _;
    use tokio::sync::mpsc;

    const DIGEST: &str = "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

    /// An engine whose program is a script: `$verb` is `build`, `push` or `--version`, `$digest`
    /// the file for the digest, `$here` a directory of the test's.
    struct Bench {
        directory: tempfile::TempDir,
        buildah: Buildah,
    }

    impl Bench {
        fn new(script: &str) -> Self {
            let directory = tempfile::tempdir().unwrap();
            let here = directory.path().to_owned();
            let program = here.join("buildah");
            let head = format!(
                "#!/bin/sh\nhere={}\nfor arg; do case $arg in build|push|--version) verb=$arg;; \
                 --digestfile=*) digest=${{arg#*=}};; esac; done\n",
                here.display()
            );
            std::fs::write(&program, head + script).unwrap();
            std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
            std::fs::create_dir(here.join("context")).unwrap();
            std::fs::write(here.join("context/Dockerfile"), "FROM scratch").unwrap();
            let buildah = Buildah {
                program,
                socket: here.join("socket"),
                storage: here.join("storage"),
                run_root: here.join("run"),
                tmp: here.join("tmp"),
                files: here.join("files"),
                cgroup_mount: here.join("cgroup"),
                ..Buildah::default()
            };
            Self { directory, buildah }
        }

        fn work(&self) -> Work {
            let context = self.directory.path().join("context");
            Work {
                dockerfile: context.join("Dockerfile"),
                context,
                ignore_file: None,
                certificates: None,
                target: None,
                build_args: vec![("TOKEN".into(), "hunter2".into())],
                network: StepNetwork::None,
                processes: 9,
                upstreams: vec![],
                secrets: vec![],
                keep_failed: false,
                end_step: CancellationToken::new(),
            }
        }

        async fn run(&self) -> (Outcome, Vec<Report>) {
            let (reporter, reports) = channel();
            let engine = self.buildah.clone().prepare().unwrap();
            let run = engine.run(self.work(), reporter, CancellationToken::new());
            tokio::join!(run, all(reports))
        }
    }

    async fn all(mut reports: mpsc::Receiver<Report>) -> Vec<Report> {
        let mut seen = vec![];
        while let Some(report) = reports.recv().await {
            seen.push(report);
        }
        seen
    }

    fn failure(outcome: Outcome) -> Failure {
        match outcome {
            Outcome::Failed(failure) => failure,
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn an_image_that_was_built_is_pushed_and_named_by_its_digest() {
        let bench = Bench::new(&format!(
            "case $verb in build) echo STEP 1/1: FROM scratch;; push) printf {DIGEST} > $digest;; \
             *) echo buildah version 1.39.3 '(image-spec 1.1.0, runtime-spec 1.2.0)';; esac"
        ));
        let (outcome, reports) = bench.run().await;
        let engine = "buildah 1.39.3".to_owned();
        assert_eq!(
            outcome,
            Outcome::Built(Built { digest: DIGEST.into(), engine, lockfiles: vec![] })
        );
        let kinds: Vec<_> = reports.iter().map(|report| format!("{report:?}")).collect();
        assert!(kinds[0].starts_with("EngineStarted"), "{}", kinds[0]);
        assert!(kinds[1].starts_with("Event(Log("), "{}", kinds[1]);
        assert_eq!(kinds[2], "Event(Phase(Pushing))");
    }

    #[tokio::test]
    async fn what_the_engine_says_names_the_cause_but_no_build_argument() {
        let bench = Bench::new(
            "echo \"Error: building at STEP \\\"FOO \\\": Build error: Unknown instruction: \\\"FOO\\\" \
             &imagebuilder.Step{Env:[]string{\\\"TOKEN=hunter2\\\"}}\" >&2; exit 125",
        );
        let (outcome, reports) = bench.run().await;
        let failure = failure(outcome);
        assert_eq!(failure.kind, FailureKind::DockerfileInvalid);
        assert_eq!(failure.message, "unknown instruction \"FOO\"");
        let events: String = reports
            .iter()
            .filter_map(|report| match report {
                Report::Event(Event::Log(log)) => {
                    Some(String::from_utf8_lossy(&log.content).into_owned())
                }
                _ => None,
            })
            .collect();
        assert!(events.contains("Unknown instruction") && !events.contains("hunter2"));
        assert!(!format!("{failure:?}").contains("hunter2"));
    }

    #[tokio::test]
    async fn an_engine_that_dies_or_lies_is_found_out() {
        let killed = failure(Bench::new("kill -KILL $$").run().await.0);
        assert_eq!(killed.kind, FailureKind::EngineCrashed);
        let push = "[ $verb = push ] && { echo 'Error: pushing image \"a\" to \"b\": no' >&2; exit 125; }; :";
        let refused = failure(Bench::new(push).run().await.0);
        assert_eq!(refused.kind, FailureKind::PushFailed);
        let lied = failure(Bench::new("[ $verb = push ] && echo x > $digest; :").run().await.0);
        assert_eq!(lied.kind, FailureKind::Internal);
        let mut absent = Bench::new("");
        absent.buildah.program = "/nonexistent/buildah".into();
        assert_eq!(failure(absent.run().await.0).kind, FailureKind::Internal);
    }

    #[tokio::test]
    async fn what_a_bases_onbuild_leaves_out_is_not_pushed() {
        let bench = Bench::new(
            "case $verb in build) echo 'STEP 2/9: COPY --exclude=*.md . /b'; seq 50;; push) exit 1;; esac",
        );
        let failure = failure(bench.run().await.0);
        assert_eq!(failure.kind, FailureKind::DockerfileInvalid);
        let expected =
            "COPY --exclude=*.md . /b: an ONBUILD of the base, and --exclude is not supported";
        assert_eq!(failure.message, expected);
    }

    #[tokio::test]
    async fn a_missing_dockerfile_is_named_as_the_source_knows_it() {
        let bench = Bench::new("");
        std::fs::remove_file(bench.directory.path().join("context/Dockerfile")).unwrap();
        let failure = failure(bench.run().await.0);
        assert_eq!(failure.kind, FailureKind::DockerfileMissing);
        assert!(
            failure.message.starts_with("the source has no Dockerfile:"),
            "{}",
            failure.message
        );
    }

    #[tokio::test]
    async fn a_cancelled_engine_is_killed_with_its_children() {
        let bench =
            Bench::new("exec 3>$here/alive; sh -c 'echo ready; read forever < /dev/zero' & wait");
        let alive = bench.directory.path().join("alive");
        nix::unistd::mkfifo(&alive, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let pipe = tokio::net::unix::pipe::OpenOptions::new().open_receiver(&alive).unwrap();
        let cancel = CancellationToken::new();
        let (reporter, mut reports) = channel();
        let engine = bench.buildah.clone().prepare().unwrap();
        let run = engine.run(bench.work(), reporter, cancel.clone());
        let cancelling = async {
            while let Some(report) = reports.recv().await {
                if matches!(&report, Report::Event(Event::Log(log)) if log.content == b"ready") {
                    cancel.cancel();
                }
            }
        };
        let (outcome, ()) = tokio::join!(run, cancelling);
        assert_eq!(outcome, Outcome::Cancelled);
        // Both held the write end of this pipe: it ends when both are dead.
        pipe.readable().await.unwrap();
        let ended = pipe.try_read(&mut [0]).unwrap();
        assert_eq!(ended, 0);
        let kill = bench.directory.path().join("cgroup/kiln/cgroup.kill");
        assert_eq!(std::fs::read_to_string(kill).unwrap(), "1");
    }

    #[test]
    fn versions_and_digests_are_checked() {
        assert_eq!(version_of("buildah version 1.39.3 (image-spec 1.1.0)"), "buildah 1.39.3");
        assert_eq!(version_of(""), "buildah");
        assert_eq!(version_of(&format!("buildah version {}", "9".repeat(65))), "buildah");
        assert!(checked_digest(DIGEST).is_ok());
        for bad in ["", "sha256:", &DIGEST[..70], &DIGEST.to_uppercase(), "sha512:00"] {
            assert!(checked_digest(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_step_leaves_memory_for_the_engine() {
        let of = |mib: u64| step_memory(&format!("MemTotal: {} kB\nMemFree: 1 kB\n", mib * 1024));
        assert_eq!(of(2048), Some((2048 - 192) << 20));
        assert_eq!(of(256), Some(128 << 20));
        assert_eq!(step_memory("nonsense"), None);
    }
}
