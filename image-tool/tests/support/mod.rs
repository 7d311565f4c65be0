//! A real `docker-registry` for a test, on a loopback port that it chose itself.

pub mod bundle;

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

/// User and password of a registry with authentication.
pub const CREDS: (&str, &str) = ("kiln", "secret");
/// bcrypt, the only form that docker-registry takes, of `CREDS`.
const HTPASSWD: &str = "kiln:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n";
/// Far more than a start takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// Ended when dropped.
pub struct Registry {
    pub host: String,
    _process: Child,
    _data: tempfile::TempDir,
}

impl Registry {
    /// Starts one and waits until it says where it listens.
    pub async fn start(with_auth: bool) -> Self {
        let data = tempfile::tempdir().unwrap();
        let config = data.path().join("config.yml");
        std::fs::write(&config, configuration(data.path(), with_auth)).unwrap();
        let mut process = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("docker-registry is needed: apt-get install docker-registry");
        let mut lines = BufReader::new(process.stderr.take().unwrap()).lines();
        let listening = async {
            while let Some(line) = lines.next_line().await.unwrap() {
                if let Some((_, rest)) = line.split_once("listening on ") {
                    let host: String = rest
                        .chars()
                        .take_while(|c| c.is_ascii_digit() || ".:".contains(*c))
                        .collect();
                    return host;
                }
            }
            panic!("docker-registry ended");
        };
        let host = tokio::time::timeout(LIMIT, listening).await.unwrap();
        // Read on, or the registry would stop at a full pipe.
        tokio::spawn(async move { while let Ok(Some(_)) = lines.next_line().await {} });
        Self { host, _process: process, _data: data }
    }
}

fn configuration(dir: &Path, with_auth: bool) -> String {
    let dir_text = dir.display();
    let mut text = format!(
        "version: 0.1\nlog: {{level: info, formatter: text}}\n\
         storage: {{filesystem: {{rootdirectory: {dir_text}/data}}}}\n\
         http: {{addr: \"127.0.0.1:0\"}}\n"
    );
    if with_auth {
        std::fs::write(dir.join("htpasswd"), HTPASSWD).unwrap();
        text.push_str(&format!("auth: {{htpasswd: {{realm: kiln, path: {dir_text}/htpasswd}}}}\n"));
    }
    text
}
