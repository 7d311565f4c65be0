//! The egress proxy of one build's steps: HTTP/1.1, `CONNECT` and plain HTTP in absolute form.
//!
//! ```text
//! step ─▶ 127.0.0.1:3128 ─▶ vsock 5004 ─▶ preamble checked (tunnel) ─▶ serve ─▶ resolve ─▶ policy ─▶ connect
//! ```
//!
//! A name is resolved once, every address of it is judged, and the connection goes to an address that was judged: what
//! a name server says a moment later changes nothing. A redirect is the client's own next request and is judged as such.
//! An allow-list ([`domains`]) is asked before the name is resolved: a question to a name server would carry data out.
//! Without one any port may be reached; the policy is about whose machine it is.
//!
//! | answer | when |
//! |---|---|
//! | 403 | the policy refuses; one line of text says why, and the [`Observer`] is told |
//! | 400 | not a request for a proxy |
//! | 502, 504 | the name does not resolve, the host does not answer (in time) |

pub mod domains;
pub mod policy;
mod relay;
mod target;

use std::convert::Infallible;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use http::header::{CONNECTION, CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue};
use http::{Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use ipnet::IpNet;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use self::domains::Domain;
use self::policy::{Class, Verdict};
use self::relay::{Activity, Watched};
use self::target::Target;

/// Steps rarely have more than a few dozen downloads at once; more wait.
pub const MAX_CONNECTIONS: usize = 64;

/// For a request's line and headers.
const MAX_HEAD: usize = 16 * 1024;

/// A client that has connected says what it wants within this, or is closed.
const HEAD_DEADLINE: Duration = Duration::from_secs(30);

/// For resolving, and again for connecting.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);

/// A connection on which nothing moves for this long is closed.
const IDLE_DEADLINE: Duration = Duration::from_mins(5);

/// Learns what a build reached, and what it was refused. Called for every request, so it must not block. The
/// host's name is the guest's word, of characters that a name may have.
pub trait Observer: Send + Sync {
    /// A connection was made, by this step as the guest says.
    fn reached(&self, step: Option<u32>, host: &str, port: u16);
    /// The policy refused one.
    fn refused(&self, step: Option<u32>, host: &str, port: u16, why: Denied);
}

/// Why the policy refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, thiserror::Error)]
pub enum Denied {
    /// Nothing may be reached.
    #[error("this build has no network")]
    NoNetwork,
    /// The name, or the port, is not on the build's list.
    #[error("it is not on the build's list of allowed domains")]
    NotListed,
    /// An address of it is somebody's whom builds may not reach.
    #[error("it is {0}, which builds may not reach")]
    Address(Class),
}

/// What steps may reach at all.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Nothing: every request is refused.
    Nothing,
    /// Of what is public, and what the operator permits, these names.
    Listed(Arc<[Domain]>),
    /// What is public, and what the operator permits.
    Public,
}

/// Turns names into addresses.
#[async_trait]
pub trait Resolve: Send + Sync {
    /// The addresses of a name, in the order to try.
    async fn addresses(&self, host: &str) -> std::io::Result<Vec<IpAddr>>;
}

/// Lookups of all VMs at one time. The runtime has some 500 threads for what blocks.
static LOOKUPS: Semaphore = Semaphore::const_new(64);

/// The host's resolver.
#[derive(Debug)]
pub struct SystemResolver;

#[async_trait]
impl Resolve for SystemResolver {
    async fn addresses(&self, host: &str) -> std::io::Result<Vec<IpAddr>> {
        // The permit goes with the lookup, which nobody can stop: given up by its caller it still holds a
        // thread that file operations need.
        let permit = LOOKUPS.acquire().await.map_err(std::io::Error::other)?;
        let host = host.to_owned();
        let lookup = tokio::task::spawn_blocking(move || {
            let addresses = (host.as_str(), 0).to_socket_addrs()?;
            let addresses = addresses.map(|address| address.ip()).collect();
            drop(permit);
            Ok(addresses)
        });
        lookup.await.map_err(std::io::Error::other)?
    }
}

/// What the proxy of one VM knows.
pub struct EgressContext {
    reach: Reach,
    permitted: Vec<IpNet>,
    own: Vec<IpAddr>,
    observer: Arc<dyn Observer>,
    resolver: Arc<dyn Resolve>,
    connections: Semaphore,
}

impl EgressContext {
    /// `permitted` are the operator's ranges, which are reached whatever they are; `own` the host's
    /// addresses ([`policy::own_addresses`]).
    pub fn new(
        reach: Reach,
        permitted: Vec<IpNet>,
        own: Vec<IpAddr>,
        observer: Arc<dyn Observer>,
    ) -> Self {
        let connections = Semaphore::new(MAX_CONNECTIONS);
        Self { reach, permitted, own, observer, resolver: Arc::new(SystemResolver), connections }
    }

    /// With another resolver.
    #[must_use]
    pub fn with_resolver(mut self, resolver: Arc<dyn Resolve>) -> Self {
        self.resolver = resolver;
        self
    }
}

/// Serves one connection of a client, whose preamble has been read, until it ends, idles or is cancelled. `step` is
/// what the preamble names. At most [`MAX_CONNECTIONS`] of a VM are served at once.
pub async fn serve<S>(
    stream: S,
    step: Option<u32>,
    context: Arc<EgressContext>,
    cancel: CancellationToken,
) where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let activity = Activity::new();
    let work = async {
        let Ok(_permit) = context.connections.acquire().await else { return };
        activity.touch();
        let connection = Arc::new(Connection {
            context: Arc::clone(&context),
            step,
            upstream: Mutex::default(),
        });
        converse(Watched::new(stream, activity.clone()), &connection).await;
    };
    tokio::select! {
        () = cancel.cancelled() => {}
        () = activity.idle_for(IDLE_DEADLINE) => tracing::debug!("closed an idle egress connection"),
        () = work => {}
    }
}

/// One connection of a client. HTTP/1 is one exchange after the other, so it has one upstream at a time.
struct Connection {
    context: Arc<EgressContext>,
    step: Option<u32>,
    upstream: Mutex<Option<Upstream>>,
}

enum Upstream {
    /// Becomes a tunnel once the client's side is handed over.
    Tunnel(hyper::upgrade::OnUpgrade, TcpStream),
    /// Drives an exchange; dropped with the connection.
    Exchange(#[allow(dead_code)] AbortOnDropHandle<()>),
}

type Body = BoxBody<Bytes, hyper::Error>;

/// Requests in turn, then, after a CONNECT, bytes. Everything it starts ends with it.
async fn converse<S>(stream: Watched<S>, connection: &Arc<Connection>)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let service = service_fn(|request| {
        let connection = Arc::clone(connection);
        async move {
            Ok::<_, Infallible>(
                connection.answer(request).await.unwrap_or_else(Refusal::into_response),
            )
        }
    });
    let mut http = hyper::server::conn::http1::Builder::new();
    http.max_buf_size(MAX_HEAD).timer(TokioTimer::new()).header_read_timeout(HEAD_DEADLINE);
    if let Err(error) = http.serve_connection(TokioIo::new(stream), service).with_upgrades().await {
        tracing::debug!(%error, "an egress connection ended");
        return;
    }
    let upstream = connection.hold(None);
    if let Some(Upstream::Tunnel(upgrade, upstream)) = upstream {
        match upgrade.await {
            Ok(client) => relay::relay(TokioIo::new(client), upstream).await,
            Err(error) => tracing::debug!(%error, "a client went away before its tunnel began"),
        }
    }
}

impl Connection {
    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Body>, Refusal> {
        if request.method() == Method::CONNECT {
            self.tunnel(request).await
        } else {
            self.forward(request).await
        }
    }

    async fn tunnel(&self, mut request: Request<Incoming>) -> Result<Response<Body>, Refusal> {
        let target = Target::of_connect(request.uri())?;
        let upstream = self.connect(&target).await?;
        let upgrade = hyper::upgrade::on(&mut request);
        self.hold(Some(Upstream::Tunnel(upgrade, upstream)));
        Ok(Response::new(Full::default().map_err(|never| match never {}).boxed()))
    }

    async fn forward(&self, mut request: Request<Incoming>) -> Result<Response<Body>, Refusal> {
        let target = Target::of_absolute(request.uri())?;
        let upstream = self.connect(&target).await?;
        let origin = request.uri().path_and_query().map_or("/", |p| p.as_str()).to_owned();
        *request.uri_mut() =
            Uri::try_from(origin).map_err(|_| Refusal::bad("the request's path is malformed"))?;
        end_to_end(request.headers_mut());
        // Whatever the client's said: a server must not see another name than was judged.
        let host = HeaderValue::from_str(&target.authority())
            .map_err(|_| Refusal::bad("the host is malformed"))?;
        request.headers_mut().insert(HOST, host);

        let mut http = hyper::client::conn::http1::Builder::new();
        http.max_buf_size(4 * MAX_HEAD);
        let gone = |error: hyper::Error| {
            Refusal::new(
                StatusCode::BAD_GATEWAY,
                format!("{} did not answer as HTTP: {error}", target.host()),
            )
        };
        let (mut sender, driver) = http.handshake(TokioIo::new(upstream)).await.map_err(gone)?;
        let drive = async move {
            if let Err(error) = driver.await {
                tracing::debug!(%error, "an upstream of the egress proxy ended");
            }
        };
        self.hold(Some(Upstream::Exchange(AbortOnDropHandle::new(tokio::spawn(drive)))));
        let mut response = sender.send_request(request).await.map_err(gone)?;
        end_to_end(response.headers_mut());
        *response.version_mut() = http::Version::HTTP_11;
        Ok(response.map(BodyExt::boxed))
    }

    /// To an address that was judged, or to none.
    async fn connect(&self, target: &Target) -> Result<TcpStream, Refusal> {
        let context = &self.context;
        let addresses = self.judged(target).await.inspect_err(|refusal| {
            if let Some(why) = refusal.denied {
                context.observer.refused(self.step, target.host(), target.port(), why);
            }
        })?;
        let unreachable = |status, why: String| {
            Refusal::new(
                status,
                format!("{}:{} was not reached: {why}", target.host(), target.port()),
            )
        };
        let attempt = async {
            let mut last = None;
            for ip in addresses {
                match TcpStream::connect(SocketAddr::new(ip, target.port())).await {
                    Ok(stream) => return Ok(stream),
                    Err(error) => last = Some(error),
                }
            }
            Err(last.map_or_else(|| "it has no address".to_owned(), |error| error.to_string()))
        };
        let stream = timeout(CONNECT_DEADLINE, attempt)
            .await
            .map_err(|_| {
                unreachable(
                    StatusCode::GATEWAY_TIMEOUT,
                    format!("no answer within {CONNECT_DEADLINE:?}"),
                )
            })?
            .map_err(|why| unreachable(StatusCode::BAD_GATEWAY, why))?;
        let _ = stream.set_nodelay(true);
        context.observer.reached(self.step, target.host(), target.port());
        Ok(stream)
    }

    /// The target's addresses, when every one of them may be reached. A name that has one that may not is
    /// refused as a whole: mixing them is how names are rebound.
    async fn judged(&self, target: &Target) -> Result<Vec<IpAddr>, Refusal> {
        let context = &self.context;
        match &context.reach {
            Reach::Nothing => {
                return Err(Refusal::denied(Denied::NoNetwork, "this build has no network"));
            }
            // Before it is resolved, and an address is none of a list's.
            Reach::Listed(domains) if !is_listed(domains, target) => {
                let (host, port) = (target.host(), target.port());
                let reason =
                    format!("{host}:{port} is not on this build's list of allowed domains");
                return Err(Refusal::denied(Denied::NotListed, reason));
            }
            Reach::Listed(_) | Reach::Public => {}
        }
        let addresses = match target.literal() {
            Some(ip) => vec![ip],
            None => timeout(CONNECT_DEADLINE, context.resolver.addresses(target.host()))
                .await
                .map_err(|_| {
                    Refusal::new(
                        StatusCode::GATEWAY_TIMEOUT,
                        format!("{} did not resolve in time", target.host()),
                    )
                })?
                .map_err(|e| {
                    Refusal::new(
                        StatusCode::BAD_GATEWAY,
                        format!("{} did not resolve: {e}", target.host()),
                    )
                })?,
        };
        for ip in &addresses {
            if let Verdict::Refused(class) = policy::verdict(*ip, &context.permitted, &context.own)
            {
                let host = target.host();
                let subject = if target.literal().is_some() {
                    host.to_owned()
                } else {
                    format!("{host} ({ip})")
                };
                let reason = format!("{subject} is {class}, which builds may not reach");
                return Err(Refusal::denied(Denied::Address(class), reason));
            }
        }
        Ok(addresses)
    }

    /// Keeps what the exchange needs, and gives back what the one before did.
    fn hold(&self, upstream: Option<Upstream>) -> Option<Upstream> {
        let mut held = self.upstream.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::replace(&mut *held, upstream)
    }
}

fn is_listed(domains: &[Domain], target: &Target) -> bool {
    target.literal().is_none()
        && domains.iter().any(|domain| domain.allows(target.host(), target.port()))
}

/// Why a request is not served. The reason is one line, for the step's log.
#[derive(Debug)]
struct Refusal {
    status: StatusCode,
    reason: String,
    /// Where it is the policy that refuses.
    denied: Option<Denied>,
}

impl Refusal {
    fn new(status: StatusCode, reason: impl Into<String>) -> Self {
        Self { status, reason: reason.into(), denied: None }
    }

    fn denied(why: Denied, reason: impl Into<String>) -> Self {
        Self { denied: Some(why), ..Self::new(StatusCode::FORBIDDEN, reason) }
    }

    fn bad(reason: &str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, reason)
    }

    fn into_response(self) -> Response<Body> {
        let text = format!("kiln egress: {}\n", self.reason);
        let mut response = Response::new(Full::from(text).map_err(|never| match never {}).boxed());
        *response.status_mut() = self.status;
        response
            .headers_mut()
            .insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        response
    }
}

/// Drops the headers that are between a client and its proxy alone (RFC 9110, section 7.6.1), those that `Connection` names,
/// and every `Proxy-…`.
fn end_to_end(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    let hop_by_hop = ["connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"];
    let drop: Vec<HeaderName> = headers
        .keys()
        .filter(|name| {
            hop_by_hop.contains(&name.as_str())
                || name.as_str().starts_with("proxy-")
                || named.contains(name)
        })
        // What frames the body is hyper's to say again, and no header may be named away.
        .filter(|name| **name != http::header::CONTENT_LENGTH)
        .cloned()
        .collect();
    for name in drop {
        headers.remove(name);
    }
}
