//! How an upstream is asked: by itself with what it wants of a login, and elsewhere, where it sends Kiln, with less.
//!
//! The upstream is where the operator says. Where *it* sends Kiln, to its blobs' store or its token service, is a
//! stranger's word: such a place is asked without the registry's `Authorization`, over TLS where the upstream is, and its
//! addresses are judged as those of a build's steps are ([`policy`]), after resolution. An upstream that answers from
//! a private address itself may send to others of these, but never to a link-local one or a metadata service.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use http::{HeaderValue, Method, header};
use ipnet::IpNet;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

use super::error::UpstreamError;
use crate::egress::policy::{self, Class, Verdict};
use crate::gateway::backing::{self, PATIENCE};

/// Redirects of one request.
const MAX_REDIRECTS: usize = 5;

/// Which addresses Kiln goes to when an upstream sends it there.
#[derive(Clone, Debug, Default)]
pub struct Guard {
    /// Ranges that count as public: `--egress-permit`.
    pub permitted: Vec<IpNet>,
}

/// It does not go there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{address} is {class}")]
struct Forbidden {
    address: IpAddr,
    class: Class,
}

impl Guard {
    fn class(&self, address: IpAddr) -> std::io::Result<Option<Class>> {
        // Asked each time: it may have changed since the start.
        let own = policy::own_addresses()?;
        Ok(match policy::verdict(address, &self.permitted, &own) {
            Verdict::Allowed => None,
            Verdict::Refused(class) => Some(class),
        })
    }

    /// `near`: the upstream's own address is private.
    fn check(&self, address: IpAddr, near: bool) -> std::io::Result<()> {
        match self.class(address)? {
            None => Ok(()),
            Some(class) if near && is_near(class) => Ok(()),
            Some(class) => Err(std::io::Error::other(Forbidden { address, class })),
        }
    }
}

/// Whether a class is that of an operator's own network.
fn is_near(class: Class) -> bool {
    matches!(class, Class::Host | Class::Loopback | Class::Private | Class::CarrierNat)
}

/// Resolves names, and refuses one that has an address where Kiln does not go.
struct Judging {
    guard: Guard,
    near: bool,
}

impl Resolve for Judging {
    fn resolve(&self, name: Name) -> Resolving {
        let (guard, near) = (self.guard.clone(), self.near);
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let found: Vec<SocketAddr> = found.collect();
            for address in &found {
                guard.check(address.ip(), near)?;
            }
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}

/// The ways to one upstream.
#[derive(Debug)]
pub(super) struct Reach {
    base: Url,
    guard: Guard,
    own: reqwest::Client,
    /// To public addresses only.
    public: reqwest::Client,
    /// To those of private networks, too.
    near: reqwest::Client,
    /// Whether it answered from a private address.
    is_near: AtomicBool,
}

impl Reach {
    pub fn new(base: &Url, guard: Guard) -> Result<Self, UpstreamError> {
        let none = reqwest::redirect::Policy::none;
        let own = backing::builder().redirect(none()).build();
        let judging = |near| {
            let judging = Judging { guard: guard.clone(), near };
            backing::builder().redirect(none()).dns_resolver(Arc::new(judging)).build()
        };
        Ok(Self {
            base: base.clone(),
            own: own.map_err(UpstreamError::Client)?,
            public: judging(false).map_err(UpstreamError::Client)?,
            near: judging(true).map_err(UpstreamError::Client)?,
            guard,
            is_near: AtomicBool::new(false),
        })
    }

    /// Asks for a path; goes where the upstream sends, and loses the login on its way out.
    pub async fn ask(
        &self,
        method: &Method,
        path: &str,
        accept: Option<&HeaderValue>,
        authorization: Option<&HeaderValue>,
    ) -> Result<reqwest::Response, UpstreamError> {
        let mut url = self.base.join(path).map_err(|_| UpstreamError::Astray("to no URL"))?;
        let mut at_home = true;
        for _ in 0..=MAX_REDIRECTS {
            let client = if at_home { &self.own } else { self.elsewhere(&url)? };
            let mut request = client.request(method.clone(), url.clone());
            if let Some(accept) = accept {
                request = request.header(header::ACCEPT, accept);
            }
            if let Some(authorization) = authorization.filter(|_| at_home) {
                request = request.header(header::AUTHORIZATION, authorization);
            }
            let response = answer(request).await?;
            if at_home {
                self.note(&response);
            }
            let to = response.headers().get(header::LOCATION);
            let Some(to) = to.filter(|_| response.status().is_redirection()) else {
                return Ok(response);
            };
            let to = to.to_str().ok().and_then(|to| url.join(to).ok());
            url = self.trusted(to.ok_or(UpstreamError::Astray("to no URL"))?)?;
            at_home = at_home && url.origin() == self.base.origin();
        }
        Err(UpstreamError::Astray("from one place to the next"))
    }

    /// The client for a token service. Its password goes over TLS wherever the service is not the upstream itself, or
    /// the upstream has TLS.
    pub fn to_realm(&self, realm: &str) -> Result<(&reqwest::Client, Url), UpstreamError> {
        let url = Url::parse(realm).map_err(|_| UpstreamError::Astray("to no URL for a token"))?;
        let same_host = url.host() == self.base.host();
        if url.scheme() != "https" && !(same_host && self.base.scheme() == "http") {
            return Err(UpstreamError::Astray("to a token service without TLS"));
        }
        let url = self.trusted(url)?;
        let own = url.origin() == self.base.origin();
        Ok((if own { &self.own } else { self.elsewhere(&url)? }, url))
    }

    fn trusted(&self, url: Url) -> Result<Url, UpstreamError> {
        match url.scheme() {
            "https" => {}
            "http" if self.base.scheme() == "http" => {}
            _ => return Err(UpstreamError::Astray("away from TLS")),
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(UpstreamError::Astray("to a URL with a login"));
        }
        Ok(url)
    }

    fn elsewhere(&self, url: &Url) -> Result<&reqwest::Client, UpstreamError> {
        let near = self.is_near.load(Ordering::Relaxed);
        // An address is not resolved, so nobody else judges it.
        let address = match url.host() {
            Some(Host::Ipv4(address)) => Some(IpAddr::V4(address)),
            Some(Host::Ipv6(address)) => Some(IpAddr::V6(address)),
            _ => None,
        };
        if let Some(address) = address {
            self.guard.check(address, near).map_err(UpstreamError::Forbidden)?;
        }
        Ok(if near { &self.near } else { &self.public })
    }

    /// By the address that answered, with the upstream's certificate where there is TLS: a name may be made to resolve
    /// to anything.
    fn note(&self, response: &reqwest::Response) {
        let class = response.remote_addr().map(|address| self.guard.class(address.ip()));
        let near = matches!(class, Some(Ok(Some(class))) if is_near(class));
        self.is_near.store(near, Ordering::Relaxed);
    }
}

async fn answer(request: reqwest::RequestBuilder) -> Result<reqwest::Response, UpstreamError> {
    match tokio::time::timeout(PATIENCE, request.send()).await {
        Ok(Ok(response)) => Ok(response),
        Ok(Err(error)) => Err(UpstreamError::Send(error.without_url())),
        Err(_) => Err(UpstreamError::Deadline),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn reach(base: &str) -> Reach {
        Reach::new(&Url::parse(base).unwrap(), Guard::default()).unwrap()
    }

    #[test]
    fn a_token_service_elsewhere_has_tls_and_a_public_address() {
        let tls = reach("https://r.example");
        for good in ["https://r.example/token", "https://auth.example/token", "https://8.8.8.8/t"] {
            assert!(tls.to_realm(good).is_ok(), "{good}");
        }
        for bad in [
            "http://r.example/token",
            "http://auth.example/token",
            "https://127.0.0.1/token",
            "https://0x7f.1/token",
            "https://[::1]/token",
            "https://[::ffff:10.0.0.1]/token",
            "https://169.254.169.254/latest",
            "https://user:password@auth.example/",
            "file:///etc/passwd",
            "token",
        ] {
            assert!(tls.to_realm(bad).is_err(), "{bad}");
        }
        let plain = reach("http://r.example:5000");
        assert!(plain.to_realm("http://r.example:5001/token").is_ok());
        assert!(plain.to_realm("http://auth.example/token").is_err());
    }

    #[test]
    fn a_private_upstream_may_send_to_private_places_but_not_to_metadata() {
        let reach = reach("http://10.0.0.1");
        let to = |address: &str| {
            reach.elsewhere(&Url::parse(&format!("http://{address}/")).unwrap()).is_ok()
        };
        assert!(!to("10.0.0.2") && to("1.1.1.1"));
        reach.is_near.store(true, Ordering::Relaxed);
        assert!(to("10.0.0.2") && to("127.0.0.1") && to("1.1.1.1"));
        assert!(
            !to("169.254.169.254") && !to("168.63.129.16") && !to("0.0.0.0") && !to("[fe80::1]")
        );
    }

    #[tokio::test]
    async fn names_are_judged_by_their_addresses() {
        let resolve = |guard: Guard, near| async move {
            let judging = Judging { guard, near };
            judging.resolve("localhost".parse().unwrap()).await.map(Iterator::count)
        };
        let error = resolve(Guard::default(), false).await.unwrap_err();
        assert!(
            error.to_string().contains("a loopback address")
                || error.to_string().contains("host itself"),
            "{error}"
        );
        assert!(resolve(Guard::default(), true).await.unwrap() > 0);
        let permitted = ["127.0.0.0/8", "::1/128"].map(|range| range.parse().unwrap()).to_vec();
        assert!(resolve(Guard { permitted }, false).await.unwrap() > 0);
    }
}
