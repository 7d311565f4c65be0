//! A VM without a guest's kernel: two real processes that only wait, and an agent that is the test.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use kiln_protocol::event::{Event, Log, LogStream, NumberedEvent, Outcome, Phase};
use kiln_protocol::frame::{self, FrameReader};
use kiln_protocol::hello::{Hello, HelloReply, MAGIC, Welcome};
use kiln_protocol::message::{AgentToHost, HostToAgent};
use kiln_protocol::version::{Features, SUPPORTED};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

/// `pause(2)`, for ever.
const WAIT: &[u8] = &[
    0xb8, 0x22, 0, 0, 0, // mov eax, 34
    0x0f, 0x05, // syscall
    0xeb, 0xf7, // jmp back
];

/// Listens on the socket `vu` in its working directory, which is all that QEMU's start waits for; then as [`WAIT`].
/// Ends when it is asked for its version: with fewer than two arguments.
const LISTEN: &[u8] = &[
    0x83, 0x3c, 0x24, 3, // cmp dword [rsp], 3
    0x73, 9, // jae to the socket
    0xb8, 0x3c, 0, 0, 0, // mov eax, 60 (exit)
    0x31, 0xff, // xor edi, edi
    0x0f, 0x05, // syscall
    0xb8, 0x29, 0, 0, 0, // mov eax, 41 (socket)
    0xbf, 1, 0, 0, 0, // mov edi, AF_UNIX
    0xbe, 1, 0, 0, 0, // mov esi, SOCK_STREAM
    0x31, 0xd2, // xor edx, edx
    0x0f, 0x05, // syscall
    0x89, 0xc7, // mov edi, eax
    0x48, 0x8d, 0x35, 0x21, 0, 0, 0, // lea rsi, [rip + 0x21]
    0xba, 5, 0, 0, 0, // mov edx, 5
    0xb8, 0x31, 0, 0, 0, // mov eax, 49 (bind)
    0x0f, 0x05, // syscall
    0xbe, 8, 0, 0, 0, // mov esi, 8
    0xb8, 0x32, 0, 0, 0, // mov eax, 50 (listen)
    0x0f, 0x05, // syscall
    0xb8, 0x22, 0, 0, 0, // mov eax, 34 (pause)
    0x0f, 0x05, // syscall
    0xeb, 0xf7, // jmp back
    1, 0, b'v', b'u', 0, // the address
];

/// Programs that stand for QEMU and for the vsock device, whatever arguments they get.
pub fn programs(dir: &Path) -> [PathBuf; 2] {
    [("qemu", WAIT), ("device", LISTEN)].map(|(name, code)| {
        let path = dir.join(name);
        let mut file =
            std::fs::File::options().create_new(true).write(true).mode(0o755).open(&path).unwrap();
        file.write_all(&executable(code)).unwrap();
        path
    })
}

/// An ELF file for x86-64 with one segment: its two headers, and the code right behind them.
fn executable(code: &[u8]) -> Vec<u8> {
    const AT: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let mut put = |bytes: &[u8]| file.extend_from_slice(bytes);
    put(&2_u16.to_le_bytes());
    put(&62_u16.to_le_bytes());
    put(&1_u32.to_le_bytes());
    put(&(AT + HEADERS).to_le_bytes());
    put(&64_u64.to_le_bytes());
    put(&0_u64.to_le_bytes());
    put(&0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 0, 0, 0] {
        put(&half.to_le_bytes());
    }
    // A segment to load: readable and executable.
    put(&1_u32.to_le_bytes());
    put(&5_u32.to_le_bytes());
    let size = HEADERS + code.len() as u64;
    for word in [0, AT, AT, size, size, 0x1000] {
        put(&word.to_le_bytes());
    }
    put(code);
    file
}

/// The agent's end of a control connection.
pub struct Agent {
    reader: FrameReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
}

impl Agent {
    /// Dials as the agent of the VM in this directory does, and is welcomed.
    pub async fn boot(vm: &Path) -> (Self, Welcome) {
        Self::over(UnixStream::connect(vm.join("sock/v_5001")).await.unwrap()).await
    }

    /// The same over a connection that is there.
    pub async fn over(stream: UnixStream) -> (Self, Welcome) {
        let (reader, writer) = stream.into_split();
        let mut agent = Self { reader: FrameReader::new(reader), writer };
        let hello = Hello {
            magic: MAGIC,
            versions: SUPPORTED,
            features: Features::RESUME,
            agent: "test".into(),
            image: String::new(),
            resume: None,
        };
        frame::write(&mut agent.writer, &hello).await.unwrap();
        let HelloReply::Welcome(welcome) = agent.reader.read().await.unwrap() else {
            panic!("not welcome")
        };
        (agent, welcome)
    }

    pub async fn say(&mut self, message: AgentToHost) {
        frame::write(&mut self.writer, &message).await.unwrap();
    }

    pub async fn event(&mut self, seq: u64, event: Event) {
        self.say(AgentToHost::Event(NumberedEvent { seq, at_ms: 1, event })).await;
    }

    pub async fn print(&mut self, seq: u64, line: &str) {
        let stream = LogStream::Stdout;
        let log = Log { stream, step: None, partial: false, content: line.into() };
        self.event(seq, Event::Log(log)).await;
    }

    /// Takes job and source, and begins.
    pub async fn begin(&mut self) {
        loop {
            match self.reader.read().await.unwrap() {
                HostToAgent::SourceEnd { .. } => break,
                HostToAgent::Job(_) | HostToAgent::Source(_) => {}
                other => panic!("{other:?}"),
            }
        }
        self.event(1, Event::Phase(Phase::Building)).await;
    }

    pub async fn end(&mut self, outcome: Outcome) {
        self.say(AgentToHost::Outcome(outcome)).await;
    }

    /// Whether the host has stored everything up to this event.
    pub async fn acknowledged(&mut self, event: u64) -> bool {
        loop {
            match self.reader.read().await {
                Ok(HostToAgent::Acknowledge { seq }) if seq >= event => return true,
                Ok(_) => {}
                Err(_) => return false,
            }
        }
    }

    /// The next that the host says, but for acknowledgements; `None` once it has hung up.
    pub async fn hear(&mut self) -> Option<HostToAgent> {
        loop {
            match self.reader.read().await {
                Ok(HostToAgent::Acknowledge { .. }) => {}
                Ok(other) => return Some(other),
                Err(_) => return None,
            }
        }
    }
}
