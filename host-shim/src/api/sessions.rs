//! GET `/sessions`: the audit log of who entered what, newest first.

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::http::HeaderValue;
use axum::http::header::LINK;
use axum::response::{IntoResponse, Response};
use url::form_urlencoded;

use super::error::{ApiError, shown};
use super::{Shared, types};
use crate::build::BuildId;
use crate::exec::Subject;
use crate::instances::InstanceId;
use crate::store::{Role, SessionFilter};
use crate::token::Caller;

/// Sessions of a page where the caller does not say.
const DEFAULT_LIMIT: u32 = 50;
/// Most sessions of a page.
const MAX_LIMIT: u32 = 200;

pub(super) async fn list_sessions(
    State(api): State<Shared>,
    caller: Caller,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    caller.require(Role::Tenant)?;
    let mut filter = parse(query.as_deref().unwrap_or_default())?;
    if caller.role != Role::Admin {
        filter.tenant = Some(caller.tenant.clone());
    }
    let limit = filter.limit;
    // One more tells whether there is a next page.
    let wanted = SessionFilter { limit: limit + 1, ..filter.clone() };
    let mut sessions = api.state.store.sessions(&wanted).await?;
    let more = sessions.len() > limit as usize;
    sessions.truncate(limit as usize);
    let shapes: Vec<_> = sessions.iter().map(types::Session::new).collect();
    let mut response = Json(shapes).into_response();
    if let Some(last) = sessions.last().filter(|_| more) {
        let link = HeaderValue::try_from(next_link(&filter, &last.id))
            .map_err(|e| ApiError::internal(&e))?;
        response.headers_mut().insert(LINK, link);
    }
    Ok(response)
}

/// The filter that a query asks for. Pure.
fn parse(query: &str) -> Result<SessionFilter, ApiError> {
    let mut filter = SessionFilter::default();
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        let refused = |allowed: &str| {
            let message = format!("{name} is {}; it must be {allowed}", shown(&value));
            ApiError::bad_request("invalid_query", message)
        };
        let fresh = match &*name {
            "build" => {
                let id = BuildId::new(&*value).map_err(|_| refused("a build's id"))?;
                filter.subject.replace(Subject::Build(id)).is_none()
            }
            "instance" => {
                let id = InstanceId::parse(&value).ok_or_else(|| refused("an instance's id"))?;
                filter.subject.replace(Subject::Instance(id)).is_none()
            }
            "limit" => {
                let limit = value.parse().ok().filter(|n| (1..=MAX_LIMIT).contains(n));
                let limit =
                    limit.ok_or_else(|| refused(&format!("a number from 1 to {MAX_LIMIT}")))?;
                std::mem::replace(&mut filter.limit, limit) == 0
            }
            "cursor" => {
                let id = BuildId::new(&*value)
                    .map_err(|_| refused("one that a Link header of this list gave"))?;
                filter.before.replace(id.to_string()).is_none()
            }
            _ => {
                let message = format!(
                    "there is no parameter {}; sessions have build, instance, limit and cursor",
                    shown(&name)
                );
                return Err(ApiError::bad_request("unknown_parameter", message));
            }
        };
        if !fresh {
            let message = format!(
                "{} is one too many: give one build or instance, one limit, one cursor",
                shown(&name)
            );
            return Err(ApiError::bad_request("invalid_query", message));
        }
    }
    if filter.limit == 0 {
        filter.limit = DEFAULT_LIMIT;
    }
    Ok(filter)
}

/// The `Link` of the page after a session, by RFC 8288. Pure.
fn next_link(filter: &SessionFilter, last: &str) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    match &filter.subject {
        Some(Subject::Build(id)) => drop(query.append_pair("build", id.as_str())),
        Some(Subject::Instance(id)) => drop(query.append_pair("instance", id.as_str())),
        None => {}
    }
    query.append_pair("limit", &filter.limit.to_string());
    query.append_pair("cursor", last);
    format!("</sessions?{}>; rel=\"next\"", query.finish())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_taken_as_a_whole_or_not_at_all() {
        assert_eq!(parse("").unwrap().limit, DEFAULT_LIMIT);
        for query in ["build=b1&limit=200", "instance=i1&limit=1", "limit=2"] {
            let filter = parse(query).unwrap();
            let link = next_link(&filter, "s9");
            assert_eq!(link, format!("</sessions?{query}&cursor=s9>; rel=\"next\""));
        }
        assert_eq!(parse("cursor=s9").unwrap().before.as_deref(), Some("s9"));
        for bad in [
            "limit=0",
            "limit=201",
            "limit=1&limit=1",
            "build=../x",
            "build=b1&instance=i1",
            "cursor=a/b",
            "tenant=x",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
