//! Follows a build's events over connections that break.
//!
//! A stream that ends early, errs or falls silent is opened again after the last event that was
//! seen, with growing pauses, until nothing has come for as long as the user's patience lasts. A
//! server that never answered is not waited for: there the first error is the end.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use tokio::time::Instant;

use super::client::{CallError, Client, innermost};
use super::error::CliError;
use super::sse::{Block, Parser};
use super::view::EventView;

/// Three of the server's heartbeats (15 s): a connection that is silent for longer is dead.
pub(super) const SILENCE: Duration = Duration::from_secs(45);
/// The first pause before another try, unless the server's `retry:` says so.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(5);

/// An event as it came.
#[derive(Clone, Debug, PartialEq)]
pub struct Received {
    /// The JSON text.
    pub data: String,
    /// What it says.
    pub event: EventView,
}

/// Something for the one who watches.
#[derive(Debug)]
pub enum Seen<'a> {
    /// An event.
    Event(&'a Received),
    /// The connection was lost, and why; it is being made again.
    Reconnecting(&'a str),
}

/// Follows one build. Kept over an interruption, it goes on where it was.
#[derive(Debug)]
pub struct Follower<'a> {
    client: &'a Client,
    id: &'a str,
    patience: Duration,
    /// The server has answered before.
    reached: bool,
    last: Option<String>,
    retry: Option<Duration>,
    /// Since when nothing has come.
    quiet_since: Instant,
}

/// How one connection's stream ended.
#[derive(Debug, PartialEq)]
enum End {
    /// With the final status.
    Final,
    /// Nothing more came.
    Closed,
    /// Not in order, and why.
    Broken(String),
}

impl<'a> Follower<'a> {
    /// Follows a build from its first event.
    pub fn new(client: &'a Client, id: &'a str, patience: Duration) -> Self {
        let quiet_since = Instant::now();
        Self { client, id, patience, reached: false, last: None, retry: None, quiet_since }
    }

    /// The same for a build that this process has made: the server was there a moment ago.
    #[must_use]
    pub fn of_reached(mut self) -> Self {
        self.reached = true;
        self
    }

    /// Gives `see` every event up to the final status.
    pub async fn to_the_end(
        &mut self,
        see: &mut impl FnMut(Seen<'_>) -> Result<(), CliError>,
    ) -> Result<(), CliError> {
        self.run(true, see).await
    }

    /// Gives `see` every event that is stored by now.
    pub async fn what_there_is(
        &mut self,
        see: &mut impl FnMut(Seen<'_>) -> Result<(), CliError>,
    ) -> Result<(), CliError> {
        self.run(false, see).await
    }

    async fn run(
        &mut self,
        follow: bool,
        see: &mut impl FnMut(Seen<'_>) -> Result<(), CliError>,
    ) -> Result<(), CliError> {
        self.quiet_since = Instant::now();
        let mut tries = 0;
        loop {
            let before = self.quiet_since;
            let why = match self.client.events(self.id, follow, self.last.as_deref()).await {
                Ok(response) => {
                    self.reached = true;
                    let stream =
                        response.bytes_stream().map(|part| part.map_err(|e| innermost(&e)));
                    match self.read(stream, see).await? {
                        End::Final => return Ok(()),
                        End::Closed if !follow => return Ok(()),
                        End::Closed => "the server ended it early".to_owned(),
                        End::Broken(why) => why,
                    }
                }
                Err(error) if self.reached && error.is_passing() => error.to_string(),
                Err(error) => return Err(error.into()),
            };
            tries = if self.quiet_since > before { 0 } else { tries + 1 };
            let pause = pause(tries, self.retry);
            if self.quiet_since.elapsed() + pause > self.patience {
                let message = format!("lost the server while following build {}: {why}", self.id);
                let hint = format!("the build may still run; go on with: kiln logs -f {}", self.id);
                return Err(CliError::host(message).hint(hint));
            }
            if tries <= 1 {
                see(Seen::Reconnecting(&why))?;
            }
            tokio::time::sleep(pause).await;
        }
    }

    async fn read(
        &mut self,
        stream: impl Stream<Item = Result<Bytes, String>>,
        see: &mut impl FnMut(Seen<'_>) -> Result<(), CliError>,
    ) -> Result<End, CliError> {
        let mut stream = std::pin::pin!(stream);
        let mut parser = Parser::default();
        loop {
            let part = match tokio::time::timeout(SILENCE, stream.next()).await {
                Ok(Some(Ok(part))) => part,
                Ok(Some(Err(why))) => return Ok(End::Broken(why)),
                Ok(None) => return Ok(End::Closed),
                Err(_) => return Ok(End::Broken("it fell silent".into())),
            };
            let blocks = parser.push(&part).map_err(|e| CliError::host(e.to_string()))?;
            for block in blocks {
                let Some(received) = self.take(block) else { continue };
                // Only what is new counts: a server that repeats itself for ever is lost too.
                self.quiet_since = Instant::now();
                see(Seen::Event(&received))?;
                if received.event.is_final() {
                    return Ok(End::Final);
                }
            }
        }
    }

    /// The event of a block, unless it was seen before or is none.
    fn take(&mut self, block: Block) -> Option<Received> {
        self.retry = block.retry.or(self.retry);
        if let Some(id) = block.id {
            let number = |id: &str| id.parse::<u64>().ok();
            let last = self.last.as_deref().and_then(number);
            if number(&id).zip(last).is_some_and(|(id, last)| id <= last) {
                return None;
            }
            self.last = Some(id);
        }
        let event = serde_json::from_str(&block.data).ok()?;
        Some(Received { data: block.data, event })
    }
}

/// A call that is made again for as long as patience lasts.
pub async fn patiently<T>(
    patience: Duration,
    mut call: impl AsyncFnMut() -> Result<T, CallError>,
) -> Result<T, CallError> {
    let start = Instant::now();
    let mut tries = 0;
    loop {
        let error = match call().await {
            Err(error) if error.is_passing() => error,
            other => return other,
        };
        tries += 1;
        let pause = pause(tries, None);
        if start.elapsed() + pause > patience {
            return Err(error);
        }
        tokio::time::sleep(pause).await;
    }
}

pub(super) fn pause(tries: u32, retry: Option<Duration>) -> Duration {
    let first = retry.unwrap_or(FIRST_PAUSE).clamp(Duration::from_millis(50), LONGEST_PAUSE);
    first.saturating_mul(1 << tries.saturating_sub(1).min(8)).min(LONGEST_PAUSE)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::super::client::Connect;
    use super::*;
    use clap::Parser as _;

    #[derive(clap::Parser)]
    struct Args {
        #[command(flatten)]
        connect: Connect,
    }

    fn client() -> Client {
        // Another test of this process may have been first.
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        Client::new(&Args::parse_from(["kiln"]).connect).unwrap()
    }

    fn parts(parts: &[&str]) -> impl Stream<Item = Result<Bytes, String>> + use<> {
        let parts: Vec<_> = parts.iter().map(|p| Ok(Bytes::from((*p).to_owned()))).collect();
        futures_util::stream::iter(parts)
    }

    async fn read(
        follower: &mut Follower<'_>,
        stream: impl Stream<Item = Result<Bytes, String>>,
    ) -> (End, Vec<String>) {
        let mut seen = vec![];
        let mut see = |event: Seen<'_>| {
            if let Seen::Event(received) = event {
                seen.push(received.data.clone());
            }
            Ok(())
        };
        let end = follower.read(stream, &mut see).await.unwrap();
        (end, seen)
    }

    #[tokio::test]
    async fn an_event_that_comes_twice_is_seen_once() {
        let client = client();
        let mut follower = Follower::new(&client, "b1", Duration::from_secs(1));
        let first =
            parts(&["id: 1\ndata: {\"type\":\"x\"}\n\nid: 2\ndata: {\"ty", "pe\":\"y\"}\n\n"]);
        let (end, seen) = read(&mut follower, first).await;
        assert_eq!((end, seen.len()), (End::Closed, 2));
        let last = "{\"type\":\"status\",\"status\":\"ready\"}";
        let text = format!("id: 2\ndata: {{\"type\":\"y\"}}\n\nid: 3\ndata: {last}\n\n");
        let (end, seen) = read(&mut follower, parts(&[&text])).await;
        assert_eq!((end, seen), (End::Final, vec![last.to_owned()]));
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_connection_is_given_up() {
        let client = client();
        let mut follower = Follower::new(&client, "b1", Duration::from_secs(1));
        let (end, _) = read(&mut follower, futures_util::stream::pending()).await;
        assert_eq!(end, End::Broken("it fell silent".into()));
    }

    #[tokio::test]
    async fn a_block_that_is_no_event_is_passed_over() {
        let client = client();
        let mut follower = Follower::new(&client, "b1", Duration::from_secs(1));
        let (end, seen) = read(&mut follower, parts(&["id: 1\ndata: nonsense\n\n"])).await;
        assert_eq!((end, seen.len()), (End::Closed, 0));
    }

    #[test]
    fn pauses_grow_to_a_bound() {
        let ms = |tries| pause(tries, None).as_millis();
        assert_eq!([ms(0), ms(1), ms(2), ms(3), ms(6), ms(99)], [250, 250, 500, 1000, 5000, 5000]);
        assert_eq!(
            pause(1, Some(Duration::ZERO)).as_millis(),
            50,
            "a server cannot ask for a storm"
        );
        assert_eq!(pause(1, Some(Duration::from_hours(1))), LONGEST_PAUSE);
    }

    #[tokio::test(start_paused = true)]
    async fn patience_ends() {
        let mut calls = 0;
        let result: Result<(), _> = patiently(Duration::from_secs(2), async || {
            calls += 1;
            Err(CallError::Unreachable { url: "u".into(), cause: "c".into() })
        })
        .await;
        assert!(result.is_err());
        assert_eq!(calls, 4, "at 0, 0.25, 0.75 and 1.75 s");
    }
}
