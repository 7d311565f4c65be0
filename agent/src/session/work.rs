//! The work of a build: source, Dockerfile, engine. One task, which returns the outcome.

use std::borrow::Cow;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use cap_std::ambient_authority;
use cap_std::fs::Dir;
use kiln_protocol::event::{
    Event, Failure, FailureKind, Lockfile, Log, LogStream, Outcome, Phase, cut_text,
};
use kiln_protocol::job::{BuildJob, Dockerfile, Job, MAX_DOCKERFILE, Role};
use tokio_util::sync::CancellationToken;

use super::stop::Ending;
use crate::dockerfile::{self, Adapted, Asked};
use crate::engine::{Engine, Work};
use crate::events::{Report, Reporter};
use crate::secrets::Secrets;
use crate::source::{self, Feed, SourceLimits};

/// Where a job's files are. A build's lie on the scratch disk, neither inside the other.
#[derive(Clone, Debug)]
pub struct Places {
    /// The directory that the source is unpacked into: the build's context.
    pub source: PathBuf,
    /// Where a Dockerfile that came with the job is written.
    pub dockerfile: PathBuf,
    /// Where certificates for the steps go.
    pub certificates: PathBuf,
    /// Where secrets go while the build runs: memory, in a directory that is not there.
    pub secrets: PathBuf,
    /// An instance's.
    pub instance: crate::run::Places,
}

/// Runs a build from its source's first byte to its outcome.
pub async fn build<E: Engine>(
    engine: E,
    job: Job,
    places: Places,
    feed: Feed,
    reporter: Reporter,
    ending: Ending,
) -> Outcome {
    let Role::Build(build) = job.role else {
        return Outcome::Failed(fail(FailureKind::Internal, "the job is no build; report this"));
    };
    let limits =
        SourceLimits { bytes: job.limits.source_bytes, entries: job.limits.source_entries };
    reporter.report(Report::Event(Event::Phase(Phase::Unpacking))).await;
    let files = places.clone();
    let prepared = {
        let (dockerfile, cancel) = (build.dockerfile.clone(), ending.whole.clone());
        let (target, base_digest) = (build.target.clone(), build.base_digest.clone());
        let build_args = build.build_args.clone();
        tokio::task::spawn_blocking(move || {
            let asked = Asked {
                target: target.as_deref(),
                base_digest: base_digest.as_deref(),
                build_args: &build_args,
            };
            prepare(&places, feed, limits, &dockerfile, asked, &cancel)
        })
    };
    let Prepared { context, dockerfile, ignore_file, target, notes, lockfiles } =
        match prepared.await {
            Ok(Ok(ready)) => ready,
            Ok(Err(failure)) => return Outcome::Failed(failure),
            Err(error) => return Outcome::Failed(crashed(&error)),
        };
    for note in notes {
        reporter.report(Report::Event(Event::Log(own_line(&note)))).await;
    }
    let BuildJob {
        build_args,
        network,
        egress_ca,
        secrets,
        keep_failed,
        upstreams,
        dockerfile: _,
        target: _,
        base_digest: _,
    } = build;
    // They live as long as this.
    let secrets = match Secrets::fetch(secrets, &files.secrets, &reporter).await {
        Ok(secrets) => secrets,
        Err(failure) => return Outcome::Failed(failure),
    };
    reporter.report(Report::Event(Event::Phase(Phase::Building))).await;
    let certificates = match certificates(&egress_ca, &files) {
        Ok(certificates) => certificates,
        Err(failure) => return Outcome::Failed(failure),
    };
    let processes = job.limits.processes;
    let work = Work {
        context,
        dockerfile,
        ignore_file,
        target,
        keep_failed,
        end_step: ending.step,
        build_args,
        certificates,
        network,
        processes,
        upstreams,
        secrets: secrets.list().to_vec(),
    };
    let mut outcome = engine.run(work, reporter, ending.whole).await;
    if let Outcome::Built(built) = &mut outcome {
        built.lockfiles = lockfiles;
    }
    outcome
}

/// What a part of the agent that panicked leaves to say.
pub fn crashed(error: &tokio::task::JoinError) -> Failure {
    fail(FailureKind::Internal, format!("the agent's own work broke down: {error}; report this"))
}

/// A failure with a cause and a message, without a step.
pub fn fail(kind: FailureKind, message: impl AsRef<str>) -> Failure {
    let message = cut_text(message.as_ref());
    Failure { kind, message, step: None, exit_code: None, detail: None }
}

/// What the engine works on.
struct Prepared {
    context: PathBuf,
    dockerfile: PathBuf,
    ignore_file: Option<PathBuf>,
    /// The stage to build, as the engine names it.
    target: Option<String>,
    /// For the log.
    notes: Vec<String>,
    /// For the provenance.
    lockfiles: Vec<Lockfile>,
}

/// Unpacks the source and finds the Dockerfile. It blocks.
fn prepare(
    places: &Places,
    feed: Feed,
    limits: SourceLimits,
    dockerfile: &Dockerfile,
    asked: Asked<'_>,
    cancel: &CancellationToken,
) -> Result<Prepared, Failure> {
    let internal = |what: &Path, error: std::io::Error| {
        fail(FailureKind::Internal, format!("{} cannot be made: {error}", what.display()))
    };
    std::fs::create_dir_all(&places.source).map_err(|error| internal(&places.source, error))?;
    source::unpack(feed, &places.source, limits, &|| cancel.is_cancelled())
        .map_err(|error| fail(error.kind(), error.to_string()))?;
    let found = match dockerfile {
        Dockerfile::Inline(content) => {
            std::fs::write(&places.dockerfile, content)
                .map_err(|error| internal(&places.dockerfile, error))?;
            places.dockerfile.clone()
        }
        Dockerfile::InSource(path) => find(&places.source, path)?,
    };
    let content = std::fs::read(&found).map_err(|error| internal(&found, error))?;
    let adapted = adapt(&content, &places.source, asked)?;
    let mut ready = Prepared {
        context: places.source.clone(),
        ignore_file: own_ignore_file(&places.source, &found),
        dockerfile: found,
        target: adapted.target,
        notes: adapted.notes,
        lockfiles: source::lockfiles(&places.source),
    };
    if let Cow::Owned(text) = adapted.text {
        ready.dockerfile.clone_from(&places.dockerfile);
        std::fs::write(&places.dockerfile, text)
            .map_err(|error| internal(&places.dockerfile, error))?;
    }
    Ok(ready)
}

fn adapt<'a>(content: &'a [u8], source: &Path, asked: Asked<'_>) -> Result<Adapted<'a>, Failure> {
    let invalid = |problem: String| fail(FailureKind::DockerfileInvalid, problem);
    let text = std::str::from_utf8(content).map_err(|error| {
        let line = content[..=error.valid_up_to()].split(|byte| *byte == b'\n').count();
        invalid(format!("Dockerfile line {line}: it is not UTF-8"))
    })?;
    dockerfile::adapt(text, source, asked).map_err(|refused| {
        let kind = if refused.base {
            FailureKind::BaseDigestMismatch
        } else {
            FailureKind::DockerfileInvalid
        };
        fail(kind, refused.to_string())
    })
}

/// `app.Dockerfile.dockerignore` goes before `.dockerignore`, as Docker has it.
fn own_ignore_file(source: &Path, dockerfile: &Path) -> Option<PathBuf> {
    let mut name = dockerfile.file_name()?.to_owned();
    name.push(".dockerignore");
    let path = dockerfile.with_file_name(name);
    // A link could lead out of the source.
    let is_file = std::fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_file());
    (is_file && path.starts_with(source)).then_some(path)
}

/// The VM's public certificates and the operator's, in one file for the steps.
fn certificates(own: &[u8], files: &Places) -> Result<Option<PathBuf>, Failure> {
    if own.is_empty() {
        return Ok(None);
    }
    // A builder image without them has only the operator's.
    let mut all = std::fs::read(PUBLIC_CERTIFICATES).unwrap_or_default();
    all.push(b'\n');
    all.extend_from_slice(own);
    std::fs::write(&files.certificates, all).map_err(|error| {
        let file = files.certificates.display();
        fail(FailureKind::Internal, format!("{file} cannot be made: {error}"))
    })?;
    Ok(Some(files.certificates.clone()))
}

/// Of the builder image.
const PUBLIC_CERTIFICATES: &str = "/etc/ssl/certs/ca-certificates.crt";

fn own_line(text: &str) -> Log {
    Log { stream: LogStream::Kiln, step: None, partial: false, content: text.into() }
}

/// The path of the source's Dockerfile, with no link left in it: who opens it by path cannot be led
/// out of the source.
fn find(source: &Path, path: &str) -> Result<PathBuf, Failure> {
    let shown: String = path.chars().flat_map(char::escape_debug).collect();
    let missing = |why: &str| {
        let hint = "name another with -f, or add it to what is sent (see .dockerignore)";
        fail(FailureKind::DockerfileMissing, format!("the Dockerfile `{shown}` {why}; {hint}"))
    };
    let root = Dir::open_ambient_dir(source, ambient_authority()).map_err(|error| {
        fail(FailureKind::Internal, format!("the source cannot be read: {error}"))
    })?;
    // Not a FIFO and not a device: the source has none.
    let file = root.open(path).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory => {
            missing("is not in the source")
        }
        std::io::ErrorKind::PermissionDenied => missing("leads out of the source"),
        _ => missing(&format!("cannot be opened ({error})")),
    })?;
    let meta = file.metadata().map_err(|error| missing(&format!("cannot be read ({error})")))?;
    if !meta.is_file() {
        return Err(missing("is not a file"));
    }
    if meta.len() > MAX_DOCKERFILE as u64 {
        let message =
            format!("the Dockerfile `{shown}` is longer than {MAX_DOCKERFILE} bytes; shorten it");
        return Err(fail(FailureKind::DockerfileInvalid, message));
    }
    opened_path(&file).map_err(|error| missing(&format!("cannot be found ({error})")))
}

/// Where an open file is, without a link.
fn opened_path(file: &impl AsRawFd) -> std::io::Result<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn source() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("source/docker")).unwrap();
        std::fs::write(dir.path().join("outside"), "FROM evil").unwrap();
        std::fs::write(dir.path().join("source/docker/app"), "FROM scratch").unwrap();
        dir
    }

    fn find_in(dir: &tempfile::TempDir, path: &str) -> Result<PathBuf, (FailureKind, String)> {
        find(&dir.path().join("source"), path).map_err(|failure| (failure.kind, failure.message))
    }

    #[test]
    fn a_dockerfile_is_found_through_links_that_stay_inside() {
        let dir = source();
        symlink("docker/app", dir.path().join("source/Dockerfile")).unwrap();
        for path in ["docker/app", "./docker/app", "docker/../docker/app", "Dockerfile"] {
            assert_eq!(
                find_in(&dir, path).unwrap(),
                dir.path().join("source/docker/app"),
                "{path}"
            );
        }
    }

    #[test]
    fn a_dockerfile_that_is_missing_or_elsewhere_is_named() {
        let dir = source();
        symlink("../outside", dir.path().join("source/out")).unwrap();
        symlink("/etc/passwd", dir.path().join("source/abs")).unwrap();
        symlink("loop", dir.path().join("source/loop")).unwrap();
        for path in [
            "Dockerfile",
            "docker",
            "docker/app/x",
            "../outside",
            "/etc/passwd",
            "out",
            "abs",
            "loop",
            "",
            "a\u{1b}[2J",
        ] {
            let (kind, message) = find_in(&dir, path).unwrap_err();
            assert_eq!(kind, FailureKind::DockerfileMissing, "{path}: {message}");
            assert!(!message.contains('\u{1b}'), "{message:?}");
            assert!(path.contains('\u{1b}') || message.contains(&format!("`{path}`")), "{message}");
        }
    }

    #[test]
    fn a_dockerfiles_length_holds_at_its_limit_and_breaks_above() {
        let dir = source();
        let path = dir.path().join("source/Dockerfile");
        std::fs::write(&path, vec![b'#'; MAX_DOCKERFILE]).unwrap();
        find_in(&dir, "Dockerfile").unwrap();
        std::fs::write(&path, vec![b'#'; MAX_DOCKERFILE + 1]).unwrap();
        assert_eq!(find_in(&dir, "Dockerfile").unwrap_err().0, FailureKind::DockerfileInvalid);
    }
}
