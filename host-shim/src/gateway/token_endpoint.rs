//! `/v2/token`: an API token for a registry token (distribution spec, "Token Authentication" and
//! "OAuth 2.0"). GET is what podman, skopeo and docker use; containerd tries POST first.

use std::time::Duration;

use axum::body::Body;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::{HeaderValue, Method, StatusCode, header};
use serde_json::json;
use tokio::time::timeout;
use url::form_urlencoded;

use super::clients::GatewayState;
use super::error::Refusal;
use super::path::Name;
use super::rights::{self, Action, Caller};
use super::token::{Access, LIFETIME, SERVICE};
use crate::causes::chain;

/// Most scopes of one request. A push with mounts names a handful.
const MAX_SCOPES: usize = 32;
/// Longest query or form.
const MAX_FORM_BYTES: usize = 16 * 1024;
/// How long a form may take. It is the one body that is read before anybody has shown a token.
const FORM_DEADLINE: Duration = Duration::from_secs(30);
/// Longest API token, generously.
const MAX_API_TOKEN_BYTES: usize = 256;

/// What was asked for.
#[derive(Debug, Default)]
struct Asked {
    api_token: Option<String>,
    service: Option<String>,
    scopes: Vec<String>,
}

pub(super) async fn token(State(state): State<GatewayState>, request: Request<Body>) -> Response {
    match answer(&state, request).await {
        Ok(response) => response,
        Err(refusal) => refusal.into_response(),
    }
}

async fn answer(state: &GatewayState, request: Request<Body>) -> Result<Response, Refusal> {
    let asked = match *request.method() {
        Method::GET => asked_by_get(&request)?,
        Method::POST => asked_by_post(request).await?,
        _ => {
            let refusal = Refusal::unsupported("the token endpoint takes GET and POST");
            return Err(refusal.allowing("GET, POST"));
        }
    };
    if asked.service.as_deref().is_some_and(|service| service != SERVICE) {
        return Err(bad(format!("this is the token service of {SERVICE:?}")));
    }
    let caller = authenticate(state, asked.api_token.as_deref()).await?;
    let mut access = Vec::new();
    for scope in &asked.scopes {
        // A scope of a form that Kiln does not know grants nothing, as the spec wants it.
        let Some((name, wanted)) = parse_scope(scope) else { continue };
        let granted = rights::granted(&*state.authorizer, &caller, &name, &wanted).await;
        let actions = granted.map_err(unavailable)?;
        if !actions.is_empty() {
            let (kind, name) = ("repository".into(), name.to_string());
            access.push(Access { kind, name, actions: actions.into_iter().collect() });
        }
    }
    let scope: Vec<String> = access.iter().map(scope_text).collect();
    let signed = state.keys.sign(&caller.tenant, access);
    let (token, issued) = signed.map_err(|error| {
        tracing::error!(error = %chain(&error), "no registry token could be signed");
        Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "UNKNOWN", "no token could be signed")
    })?;
    let issued_at = i64::try_from(issued).ok().and_then(|s| jiff::Timestamp::from_second(s).ok());
    let body = json!({
        "token": token,
        "access_token": token,
        "token_type": "Bearer",
        "expires_in": LIFETIME.as_secs(),
        "issued_at": issued_at.map(|at| at.to_string()),
        "scope": scope.join(" "),
    });
    let mut response = Response::new(Body::from(body.to_string()));
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

async fn authenticate(state: &GatewayState, token: Option<&str>) -> Result<Caller, Refusal> {
    let known = match token {
        Some(token) if token.len() <= MAX_API_TOKEN_BYTES => {
            state.authorizer.api_token(token).await.map_err(unavailable)?
        }
        _ => None,
    };
    known.ok_or_else(|| {
        let message = "log in with any user name and a Kiln API token as the password";
        Refusal::new(StatusCode::UNAUTHORIZED, "UNAUTHORIZED", message)
            .with_challenge(Some(HeaderValue::from_static("Basic realm=\"kiln\"")))
    })
}

fn asked_by_get(request: &Request<Body>) -> Result<Asked, Refusal> {
    let mut asked = asked(request.uri().query().unwrap_or_default().as_bytes())?;
    // Only the header counts here: a query ends up in logs.
    asked.api_token = basic_password(request.headers());
    Ok(asked)
}

async fn asked_by_post(request: Request<Body>) -> Result<Asked, Refusal> {
    let header_token = basic_password(request.headers());
    let form = axum::body::to_bytes(request.into_body(), MAX_FORM_BYTES);
    let form = timeout(FORM_DEADLINE, form).await.map_err(|_| {
        let message = format!("the form was not sent within {} s", FORM_DEADLINE.as_secs());
        Refusal::new(StatusCode::REQUEST_TIMEOUT, "UNSUPPORTED", message)
    })?;
    let form = form.map_err(|_| bad("the form is too large"))?;
    let grant = form_urlencoded::parse(&form).find(|(key, _)| key == "grant_type");
    if grant.is_none_or(|(_, grant)| grant != "password") {
        return Err(bad("the only grant_type is \"password\""));
    }
    let mut asked = asked(&form)?;
    let password = form_urlencoded::parse(&form).find(|(key, _)| key == "password");
    asked.api_token = password.map(|(_, password)| password.into_owned()).or(header_token);
    Ok(asked)
}

fn asked(form: &[u8]) -> Result<Asked, Refusal> {
    if form.len() > MAX_FORM_BYTES {
        return Err(bad("the query is too large"));
    }
    let mut asked = Asked::default();
    for (key, value) in form_urlencoded::parse(form) {
        match &*key {
            "service" => asked.service = Some(value.into_owned()),
            "scope" => {
                asked.scopes.extend(value.split(' ').filter(|s| !s.is_empty()).map(Into::into));
            }
            _ => {}
        }
        if asked.scopes.len() > MAX_SCOPES {
            return Err(bad(format!("more than {MAX_SCOPES} scopes")));
        }
    }
    Ok(asked)
}

/// The password of the one `Authorization: Basic` header.
fn basic_password(headers: &http::HeaderMap) -> Option<String> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else { return None };
    let (scheme, encoded) = value.to_str().ok()?.split_once(' ')?;
    if !scheme.eq_ignore_ascii_case("basic") {
        return None;
    }
    let decoded = String::from_utf8(STANDARD.decode(encoded.trim()).ok()?).ok()?;
    Some(decoded.split_once(':')?.1.to_owned())
}

/// `repository:NAME:ACTION,ACTION…`; `*` is every action.
fn parse_scope(scope: &str) -> Option<(Name, Vec<Action>)> {
    let (kind, rest) = scope.split_once(':')?;
    let (name, actions) = rest.rsplit_once(':')?;
    if kind != "repository" {
        return None;
    }
    let wanted = Action::ALL.into_iter().filter(|action| {
        actions.split(',').any(|wanted| wanted == "*" || wanted == action.as_str())
    });
    Some((Name::parse(name)?, wanted.collect()))
}

fn scope_text(access: &Access) -> String {
    let actions: Vec<&str> = access.actions.iter().map(|action| action.as_str()).collect();
    format!("repository:{}:{}", access.name, actions.join(","))
}

fn bad(message: impl Into<String>) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, "UNSUPPORTED", message)
}

#[expect(clippy::needless_pass_by_value, reason = "used in map_err")]
fn unavailable(error: crate::store::StoreError) -> Refusal {
    tracing::error!(error = %chain(&error), "the store does not answer the gateway");
    Refusal::unavailable("Kiln cannot check the token now; try again")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::Action::{Delete, Pull, Push};
    use super::*;

    #[test]
    fn scopes_are_read_by_the_spec() {
        let parse = |scope| parse_scope(scope).map(|(name, actions)| (name.to_string(), actions));
        assert_eq!(parse("repository:a/b:pull,push"), Some(("a/b".into(), vec![Pull, Push])));
        assert_eq!(parse("repository:a/b:*"), Some(("a/b".into(), vec![Pull, Push, Delete])));
        assert_eq!(parse("repository:a/b:fly"), Some(("a/b".into(), vec![])));
        assert_eq!(parse("registry:catalog:*"), None);
        assert_eq!(parse("repository(plugin):a:pull"), None);
        assert_eq!(parse("repository:A:pull"), None);
        assert_eq!(parse("repository:a/../b:pull"), None);
        assert_eq!(parse("repository"), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_form_that_trickles_is_given_up() {
        let drops = futures_util::stream::unfold((), |()| async {
            tokio::time::sleep(Duration::from_secs(1)).await;
            Some((Ok::<_, std::io::Error>("a"), ()))
        });
        let refusal = asked_by_post(Request::new(Body::from_stream(drops))).await.unwrap_err();
        assert_eq!(refusal.status, StatusCode::REQUEST_TIMEOUT);
    }

    #[test]
    fn scopes_are_bounded() {
        let form = |n: usize| "scope=repository:a:pull&".repeat(n);
        assert_eq!(asked(form(MAX_SCOPES).as_bytes()).unwrap().scopes.len(), MAX_SCOPES);
        assert!(asked(form(MAX_SCOPES + 1).as_bytes()).is_err());
        assert!(asked(format!("scope={}", "+a".repeat(MAX_SCOPES + 1)).as_bytes()).is_err());
        assert!(asked(&vec![b'a'; MAX_FORM_BYTES]).is_ok());
        assert!(asked(&vec![b'a'; MAX_FORM_BYTES + 1]).is_err());
    }

    #[test]
    fn a_password_comes_from_one_basic_header() {
        let headers = |values: &[&str]| {
            let mut headers = http::HeaderMap::new();
            for value in values {
                headers.append(header::AUTHORIZATION, HeaderValue::from_str(value).unwrap());
            }
            headers
        };
        let basic = format!("Basic {}", STANDARD.encode("any:kiln_x:y"));
        assert_eq!(basic_password(&headers(&[&basic])).as_deref(), Some("kiln_x:y"));
        assert_eq!(basic_password(&headers(&[&basic, &basic])), None);
        assert_eq!(basic_password(&headers(&["Bearer x"])), None);
        assert_eq!(basic_password(&headers(&["Basic !"])), None);
        assert_eq!(basic_password(&headers(&[])), None);
    }
}
