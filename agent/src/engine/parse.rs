//! What buildah's last words mean. Pure; it names a cause and decides nothing else.
//!
//! What a step prints does not come here: it has pipes of its own.

use kiln_protocol::event::FailureKind;
use kiln_protocol::name;

/// A cause and its words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cause {
    /// For programs.
    pub kind: FailureKind,
    /// For people.
    pub message: String,
}

impl Cause {
    fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }
}

/// What a failed build is judged by.
#[derive(Clone, Copy, Default)]
pub struct Words<'a> {
    /// The engine's last lines on stderr.
    pub stderr: &'a [String],
    /// The registries that the gateway leads to.
    pub upstreams: &'a [String],
}

/// The cause of a failed `buildah build`, by its last lines on stderr.
pub fn build_failure(words: Words<'_>) -> Option<Cause> {
    let Words { stderr, upstreams } = words;
    if let Some(cause) = crash(stderr).or_else(|| disk_full(stderr)) {
        return Some(cause);
    }
    let error = error_text(stderr)?;
    let error = error.as_str();
    let invalid = |message: &str| Some(Cause::new(FailureKind::DockerfileInvalid, message));

    if let Some(problem) = error.strip_prefix("parsing main Dockerfile: ") {
        // The path of the file is the VM's and means nothing outside.
        let problem = problem.split_once(": ").map_or(problem, |(_path, problem)| problem);
        return invalid(&format!("the Dockerfile could not be parsed: {problem}"));
    }
    if error.starts_with("no contents in ") {
        return invalid("the Dockerfile is empty");
    }
    if error.starts_with("no FROM statement found") || error == "building: no stages to build" {
        return invalid("the Dockerfile has no FROM");
    }
    if let Some(rest) = error.strip_prefix("The target \"") {
        let target = rest.split('"').next().unwrap_or(rest);
        return invalid(&format!("the Dockerfile has no stage \"{target}\""));
    }
    if let Some(cause) = pull_failure(error, upstreams) {
        return Some(cause);
    }
    if let Some((instruction, problem)) = unresolved(error) {
        return invalid(&format!("{instruction}: {problem}"));
    }
    if let Some((instruction, problem)) = at_step(error) {
        if let Some((_, rest)) = problem.split_once("no secret with id \"") {
            let id = rest.split('"').next().unwrap_or(rest);
            let message = format!("{instruction}: the build has no secret \"{id}\"");
            return Some(Cause::new(FailureKind::SecretMissing, message));
        }
        // `from=IMAGE,target=/x from=IMAGE: no stage or image found with that name`, of a mount.
        if let Some((mount, problem)) = problem.rsplit_once(": ")
            && problem.starts_with(NO_STAGE)
            && let Some((_, image)) = mount.rsplit_once(" from=")
        {
            return Some(pull(image, problem, upstreams));
        }
        if let Some((_, unknown)) = problem.split_once("Unknown instruction: ") {
            return invalid(&format!("unknown instruction {}", unknown.trim()));
        }
        if instruction.to_ascii_uppercase().starts_with("ADD ") && problem.contains("dial tcp") {
            return invalid(&format!(
                "{instruction}: ADD of an address is not supported yet: fetch it in a RUN, which has the proxy"
            ));
        }
        // A RUN that fails is known by its step; here it is the engine's own trouble with it.
        if !instruction.to_ascii_uppercase().starts_with("RUN ") {
            return invalid(&format!("{instruction}: {problem}"));
        }
    }
    Some(Cause::new(FailureKind::Internal, format!("the build engine failed: {error}")))
}

/// The instruction in a line such as `[1/2] STEP 3/5: COPY --exclude=*.md a /b`, where it has what the engine passes over
/// in silence. No Dockerfile that it gets has that: it is of an `ONBUILD` that came with a base.
pub fn passed_over(line: &str) -> Option<&str> {
    let stage = line.strip_prefix('[').and_then(|rest| rest.split_once("] "));
    let line = stage.map_or(line, |(_, rest)| rest);
    let (_, instruction) = line.strip_prefix("STEP ")?.split_once(": ")?;
    let (keyword, rest) = instruction.split_once([' ', '\t'])?;
    let copies = ["ADD", "COPY"].iter().any(|known| known.eq_ignore_ascii_case(keyword));
    let mut flags = rest.split_ascii_whitespace().take_while(|word| word.starts_with("--"));
    let excludes = flags.any(|flag| flag.to_ascii_lowercase().starts_with("--exclude"));
    (copies && excludes).then_some(instruction)
}

/// What to say of an instruction that was passed over.
pub fn not_built(instruction: &str) -> Cause {
    let message = format!("{instruction}: an ONBUILD of the base, and --exclude is not supported");
    Cause::new(FailureKind::DockerfileInvalid, message)
}

/// The cause of a failed `buildah push`, by its last lines on stderr.
pub fn push_failure(stderr: &[String]) -> Cause {
    if let Some(cause) = crash(stderr).or_else(|| disk_full(stderr)) {
        return cause;
    }
    let error = error_text(stderr).unwrap_or_default();
    // `pushing image "A" to "B": problem`
    let problem = error.strip_prefix("pushing image ").and_then(|rest| rest.split_once("\": "));
    let problem = problem.map_or(error.as_str(), |(_, problem)| problem);
    Cause::new(FailureKind::PushFailed, format!("the image could not be pushed: {problem}"))
}

/// The text after the last `Error: `, with the lines that belong to it.
fn error_text(stderr: &[String]) -> Option<String> {
    let start = stderr.iter().rposition(|line| line.starts_with("Error: "))?;
    let text = stderr[start..].join("\n");
    Some(text["Error: ".len()..].trim_end().to_owned())
}

/// `resolving step {Value:copy … Original:COPY x /y Flags:[] StartLine:3 EndLine:3}: problem`
fn unresolved(error: &str) -> Option<(&str, &str)> {
    let (node, problem) = error.strip_prefix("resolving step {")?.split_once("}: ")?;
    let (_, original) = node.split_once(" Original:")?;
    let (instruction, _) = original.rsplit_once(" Flags:")?;
    Some((instruction, problem))
}

/// `building at STEP "COPY x /y": problem`
fn at_step(error: &str) -> Option<(&str, &str)> {
    let rest = error.strip_prefix("building at STEP \"")?;
    rest.split_once("\": ")
}

fn pull_failure(error: &str, upstreams: &[String]) -> Option<Cause> {
    let pull = |image: &str, problem: &str| pull(image, problem, upstreams);
    let creating = error.strip_prefix("creating build container: ");
    if let Some(problem) = creating
        && let Some(rest) = problem.strip_prefix("parsing reference \"")
    {
        let name = rest.split('"').next().unwrap_or(rest);
        let message = format!("\"{name}\" is not an image's name");
        return Some(Cause::new(FailureKind::DockerfileInvalid, message));
    }
    if let Some(rest) = error.strip_prefix("COPY --from=")
        && let Some((name, problem)) = rest.split_once(": ")
    {
        return Some(pull(name, problem));
    }
    if let Some((_, rest)) = error.split_once("docker://")
        && let Some((image, problem)) = rest.split_once(": ")
    {
        return Some(pull(image, problem));
    }
    let problem = creating?;
    if let Some(rest) = problem.strip_prefix("short-name \"")
        && let Some((name, problem)) = rest.split_once("\" ")
    {
        return Some(pull(name, problem));
    }
    let message = format!("a base image could not be pulled: {problem}");
    Some(Cause::new(FailureKind::PullFailed, message))
}

/// What the engine says of a name in `from=` that it can do nothing with: it keeps to itself why.
const NO_STAGE: &str = "no stage or image found";

fn pull(image: &str, problem: &str, upstreams: &[String]) -> Cause {
    let image = image.trim_matches('"');
    let first = image.split_once('/').map(|(first, _)| first);
    // Docker's rule for what is a registry and not the first part of a name.
    let given = first.filter(|first| first.contains(['.', ':']) || *first == "localhost");
    let registry = given.unwrap_or(name::DEFAULT_UPSTREAM);
    let known = registry == name::REGISTRY || upstreams.iter().any(|known| known == registry);
    let unknown = format!(
        "{registry} is not an upstream of this host: ask the operator for --upstream {registry}"
    );
    let problem = match given {
        _ if known => problem.to_owned(),
        // It may have been meant as a stage.
        None if problem.starts_with(NO_STAGE) => format!("{problem}, and {unknown}"),
        _ => unknown,
    };
    Cause::new(FailureKind::PullFailed, format!("the image {image} could not be pulled: {problem}"))
}

/// The engine, or a process of it whose last words it repeats.
fn crash(stderr: &[String]) -> Option<Cause> {
    const MARKS: [&str; 4] = ["panic: ", "fatal error: ", "SIGSEGV", "signal: "];
    const WITHOUT_MEMORY: [&str; 2] = ["out of memory", "cannot allocate memory"];
    let words = stderr.iter().find_map(|line| {
        let own = line.split_once("copier subprocess: ").map_or(line.as_str(), |(_, own)| own);
        MARKS.iter().any(|mark| own.starts_with(mark)).then_some(own)
    })?;
    if WITHOUT_MEMORY.iter().any(|text| words.ends_with(text)) {
        return Some(out_of_memory(stderr));
    }
    Some(Cause::new(FailureKind::EngineCrashed, format!("the build engine crashed: {words}")))
}

/// What to say when the engine, not a step, had not enough memory.
pub fn out_of_memory(stderr: &[String]) -> Cause {
    let error = error_text(stderr).unwrap_or_default();
    let at = at_step(&error).map(|(instruction, _)| format!(" at {instruction}"));
    let message = format!(
        "the build engine ran out of memory{}: ask for more with memory_mb",
        at.unwrap_or_default()
    );
    Cause::new(FailureKind::OutOfMemory, message)
}

fn disk_full(stderr: &[String]) -> Option<Cause> {
    let full = stderr.iter().any(|line| line.contains("no space left on device"));
    full.then(|| Cause::new(FailureKind::DiskFull, DISK_FULL))
}

/// What to say when the scratch disk is full.
pub const DISK_FULL: &str = "the build's disk is full: ask for more with disk_gb";

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use FailureKind::{
        DiskFull, DockerfileInvalid, EngineCrashed, Internal, OutOfMemory, PullFailed, PushFailed,
    };

    fn lines(text: &str) -> Vec<String> {
        text.lines().map(str::to_owned).collect()
    }

    fn failure(stderr: &[String], upstreams: &[String]) -> Option<Cause> {
        build_failure(Words { stderr, upstreams })
    }

    fn build(text: &str) -> (FailureKind, String) {
        let cause = failure(&lines(text), &[]).unwrap();
        (cause.kind, cause.message)
    }

    /// Every text was printed by buildah 1.39.3 of Debian trixie.
    #[test]
    fn what_the_engine_does_not_resolve_is_the_dockerfiles() {
        let cause = |line: &str| failure(&[line.to_owned()], &[]).unwrap();
        assert_eq!(cause("Error: building: no stages to build").kind, DockerfileInvalid);
        let unresolved = "Error: resolving step {Value:env Next:0xc0 Children:[] Heredocs:[] \
             Attributes:map[] Original:ENV g=${e-x} Flags:[] StartLine:3 EndLine:3}: Missing ':'";
        let found = cause(unresolved);
        assert_eq!(
            (found.kind, found.message.as_str()),
            (DockerfileInvalid, "ENV g=${e-x}: Missing ':'")
        );
    }

    #[test]
    fn images_of_other_registries_are_named() {
        let line = "Error: creating build container: initializing source docker://quay.io/a/b:1: pinging \
             container registry quay.io: Get \"https://quay.io/v2/\": dial tcp: lookup quay.io";
        let found = failure(&[line.to_owned()], &["docker.io".into()]).unwrap();
        assert_eq!(found.kind, PullFailed);
        assert_eq!(
            found.message,
            "the image quay.io/a/b:1 could not be pulled: quay.io is not an upstream of this host: \
             ask the operator for --upstream quay.io"
        );
        let found = failure(&[line.to_owned()], &["quay.io".into()]).unwrap();
        assert!(found.message.contains("pulled: pinging container registry"), "{found:?}");
    }

    #[test]
    fn a_name_without_a_registry_is_one_of_docker_io() {
        let short =
            "Error: creating build container: unable to copy from source docker://a/b:1: refused";
        let stage = "Error: COPY --from=made: no stage or image found with that name";
        let without =
            |line: &str| failure(&[line.to_owned()], &["quay.io".into()]).unwrap().message;
        let asks =
            "docker.io is not an upstream of this host: ask the operator for --upstream docker.io";
        assert_eq!(without(short), format!("the image a/b:1 could not be pulled: {asks}"));
        assert_eq!(
            without(stage),
            format!(
                "the image made could not be pulled: no stage or image found with that name, and {asks}"
            )
        );
        let with = |line: &str| failure(&[line.to_owned()], &["docker.io".into()]).unwrap().message;
        assert_eq!(with(short), "the image a/b:1 could not be pulled: refused");
        let mount = "Error: building at STEP \"RUN --mount=from=a.b/c:1,target=/o true\": from=a.b/c:1,target=/o from=a.b/c:1: \
             no stage or image found with that name";
        let found = failure(&[mount.to_owned()], &[]).unwrap();
        let asks = "a.b is not an upstream of this host: ask the operator for --upstream a.b";
        let message = format!("the image a.b/c:1 could not be pulled: {asks}");
        assert_eq!((found.kind, found.message), (PullFailed, message));
        let stages = "the image made could not be pulled: no stage or image found with that name";
        assert_eq!(with(stage), stages);
    }

    #[test]
    fn a_secret_that_is_not_there_is_named() {
        let line = "Error: building at STEP \"RUN --mount=type=secret,id=token,required=true cat x\": resolving \
             mountpoints for container \"e26f\": secret required but no secret with id \"token\" found";
        let found = failure(&[line.to_owned()], &[]).unwrap();
        assert_eq!(found.kind, FailureKind::SecretMissing);
        assert_eq!(
            found.message,
            "RUN --mount=type=secret,id=token,required=true cat x: the build has no secret \"token\""
        );
    }

    #[test]
    fn recorded_failures_of_a_build() {
        for (text, kind, message) in [
            (
                r#"Error: building at STEP "FOO ": Build error: Unknown instruction: "FOO" "#,
                DockerfileInvalid,
                r#"unknown instruction "FOO""#,
            ),
            (r#"Error: no contents in "ctx/D""#, DockerfileInvalid, "the Dockerfile is empty"),
            ("Error: no FROM statement found", DockerfileInvalid, "the Dockerfile has no FROM"),
            (
                r#"Error: building at STEP "COPY x": COPY requires at least two arguments"#,
                DockerfileInvalid,
                "COPY x: COPY requires at least two arguments",
            ),
            (
                r#"Error: building at STEP "COPY nofile /x": checking on sources under "/mnt/ctx": copier: stat: "/nofile": no such file or directory"#,
                DockerfileInvalid,
                r#"COPY nofile /x: checking on sources under "/mnt/ctx": copier: stat: "/nofile": no such file or directory"#,
            ),
            (
                r#"Error: building at STEP "COPY --parents D /x": COPY --parents is not supported"#,
                DockerfileInvalid,
                "COPY --parents D /x: COPY --parents is not supported",
            ),
            (
                r#"Error: The target "nope" was not found in the provided Dockerfile"#,
                DockerfileInvalid,
                r#"the Dockerfile has no stage "nope""#,
            ),
            (
                "Error: parsing main Dockerfile: ctx/D: EOT: unterminated heredoc",
                DockerfileInvalid,
                "the Dockerfile could not be parsed: EOT: unterminated heredoc",
            ),
            (
                r#"Error: parsing main Dockerfile: ctx/D: Syntax error - can't find = in "\"x". Must be of the form: name=value"#,
                DockerfileInvalid,
                r#"the Dockerfile could not be parsed: Syntax error - can't find = in "\"x". Must be of the form: name=value"#,
            ),
            (
                r#"Error: creating build container: parsing reference "Not_A@Name": invalid reference format"#,
                DockerfileInvalid,
                r#""Not_A@Name" is not an image's name"#,
            ),
            (
                "Trying to pull 127.0.0.1:1/base/debian:trixie...\n\
                 Error: creating build container: initializing source docker://127.0.0.1:1/base/debian:trixie: pinging container registry 127.0.0.1:1: Get \"http://127.0.0.1:1/v2/\": dial tcp 127.0.0.1:1: connect: network is unreachable",
                PullFailed,
                "the image 127.0.0.1:1/base/debian:trixie could not be pulled: 127.0.0.1:1 is not an upstream of this host: ask the operator for --upstream 127.0.0.1:1",
            ),
            (
                r#"Error: creating build container: short-name "nosuchimage" did not resolve to an alias and no unqualified-search registries are defined in "/etc/containers/registries.conf""#,
                PullFailed,
                "the image nosuchimage could not be pulled: docker.io is not an upstream of this host: ask the operator for --upstream docker.io",
            ),
            (
                "Error: COPY --from=nostage: no stage or image found with that name",
                PullFailed,
                "the image nostage could not be pulled: no stage or image found with that name, and docker.io is not an upstream of this host: ask the operator for --upstream docker.io",
            ),
            (
                "Error: building at STEP \"RUN nosuch\": while running runtime: exit status 1",
                Internal,
                "the build engine failed: building at STEP \"RUN nosuch\": while running runtime: exit status 1",
            ),
        ] {
            assert_eq!(build(text), (kind, message.to_owned()), "{text}");
        }
    }

    #[test]
    fn recorded_failures_of_a_push() {
        let cause = push_failure(&lines(
            r#"Error: pushing image "x" to "docker://127.0.0.1:1/staging/image:result": x: image not known"#,
        ));
        let message = "the image could not be pushed: x: image not known".to_owned();
        assert_eq!(cause, Cause { kind: PushFailed, message });
        assert_eq!(push_failure(&[]).kind, PushFailed);
        let cause = push_failure(&lines(
            r#"Error: pushing image "x" to "docker://r/x": pinging container registry r: Get "http://r/v2/": dial tcp: lookup r: no such host"#,
        ));
        assert_eq!(
            cause.message,
            r#"the image could not be pushed: pinging container registry r: Get "http://r/v2/": dial tcp: lookup r: no such host"#
        );
    }

    #[test]
    fn a_crash_or_a_full_disk_outweighs_what_else_is_said() {
        let text =
            "panic: runtime error: index out of range [0] with length 0\n\ngoroutine 1 [running]:";
        assert_eq!(build(text).0, EngineCrashed);
        let text = r#"Error: building at STEP "ADD a /": checking on sources under "/s": error in copier subprocess: panic: oh"#;
        assert_eq!(build(text), (EngineCrashed, "the build engine crashed: panic: oh".to_owned()));
        let text = "Error: building at STEP \"COPY a /b\": write /b: no space left on device";
        assert_eq!(build(text), (DiskFull, DISK_FULL.to_owned()));
        assert_eq!(push_failure(&lines("Error: write: no space left on device")).kind, DiskFull);
    }

    #[test]
    fn want_of_memory_is_named_with_the_instruction() {
        let text = r#"Error: building at STEP "ADD a.xz /": checking on sources under "/s": error in copier subprocess: fatal error: runtime: out of memory"#;
        let message =
            "the build engine ran out of memory at ADD a.xz /: ask for more with memory_mb";
        assert_eq!(build(text), (OutOfMemory, message.to_owned()));
        assert_eq!(build("fatal error: runtime: cannot allocate memory").0, OutOfMemory);
        let cause = out_of_memory(&[]);
        assert_eq!(
            cause.message,
            "the build engine ran out of memory: ask for more with memory_mb"
        );
    }

    #[test]
    fn what_the_engine_passes_over_is_seen_in_its_steps() {
        for line in [
            "STEP 2/3: COPY --exclude=*.md a /b",
            "[1/2] STEP 10/12: add --chown=1 --exclude=b . /c",
        ] {
            assert_eq!(passed_over(line), line.split_once(": ").map(|(_, rest)| rest));
        }
        for line in [
            "STEP 2/3: COPY a --exclude=b /c",
            "STEP 2/3: RUN COPY --exclude=b a /c",
            "STEP 2/3: COPY",
            "COPY --exclude=*.md a /b",
            "[1/2] COMMIT x",
            "",
        ] {
            assert_eq!(passed_over(line), None, "{line}");
        }
    }

    #[test]
    fn silence_has_no_cause() {
        assert_eq!(failure(&[], &[]), None);
        assert_eq!(failure(&lines("Trying to pull x..."), &[]), None);
    }
}
