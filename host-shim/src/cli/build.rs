//! `kiln build`: sends a source, follows the build, prints the image's reference.

use std::fs::{self, File};
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::absent;
use super::client::{CallError, Client};
use super::context::{self, Context};
use super::error::{CliError, print_line};
use super::escape::escape;
use super::fields::{self, ImageTag, Pair};
use super::follow::{Follower, Seen, patiently};
use super::interrupt::Interrupts;
use super::pack::Source;
use super::render::{Progress, Renderer};
use super::secret_flag::SecretFlag;
use super::submit::{Fields, submit};
use super::view::BuildView;
use crate::build::NetworkMode;

/// Build an image from a directory
#[derive(Debug, clap::Args)]
pub struct BuildArgs {
    /// The source: a directory, or - for a tar archive (plain, gzip, zstd) on standard input
    #[arg(default_value = ".")]
    path: PathBuf,
    /// The Dockerfile, relative to the current directory, in the source or elsewhere [default:
    /// Dockerfile in the source]
    #[arg(short, long)]
    file: Option<PathBuf>,
    /// The stage to build [default: the last]
    #[arg(long)]
    target: Option<String>,
    /// A build argument; without =V it is taken from the environment
    #[arg(long = "build-arg", value_name = "K=V", value_parser = fields::build_arg)]
    args: Vec<Option<Pair>>,
    /// The image's name in the tenant's repositories [default: builds/ID]
    #[arg(short = 't', value_name = "NAME[:TAG]")]
    image: Option<ImageTag>,
    /// A label of the build
    #[arg(long = "tag", value_name = "K=V", value_parser = fields::pair)]
    tags: Vec<Pair>,
    /// A secret that the Dockerfile may ask for: its value from a file or a variable, else the one that `kiln secret
    /// set` gave to the server; env_var makes it a variable of every step too
    #[arg(long = "secret", value_name = "id=ID[,src=FILE|,env=VAR][,env_var=NAME]")]
    secrets: Vec<SecretFlag>,
    /// What steps may reach [default: the server's]
    #[arg(long)]
    network: Option<NetworkMode>,
    /// A domain that steps may reach: HOST, *.HOST, either with :PORT
    #[arg(long = "allow", value_name = "DOMAIN")]
    allow: Vec<String>,
    /// From the VM's start [default: the server's, 600]
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    timeout: Option<u32>,
    /// Of the VM [default: the server's, 2048]
    #[arg(long, value_name = "MB", value_parser = clap::value_parser!(u32).range(1..))]
    memory: Option<u32>,
    /// Of the VM [default: the server's, 2]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    cpus: Option<u32>,
    /// Of the VM [default: the server's, 10]
    #[arg(long, value_name = "GB", value_parser = clap::value_parser!(u32).range(1..))]
    disk: Option<u32>,
    /// When a step fails, keep its VM for so long, to be entered with kiln exec
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..))]
    keep_failed: Option<u32>,
    /// Among your queued builds, 0 to 100: higher ones go first [default: 50]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(..=100))]
    priority: Option<u32>,
    /// Print the build's id and do not wait
    #[arg(long)]
    detach: bool,
    /// How to show progress
    #[arg(long, value_enum, default_value_t = Progress::Auto)]
    progress: Progress,
    /// Write the image's digest to a file
    #[arg(long, value_name = "FILE", conflicts_with = "detach")]
    iidfile: Option<PathBuf>,
}

impl BuildArgs {
    /// Whether everything on stderr is to be JSON.
    pub fn is_json(&self) -> bool {
        self.progress == Progress::Json
    }
}

/// Runs the command.
pub async fn run(client: &Client, patience: Duration, args: BuildArgs) -> Result<(), CliError> {
    let mut interrupts = Interrupts::listen()?;
    // Before anything is sent: a build whose digest cannot be told is not begun.
    let iidfile = args.iidfile.as_deref().map(IdFile::clear).transpose()?;
    let (dockerfile, missing) = match args.file.as_deref() {
        None => (None, None),
        Some(path) => match context::read_dockerfile(path)? {
            Some(content) => (Some(content), None),
            None => (None, Some(path)),
        },
    };
    let source = source(&args.path, args.file.as_deref(), missing)?;
    let mut renderer = Renderer::new(args.progress);
    if let Some(path) = missing {
        renderer.note(&format!("warning: {}", absent::not_there(path)));
    }
    let fields = form_fields(&args);
    let secrets = args.secrets.iter().map(SecretFlag::part);
    let secrets = secrets.filter_map(Result::transpose).collect::<Result<Vec<_>, _>>()?;
    let build =
        submit(client, fields, secrets, dockerfile, source, &renderer, &mut interrupts).await?;
    if args.detach {
        renderer.finish();
        return print_line(&escape(&build.id)).map(drop);
    }
    renderer.note(&format!("build {}", build.id));
    let watched = watch(client, &build.id, patience, missing, &mut renderer, &mut interrupts);
    let build = watched.await?;
    renderer.finish();
    build.verdict()?;
    let reference = build.image_ref.ok_or_else(|| {
        CliError::host(format!("the server gives build {} no reference", build.id))
    })?;
    // Each is tried whatever becomes of the other.
    let printed = print_line(&escape(&reference)).map(drop);
    let written = iidfile.map(|file| file.write(build.image_digest.as_deref()));
    printed.and(written.unwrap_or(Ok(())))
}

/// The file of `--iidfile`, which is not there until there is a digest: none of an earlier build is
/// taken for this one's, and it is not sent with the source.
struct IdFile<'a>(&'a Path);

impl<'a> IdFile<'a> {
    /// Finds out whether it can be written, and removes it.
    fn clear(path: &'a Path) -> Result<Self, CliError> {
        let opened = File::options().create(true).append(true).open(path);
        let cleared = opened.and_then(|file| {
            // Not a terminal or another device.
            if file.metadata()?.is_file() { fs::remove_file(path) } else { Ok(()) }
        });
        cleared.map_err(|e| {
            CliError::usage(format!("--iidfile {} cannot be written: {e}", path.display()))
                .hint("nothing was built; give a file in a directory that you may write to")
        })?;
        Ok(Self(path))
    }

    fn write(self, digest: Option<&str>) -> Result<(), CliError> {
        fs::write(self.0, digest.unwrap_or_default()).map_err(|e| {
            CliError::failed(format!(
                "the image is there, but --iidfile {} cannot be written: {e}",
                self.0.display()
            ))
        })
    }
}

/// Follows a build to its end. The first Ctrl-C cancels it, the second leaves at once.
async fn watch(
    client: &Client,
    id: &str,
    patience: Duration,
    missing: Option<&Path>,
    renderer: &mut Renderer,
    interrupts: &mut Interrupts,
) -> Result<BuildView, CliError> {
    let mut follower = Follower::new(client, id, patience).of_reached();
    loop {
        let mut see = |seen: Seen<'_>| {
            match seen {
                Seen::Event(received) => {
                    let named = missing.and_then(|path| absent::named_in_event(received, path));
                    renderer.event(named.as_ref().unwrap_or(received));
                }
                Seen::Reconnecting(why) => renderer.reconnecting(why),
            }
            Ok(())
        };
        tokio::select! {
            end = follower.to_the_end(&mut see) => {
                end?;
                break;
            }
            () = interrupts.next() => {}
        }
        renderer.note("cancelling the build; Ctrl-C again leaves at once");
        let answer = tokio::select! {
            answer = client.cancel(id) => answer,
            () = interrupts.next() => {
                return Err(CliError::cancelled(format!("left build {id} before it was cancelled"))
                    .hint(format!("it may still run; cancel it with: kiln cancel {id}")));
            }
        };
        match answer {
            Ok(()) => return Err(CliError::cancelled(format!("build {id} was cancelled"))),
            // Finished, or being published: the true end is near.
            Err(CallError::Refused { status, detail })
                if status == reqwest::StatusCode::CONFLICT =>
            {
                renderer.note(&format!("it cannot be cancelled: {detail}"));
            }
            Err(error) => {
                let error = CliError::from(error);
                let hint = format!("the build may still run; cancel it with: kiln cancel {id}");
                return Err(error.hint(hint));
            }
        }
    }
    let answer = tokio::select! {
        answer = patiently(patience, async || client.build(id).await) => answer?,
        () = interrupts.next() => {
            return Err(CliError::cancelled(format!("left build {id}, which has ended"))
                .hint(format!("see how: kiln show {id}")));
        }
    };
    let build = BuildView::of(&answer)?;
    Ok(match missing {
        Some(path) => absent::named_in_build(build, path),
        None => build,
    })
}

fn source(
    path: &Path,
    dockerfile: Option<&Path>,
    missing: Option<&Path>,
) -> Result<Source, CliError> {
    if path == Path::new("-") {
        if let Some(missing) = missing {
            // An archive is passed on as it is, and may have a Dockerfile that was not asked for.
            return Err(CliError::failed(absent::not_there(missing))
                .hint("with an archive on standard input, -f is a file beside it, not one in it"));
        }
        if std::io::stdin().is_terminal() {
            return Err(CliError::usage(
                "an archive is expected on standard input, which is a terminal",
            )
            .hint("like this: kiln build - < SOURCE.tar"));
        }
        return Ok(Source::Stdin);
    }
    let context = Context::open(path, dockerfile)?;
    Ok(Source::Directory(if missing.is_some() { context.without_dockerfile() } else { context }))
}

fn form_fields(args: &BuildArgs) -> Fields {
    let mut fields = vec![];
    let mut field = |name, value: Option<String>| {
        fields.extend(value.map(|value| (name, value)));
    };
    field("target", args.target.clone());
    field("image_name", args.image.as_ref().map(ToString::to_string));
    field("build_args", fields::object(args.args.iter().flatten()));
    field("tags", fields::object(&args.tags));
    let network = args.network.map(|network| match network {
        NetworkMode::None => "none",
        NetworkMode::Allowlist => "allowlist",
        NetworkMode::Open => "open",
    });
    field("network_mode", network.map(Into::into));
    let allow = serde_json::Value::from(args.allow.clone());
    field("allowed_domains", (!args.allow.is_empty()).then(|| allow.to_string()));
    let secrets: Vec<_> = args.secrets.iter().map(SecretFlag::declared).collect();
    field("secrets", (!secrets.is_empty()).then(|| serde_json::Value::from(secrets).to_string()));
    field("timeout_seconds", args.timeout.map(|n| n.to_string()));
    field("memory_mb", args.memory.map(|n| n.to_string()));
    field("cpus", args.cpus.map(|n| n.to_string()));
    field("disk_gb", args.disk.map(|n| n.to_string()));
    field("keep_failed_seconds", args.keep_failed.map(|n| n.to_string()));
    field("priority", args.priority.map(|n| n.to_string()));
    fields
}
