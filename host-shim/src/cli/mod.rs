//! The client commands: one file each, over one small HTTP client.
//!
//! ```text
//! build ─▶ context ─▶ pack ─▶ submit ─▶ client ─▶ the API
//!   │      (dockerignore)                  ▲
//!   └────▶ follow (sse) ───────────────────┘
//!             └─▶ render (lines) ─▶ stderr
//! ```
//!
//! **Invariant**: what a server sent reaches a terminal only through [`escape`], but for what the user's own command
//! prints under [`exec`]. Stdout holds the result and nothing else; the exit codes are [`error::Exit`]'s.

use std::process::ExitCode;
use std::time::Duration;

pub mod absent;
pub mod build;
pub mod cancel;
pub mod client;
pub mod context;
pub mod cp;
pub mod dockerignore;
pub mod error;
pub mod escape;
pub mod exec;
pub mod fields;
pub mod flag_names;
pub mod follow;
pub mod format;
pub mod gc;
pub mod instances;
pub mod interrupt;
pub mod json_line;
pub mod kept;
pub mod lines;
pub mod logs;
pub mod ls;
pub mod pack;
pub mod render;
pub mod run;
pub mod secret;
pub mod secret_flag;
pub mod sessions;
pub mod show;
pub mod sse;
pub mod submit;
pub mod table;
pub mod token;
pub mod view;

use client::{Client, Connect};
use error::CliError;

/// A client command.
#[derive(Debug, clap::Subcommand)]
#[expect(missing_docs, reason = "clap would take it for help; each command has its own")]
pub enum ClientCommand {
    Build(Box<build::BuildArgs>),
    Ls(ls::LsArgs),
    Show(show::ShowArgs),
    Logs(logs::LogsArgs),
    Cancel(cancel::CancelArgs),
    Run(run::RunArgs),
    Exec(Box<exec::ExecArgs>),
    Cp(cp::CpArgs),
    Sessions(sessions::SessionsArgs),
    Instances(instances::InstancesArgs),
    Kept(kept::KeptArgs),
    Secret(secret::SecretArgs),
    Token(token::TokenArgs),
    Gc(gc::GcArgs),
}

/// What every client command takes.
#[derive(Clone, Debug, clap::Args)]
pub struct Global {
    #[command(flatten)]
    connect: Connect,
    /// How long to go on without a server that was lost, in seconds
    #[arg(long, global = true, hide = true, env = "KILN_PATIENCE", default_value_t = 60)]
    patience: u64,
}

impl ClientCommand {
    /// Runs the command; its errors are reported.
    pub async fn run(self, global: &Global) -> ExitCode {
        let json = matches!(&self, Self::Build(args) if args.is_json());
        match self.try_run(global).await {
            Ok(code) => ExitCode::from(code),
            Err(error) if json => error.report_json(),
            Err(error) => error.report(),
        }
    }

    async fn try_run(self, global: &Global) -> Result<u8, CliError> {
        let client = || Client::new(&global.connect);
        let patience = Duration::from_secs(global.patience);
        match self {
            // May work without a server.
            Self::Token(args) => args.run(client).await.map(|()| 0),
            // The only ones whose exit code is another program's.
            Self::Run(args) => match client() {
                Ok(client) => run::run(&client, patience, args).await,
                Err(error) => Err(CliError { exit: error::Exit::Own, ..error }),
            },
            Self::Exec(args) => match client() {
                Ok(client) => exec::run(&client, *args).await,
                Err(error) => Err(CliError { exit: error::Exit::Own, ..error }),
            },
            command => command.run_with(&client()?, patience).await.map(|()| 0),
        }
    }

    async fn run_with(self, client: &Client, patience: Duration) -> Result<(), CliError> {
        match self {
            Self::Build(args) => build::run(client, patience, *args).await,
            Self::Ls(args) => ls::run(client, args).await,
            Self::Show(args) => show::run(client, args).await,
            Self::Logs(args) => logs::run(client, patience, args).await,
            Self::Cp(args) => cp::run(client, args).await,
            Self::Cancel(args) => cancel::run(client, args).await,
            Self::Kept(args) => kept::run(client, args).await,
            Self::Instances(args) => instances::run(client, patience, args).await,
            Self::Secret(args) => secret::run(client, args).await,
            Self::Sessions(args) => sessions::run(client, args).await,
            Self::Gc(args) => gc::run(client, args).await,
            Self::Run(_) | Self::Exec(_) | Self::Token(_) => Ok(()),
        }
    }
}
