//! The agent of a fake VM: a real peer over the protocol, which dials again when its host is gone, as the real one does. It
//! prints its lines, pushes an image of its own, and reports it.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream as StdStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use kiln_protocol::event::{Built, Event, Log, LogStream, NumberedEvent, Outcome, Phase};
use kiln_protocol::frame::{self, FrameReader};
use kiln_protocol::hello::{Hello, HelloReply, MAGIC, Resume, TOKEN_LEN};
use kiln_protocol::message::{AgentToHost, HostToAgent};
use kiln_protocol::preamble::{Channel, Preamble};
use kiln_protocol::version::{Features, SUPPORTED};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::oneshot;

/// Lines that each build prints.
pub const LINES: u64 = 20;

/// As long as the real one.
const DIAL_DEADLINE: Duration = Duration::from_secs(30);

/// The directory of a VM's sockets, whoever has its name later.
pub struct Place {
    dir: File,
    uid: u32,
}

impl Place {
    /// Of the VM in this directory, once its device listens.
    pub fn of(vm: &Path) -> Option<Self> {
        let sock = vm.join("sock");
        if !sock.join("vu").exists() {
            return None;
        }
        let record: Value =
            serde_json::from_slice(&std::fs::read(vm.join("record.json")).ok()?).ok()?;
        let uid = u32::try_from(record["uid"].as_u64()?).ok()?;
        Some(Self { dir: File::open(sock).ok()?, uid })
    }

    /// Which directory it is.
    pub fn number(&self) -> u64 {
        use std::os::unix::fs::MetadataExt;
        self.dir.metadata().unwrap().ino()
    }

    /// No directory has it any more.
    pub fn is_gone(&self) -> bool {
        use std::os::unix::fs::MetadataExt;
        self.dir.metadata().unwrap().nlink() == 0
    }

    /// Dials as the VM's user, which the host checks.
    async fn dial(&self, port: u32) -> io::Result<UnixStream> {
        let path = format!("/proc/self/fd/{}/v_{port}", self.dir.as_raw_fd());
        let uid = self.uid;
        let dialled = std::thread::spawn(move || -> io::Result<StdStream> {
            // Of this thread alone, and the thread ends.
            become_user(uid)?;
            StdStream::connect(path)
        });
        let stream = tokio::task::spawn_blocking(|| dialled.join().unwrap()).await.unwrap()?;
        stream.set_nonblocking(true)?;
        UnixStream::from_std(stream)
    }

    /// The same until somebody listens; `None` when nobody will.
    async fn dial_again(&self, port: u32) -> Option<UnixStream> {
        let deadline = tokio::time::Instant::now() + DIAL_DEADLINE;
        loop {
            match self.dial(port).await {
                Ok(stream) => return Some(stream),
                Err(_) if self.is_gone() || tokio::time::Instant::now() > deadline => return None,
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }
}

fn become_user(uid: u32) -> io::Result<()> {
    rustix::thread::set_thread_uid(rustix::thread::Uid::from_raw(uid))?;
    Ok(())
}

/// An agent with its build.
pub struct Agent {
    place: Arc<Place>,
    name: String,
    token: Option<[u8; TOKEN_LEN]>,
    nonce: [u8; TOKEN_LEN],
    acknowledged: u64,
    outcome: Option<Outcome>,
    lines: u64,
    /// Of a line, at least.
    width: usize,
    /// Of the one layer of its image; 0 for none.
    layer: usize,
    /// Told when it may print.
    may_print: Option<oneshot::Receiver<()>>,
}

/// The connection broke.
struct Broken;

impl<E: std::error::Error> From<E> for Broken {
    fn from(_: E) -> Self {
        Self
    }
}

impl Agent {
    pub fn new(place: Arc<Place>, name: String) -> Self {
        let (nonce, acknowledged) = ([0; TOKEN_LEN], 0);
        let (token, outcome, may_print) = (None, None, None);
        let (lines, width, layer) = (LINES, 0, 0);
        Self { place, name, token, nonce, acknowledged, outcome, lines, width, layer, may_print }
    }

    /// One whose image has a layer of so many bytes, that no other image has.
    pub fn with_layer(self, layer: usize) -> Self {
        Self { layer, ..self }
    }

    /// One with so many lines that are so long, and which prints nothing until it is told to.
    pub fn printing(self, lines: u64, width: usize, may_print: oneshot::Receiver<()>) -> Self {
        Self { lines, width, may_print: Some(may_print), ..self }
    }

    /// Until its host has said Finish, or its VM is gone.
    pub async fn run(mut self) {
        while let Some(stream) = self.place.dial_again(5001).await {
            if matches!(self.converse(stream).await, Ok(())) {
                return;
            }
            // It has no session that could be resumed.
            if self.token.is_none() && self.place.is_gone() {
                return;
            }
        }
    }

    async fn converse(&mut self, stream: UnixStream) -> Result<(), Broken> {
        let (reader, mut writer) = stream.into_split();
        let mut reader = FrameReader::new(reader);
        let hello = Hello {
            magic: MAGIC,
            versions: SUPPORTED,
            features: Features::RESUME,
            agent: "fake".into(),
            image: String::new(),
            resume: self.token.map(|token| Resume { token, acknowledged: self.acknowledged }),
        };
        frame::write(&mut writer, &hello).await?;
        let welcome = match reader.read().await? {
            HelloReply::Welcome(welcome) => welcome,
            HelloReply::Reject(_) => return Ok(()),
        };
        let begins = self.token.is_none();
        self.token = Some(welcome.resume_token);
        self.nonce = welcome.nonce;
        self.acknowledged = self.acknowledged.max(welcome.acknowledged);
        if begins {
            loop {
                match reader.read().await {
                    Ok(HostToAgent::SourceEnd { .. }) => break,
                    Ok(_) => {}
                    // Such a session is not resumed.
                    Err(_) => return Ok(()),
                }
            }
        }
        if let Some(may_print) = self.may_print.take() {
            may_print.await?;
        }
        for seq in self.acknowledged + 1..=self.lines + 2 {
            let event = match seq {
                1 => Event::Phase(Phase::Building),
                seq if seq < self.lines + 2 => line(seq - 1, self.width),
                _ => Event::Phase(Phase::Pushing),
            };
            let event = NumberedEvent { seq, at_ms: 1, event };
            frame::write(&mut writer, &AgentToHost::Event(event)).await?;
            tokio::time::sleep(Duration::from_millis(2)).await;
            while let Ok(message) =
                tokio::time::timeout(Duration::ZERO, reader.read::<HostToAgent>()).await
            {
                self.hear(&message?);
            }
        }
        if self.outcome.is_none() {
            let digest = self.push().await?;
            self.outcome =
                Some(Outcome::Built(Built { digest, engine: "fake".into(), lockfiles: vec![] }));
        }
        let outcome = self.outcome.clone().unwrap();
        frame::write(&mut writer, &AgentToHost::Outcome(outcome)).await?;
        loop {
            match reader.read().await? {
                HostToAgent::Finish => return Ok(()),
                message => self.hear(&message),
            }
        }
    }

    fn hear(&mut self, message: &HostToAgent) {
        if let HostToAgent::Acknowledge { seq } = message {
            self.acknowledged = self.acknowledged.max(*seq);
        }
    }

    /// An image of this build alone: a config, and no layer or one.
    async fn push(&self) -> Result<String, Broken> {
        let mut layers = vec![];
        if self.layer > 0 {
            let layer: Vec<u8> = self.name.bytes().cycle().take(self.layer).collect();
            layers.push(json!({
                "mediaType": "application/vnd.oci.image.layer.v1.tar",
                "digest": self.upload(&layer).await?, "size": layer.len(),
            }));
        }
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": { "Labels": { "build": self.name } },
            "rootfs": { "type": "layers", "diff_ids": [] },
        })
        .to_string();
        let digest = self.upload(config.as_bytes()).await?;
        let kind = "application/vnd.oci.image.manifest.v1+json";
        let manifest = json!({
            "schemaVersion": 2, "mediaType": kind, "layers": layers,
            "config": {
                "mediaType": "application/vnd.oci.image.config.v1+json",
                "digest": digest, "size": config.len(),
            },
        })
        .to_string();
        self.registry("PUT", "/v2/staging/image/manifests/result", kind, manifest.as_bytes())
            .await?;
        Ok(digest_of(manifest.as_bytes()))
    }

    /// Pushes a blob; its digest.
    async fn upload(&self, blob: &[u8]) -> Result<String, Broken> {
        let digest = digest_of(blob);
        let begun = self.registry("POST", "/v2/staging/image/blobs/uploads/", "", b"").await?;
        let location = header(&begun, "location").ok_or(Broken)?;
        let at = location.strip_prefix("http://registry.kiln").unwrap_or(&location);
        let sign = if at.contains('?') { '&' } else { '?' };
        let kind = "application/octet-stream";
        let put = format!("{at}{sign}digest={digest}");
        self.registry("PUT", &put, kind, blob).await?;
        Ok(digest)
    }

    /// One request on a connection of its own; the head of a good answer.
    async fn registry(
        &self,
        method: &str,
        path: &str,
        kind: &str,
        body: &[u8],
    ) -> Result<String, Broken> {
        let mut stream = self.place.dial(5003).await?;
        let preamble = Preamble::new(Channel::Registry, self.nonce).encode();
        let head = format!(
            "{method} {path} HTTP/1.1\r\nHost: registry.kiln\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            body.len()
        );
        stream.write_all(&[&preamble[..], head.as_bytes(), body].concat()).await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        let good = answer.starts_with("HTTP/1.1 20");
        if good { Ok(answer) } else { Err(Broken) }
    }
}

fn line(number: u64, width: usize) -> Event {
    let content = format!("{:width$}", format!("line {number}")).into_bytes();
    Event::Log(Log { stream: LogStream::Stdout, step: None, partial: false, content })
}

fn header(answer: &str, name: &str) -> Option<String> {
    let lines = answer.lines().take_while(|line| !line.is_empty());
    let found =
        lines.filter_map(|line| line.split_once(": ")).find(|(n, _)| n.eq_ignore_ascii_case(name));
    found.map(|(_, value)| value.to_owned())
}

fn digest_of(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}
