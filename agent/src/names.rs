//! The name server of the steps' network, which only tells: whoever asks for an address learns that there is none, and
//! the host learns who wanted which.
//!
//! ```text
//! step ─▶ 127.0.0.1:53, UDP or TCP ─▶ question ─▶ reported (each once of a step, so many) ─▶ answered: no such name
//! ```
//! Steps reach what they may by the proxy, which takes names. It is told before it is answered, so that what a step
//! asked for is known before the step can fail for it. [`message`] is pure.

mod message;

use std::collections::HashSet;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kiln_protocol::event::{Event, Name};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use self::message::{MAX_MESSAGE, Reply, reply};
use crate::accept;
use crate::events::{Report, Reporter};
use crate::init::net::NameSockets;
use crate::runtime::CurrentStep;

/// Names of one build that are reported; the host has a bound of its own. A step can ask for thousands in a second.
const MOST_NAMES: usize = 1000;

/// TCP is for answers that do not fit into a datagram, which there are none of.
const MAX_CONNECTIONS: usize = 16;

/// A connection on which nothing is asked for this long is closed.
const IDLE: Duration = Duration::from_secs(10);

/// Tells who asks for which name.
#[derive(Debug)]
pub struct Names {
    reporter: Reporter,
    step: CurrentStep,
    told: Mutex<HashSet<Name>>,
}

impl Names {
    /// Tells the reporter, and of which step.
    pub fn new(reporter: Reporter, step: CurrentStep) -> Self {
        Self { reporter, step, told: Mutex::default() }
    }

    /// Answers until it is cancelled.
    pub fn serve(self, sockets: NameSockets, cancel: CancellationToken) -> io::Result<()> {
        let udp = UdpSocket::from_std(sockets.udp)?;
        let tcp = TcpListener::from_std(sockets.tcp)?;
        let names = Arc::new(self);
        tokio::spawn({
            let (names, cancel) = (Arc::clone(&names), cancel.clone());
            async move { cancel.run_until_cancelled(names.datagrams(&udp)).await }
        });
        tokio::spawn(async move {
            let until = cancel.clone();
            let task = move |client| {
                let (names, until) = (Arc::clone(&names), until.clone());
                async move {
                    // How it ends is the client's business.
                    let _ = until.run_until_cancelled(names.connection(client)).await;
                }
            };
            accept::serve("the steps' name server", tcp, MAX_CONNECTIONS, task, cancel).await;
        });
        Ok(())
    }

    async fn datagrams(&self, socket: &UdpSocket) {
        let mut buffer = [0; MAX_MESSAGE];
        loop {
            match socket.recv_from(&mut buffer).await {
                Ok((length, from)) => {
                    if let Some(answer) = self.answer(&buffer[..length]).await {
                        // Whoever asked may be gone.
                        let _ = socket.send_to(&answer, from).await;
                    }
                }
                // That an answer did not arrive is told here.
                Err(error) => tracing::debug!(%error, "a datagram to the name server"),
            }
        }
    }

    async fn connection(&self, mut client: TcpStream) -> io::Result<()> {
        let mut buffer = [0; MAX_MESSAGE];
        loop {
            let length = usize::from(timeout(IDLE, client.read_u16()).await??);
            let Some(question) = buffer.get_mut(..length) else { return Ok(()) };
            timeout(IDLE, client.read_exact(question)).await??;
            let Some(answer) = self.answer(question).await else { return Ok(()) };
            // It is a question's length at most.
            let length = u16::try_from(answer.len()).unwrap_or(u16::MAX);
            let framed = [&length.to_be_bytes()[..], &answer].concat();
            timeout(IDLE, client.write_all(&framed)).await??;
        }
    }

    async fn answer(&self, question: &[u8]) -> Option<Vec<u8>> {
        let Reply { bytes, name } = reply(question)?;
        if let Some(host) = name {
            self.tell(Name { step: self.step.now(), host }).await;
        }
        Some(bytes)
    }

    async fn tell(&self, name: Name) {
        let is_new = {
            let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
            told.len() < MOST_NAMES && told.insert(name.clone())
        };
        if is_new {
            self.reporter.report(Report::Event(Event::Name(name))).await;
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::net::SocketAddr;

    use tokio::sync::mpsc;

    use super::message::tests::question;
    use super::*;
    use crate::events;

    struct Bench {
        udp: SocketAddr,
        tcp: SocketAddr,
        step: CurrentStep,
        reports: mpsc::Receiver<Report>,
        cancel: CancellationToken,
    }

    fn serve() -> Bench {
        let (udp, tcp) = (
            std::net::UdpSocket::bind("127.0.0.1:0").unwrap(),
            std::net::TcpListener::bind("127.0.0.1:0").unwrap(),
        );
        udp.set_nonblocking(true).unwrap();
        tcp.set_nonblocking(true).unwrap();
        let (reporter, reports) = events::channel();
        let (step, cancel) = (CurrentStep::default(), CancellationToken::new());
        let addresses = (udp.local_addr().unwrap(), tcp.local_addr().unwrap());
        let names = Names::new(reporter, step.clone());
        names.serve(NameSockets { udp, tcp }, cancel.clone()).unwrap();
        Bench { udp: addresses.0, tcp: addresses.1, step, reports, cancel }
    }

    impl Bench {
        async fn ask(&self, message: &[u8]) -> Vec<u8> {
            let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            client.send_to(message, self.udp).await.unwrap();
            let mut answer = [0; 512];
            let length = client.recv(&mut answer).await.unwrap();
            answer[..length].to_vec()
        }

        fn told(&mut self) -> Vec<(Option<u32>, String)> {
            let mut told = vec![];
            while let Ok(report) = self.reports.try_recv() {
                let Report::Event(Event::Name(Name { step, host })) = report else { panic!() };
                told.push((step, host));
            }
            told
        }
    }

    #[tokio::test]
    async fn a_question_is_told_once_of_each_step_before_it_is_answered() {
        let mut bench = serve();
        assert_eq!(bench.ask(&question(b"\x01A\x04test\0")).await[3] & 0xf, 3);
        assert_eq!(bench.told(), [(None, "a.test".to_owned())]);
        let running = bench.step.begin(2);
        for _ in 0..2 {
            bench.ask(&question(b"\x01a\x04test\0")).await;
        }
        drop(running);
        assert_eq!(bench.told(), [(Some(2), "a.test".to_owned())]);
        bench.cancel.cancel();
    }

    #[tokio::test]
    async fn connections_carry_several_questions() {
        let mut bench = serve();
        let mut client = TcpStream::connect(bench.tcp).await.unwrap();
        for name in [&b"\x01a\0"[..], b"\x01b\0"] {
            let question = question(name);
            client.write_u16(u16::try_from(question.len()).unwrap()).await.unwrap();
            client.write_all(&question).await.unwrap();
            let length = client.read_u16().await.unwrap();
            let mut answer = vec![0; length.into()];
            client.read_exact(&mut answer).await.unwrap();
            assert_eq!((answer.len(), answer[3] & 0xf), (question.len(), 3));
        }
        assert_eq!(bench.told(), [(None, "a".to_owned()), (None, "b".to_owned())]);
        // What is longer than any question ends it.
        client.write_u16(u16::MAX).await.unwrap();
        assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn names_are_bounded_and_answered_all_the_same() {
        let mut bench = serve();
        let mut told = 0;
        for n in 0..MOST_NAMES + 10 {
            let label = n.to_string();
            let mut name = vec![u8::try_from(label.len()).unwrap()];
            name.extend(label.bytes().chain([0]));
            assert_eq!(bench.ask(&question(&name)).await[3] & 0xf, 3);
            told += bench.told().len();
        }
        assert_eq!(told, MOST_NAMES);
    }

    #[tokio::test]
    async fn what_is_no_question_is_not_answered() {
        let mut bench = serve();
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        client.send_to(b"short", bench.udp).await.unwrap();
        // The next one is the first that is answered.
        client.send_to(&question(b"\x01a\0"), bench.udp).await.unwrap();
        let mut answer = [0; 512];
        let length = client.recv(&mut answer).await.unwrap();
        assert_eq!(length, question(b"\x01a\0").len());
        assert_eq!(bench.told().len(), 1);
    }
}
