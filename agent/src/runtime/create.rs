//! `create`: the verb at which a step begins.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, BufRead as _, BufReader, PipeReader, Read as _, Write as _, pipe};
use std::os::fd::AsFd as _;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;

use super::config::{ConfigError, NAME_SERVER, StepPolicy, name_server_file, rewrite};
use super::hold::{self, Hold};
use super::monitor::{self, Monitor};
use super::name::step_name;
use super::secrets;
use super::sys::{self, Forked};
use super::wire::{self, ACK, FromWrapper, HELLO, MAX_LINE, WireError};

/// The container's config inside a bundle.
pub const CONFIG: &str = "config.json";
/// The pid of the container's init, inside the bundle. The engine's own pid file gets the
/// monitor's pid.
const INIT_PID: &str = "kiln-init.pid";

/// Why a container was not created.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The engine calls in a way that this wrapper does not know.
    #[error("the engine called `create` without {0}")]
    Usage(&'static str),
    /// The agent does not answer.
    #[error("the agent could not be reached at {}", socket.display())]
    NoAgent {
        /// Where it should listen.
        socket: PathBuf,
        /// What happened.
        source: io::Error,
    },
    /// The conversation with the agent broke.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The engine's config could not be read or written.
    #[error("the container's config {} could not be used", path.display())]
    Config {
        /// Which file.
        path: PathBuf,
        /// What happened.
        source: oci_spec::OciSpecError,
    },
    /// Kiln does not run this.
    #[error("Kiln refuses the step: {0}")]
    Refused(ConfigError),
    /// A call to the kernel failed.
    #[error("the kernel refused to {action}")]
    System {
        /// To do what.
        action: &'static str,
        /// What it said.
        source: io::Error,
    },
}

/// Creates a container whose output and end the agent sees. Gives the exit code for the engine.
pub fn create(program: &Path, socket: &Path, args: &[OsString]) -> Result<u8, CreateError> {
    sys::close_inherited().map_err(system("close inherited files"))?;
    let call = Call::parse(args)?;
    let path = call.bundle.join(CONFIG);
    let unusable = |source| CreateError::Config { path: path.clone(), source };
    let spec = Spec::load(&path).map_err(unusable)?;
    let command = spec.process().as_ref().and_then(|process| process.args().as_deref());
    let name = step_name(command.unwrap_or_default());

    let mut agent = Agent::connect(socket)?;
    let (stdout, stdout_writer) = pipe().map_err(system("make a pipe"))?;
    let (stderr, stderr_writer) = pipe().map_err(system("make a pipe"))?;
    let policy = agent.announce(name, [stdout, stderr])?;
    let spec = match rewrite(spec, &policy) {
        Ok(spec) => spec,
        Err(refusal) => {
            drop((stdout_writer, stderr_writer));
            agent.tell(&FromWrapper::NotStarted { message: Some(refusal.to_string()) })?;
            agent.wait_for_ack()?;
            return Err(CreateError::Refused(refusal));
        }
    };
    if let Some(file) = name_server_file(&spec, &policy, &call.bundle) {
        fs::write(file, NAME_SERVER).map_err(system("name a step's name server"))?;
    }
    let (bundle, secrets) = place_secrets(spec.clone(), &policy, &call)?;

    let (ready, ready_writer) = pipe().map_err(system("make a pipe"))?;
    match sys::fork_single_threaded().map_err(system("fork"))? {
        Forked::Parent => {
            drop((agent, stdout_writer, stderr_writer, ready_writer));
            Ok(wait_until_created(ready))
        }
        Forked::Child => {
            drop(ready);
            let monitor = Monitor {
                program: program.to_owned(),
                args: call.runtime_args(&bundle),
                id: call.id.clone(),
                config: bundle.join(CONFIG),
                secrets,
                hold: Hold {
                    program: program.to_owned(),
                    spec,
                    policy,
                    id: call.id.clone(),
                    bundles: socket.with_file_name("held"),
                    deadline: hold::DEADLINE,
                },
                locks: super::locks(socket),
                init_pid_file: call.bundle.join(INIT_PID),
                pid_file: call.pid_file.clone(),
            };
            monitor::run(&monitor, agent, stdout_writer, stderr_writer, ready_writer)
        }
    }
}

/// Writes the step's config, with its secrets. Gives the bundle for the runtime: the engine's, or one in memory
/// where the config itself holds a value, for the engine's is on the scratch disk; and whether the step sees secrets.
fn place_secrets(
    mut spec: Spec,
    policy: &StepPolicy,
    call: &Call,
) -> Result<(PathBuf, bool), CreateError> {
    let directory = &policy.mounted_secrets;
    if !policy.secrets.is_empty() {
        fs::DirBuilder::new()
            .mode(0o700)
            .recursive(true)
            .create(directory)
            .map_err(system("make the directory of a step's secrets"))?;
    }
    let placed = secrets::place(&mut spec, &policy.secrets, directory, &call.id)
        .map_err(system("give a step its secrets"))?;
    let mut bundle = call.bundle.clone();
    if placed.in_config {
        bundle = directory.join(&call.id);
        fs::create_dir(&bundle).map_err(system("make a bundle in memory"))?;
    }
    let path = bundle.join(CONFIG);
    spec.save(&path).map_err(|source| CreateError::Config { path, source })?;
    Ok((bundle, placed.any()))
}

/// The monitor says by one byte how `crun create` went; if it died, nothing comes.
fn wait_until_created(mut ready: PipeReader) -> u8 {
    let mut code = [1];
    match ready.read_exact(&mut code) {
        Ok(()) => code[0],
        Err(_) => 1,
    }
}

fn system(action: &'static str) -> impl FnOnce(io::Error) -> CreateError {
    move |source| CreateError::System { action, source }
}

/// The agent, as the wrapper speaks with it.
pub struct Agent {
    stream: BufReader<UnixStream>,
}

impl Agent {
    fn connect(socket: &Path) -> Result<Self, CreateError> {
        let stream = UnixStream::connect(socket)
            .map_err(|source| CreateError::NoAgent { socket: socket.to_owned(), source })?;
        Ok(Self { stream: BufReader::new(stream) })
    }

    /// Hands over the ends of the pipes and the name; gets the policy. Waits as long as the agent
    /// does: it holds steps back while the host does not take events.
    fn announce(&mut self, name: String, pipes: [PipeReader; 2]) -> Result<StepPolicy, WireError> {
        let ends = [pipes[0].as_fd(), pipes[1].as_fd()];
        sys::send_with_pipes(self.stream.get_ref(), HELLO, ends)?;
        drop(pipes);
        self.tell(&FromWrapper::Create { name })?;
        let mut line = Vec::new();
        self.stream.by_ref().take(MAX_LINE as u64).read_until(b'\n', &mut line)?;
        wire::decode(&line)
    }

    /// Says something.
    pub fn tell(&mut self, message: &FromWrapper) -> Result<(), WireError> {
        Ok(self.stream.get_ref().write_all(&wire::encode(message)?)?)
    }

    /// Waits until the agent has read and reported everything of the step.
    pub fn wait_for_ack(&mut self) -> Result<(), WireError> {
        if self.order()? == ACK { Ok(()) } else { Err(WireError::Closed) }
    }

    /// Waits for what the agent wants next.
    pub fn order(&mut self) -> Result<u8, WireError> {
        let mut byte = [0];
        self.stream.read_exact(&mut byte)?;
        Ok(byte[0])
    }
}

/// What the engine asks for.
#[derive(Debug, PartialEq, Eq)]
struct Call {
    bundle: PathBuf,
    pid_file: PathBuf,
    /// Further options, handed on as they are.
    options: Vec<OsString>,
    id: OsString,
}

impl Call {
    fn parse(args: &[OsString]) -> Result<Self, CreateError> {
        let (mut bundle, mut pid_file, mut options) = (None, None, Vec::new());
        let (id, rest) = args.split_last().ok_or(CreateError::Usage("a container's name"))?;
        let mut rest = rest.iter();
        while let Some(arg) = rest.next() {
            if arg == "--bundle" || arg == "-b" {
                bundle = rest.next().map(PathBuf::from);
            } else if arg == "--pid-file" {
                pid_file = rest.next().map(PathBuf::from);
            } else {
                options.push(arg.clone());
            }
        }
        Ok(Self {
            bundle: bundle.ok_or(CreateError::Usage("--bundle"))?,
            pid_file: pid_file.ok_or(CreateError::Usage("--pid-file"))?,
            options,
            id: id.clone(),
        })
    }

    fn runtime_args(&self, bundle: &Path) -> Vec<OsString> {
        let os = |text: &str| OsStr::new(text).to_owned();
        let mut args = vec![
            // The VM has no systemd; the cgroup is ours to name.
            os("--cgroup-manager=cgroupfs"),
            os("create"),
            os("--bundle"),
            bundle.into(),
            os("--pid-file"),
            self.bundle.join(INIT_PID).into(),
        ];
        args.extend(self.options.iter().cloned());
        args.push(self.id.clone());
        args
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<OsString> {
        text.split_whitespace().map(OsString::from).collect()
    }

    #[test]
    fn the_engines_call_becomes_the_runtimes() {
        // As recorded from buildah 1.39.3.
        let call = Call::parse(&words(
            "--bundle /var/tmp/buildah1 --pid-file /var/tmp/buildah1/pid --no-new-keyring buildah-buildah1",
        ))
        .unwrap();
        assert_eq!(call.pid_file, Path::new("/var/tmp/buildah1/pid"));
        assert_eq!(
            call.runtime_args(Path::new("/run/b")),
            words(
                "--cgroup-manager=cgroupfs create --bundle /run/b \
                 --pid-file /var/tmp/buildah1/kiln-init.pid --no-new-keyring buildah-buildah1"
            )
        );
    }

    #[test]
    fn an_incomplete_call_is_refused() {
        for call in ["", "name", "--bundle b name", "--pid-file p name", "--pid-file p --bundle"] {
            assert!(matches!(Call::parse(&words(call)), Err(CreateError::Usage(_))), "{call}");
        }
    }
}
