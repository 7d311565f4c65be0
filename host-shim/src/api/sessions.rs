//! GET `/sessions`: the audit log of who entered what, newest first.

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::http::HeaderValue;
use axum::http::header::LINK;
use axum::response::{IntoResponse, Response};
use url::form_urlencoded;

use super::error::ApiError;
use super::list_builds::{cursor_parameter, limit, limit_parameter};
use super::openapi::params::{self, params};
use super::openapi::problems::{BadRequest, Forbidden};
use super::openapi::schemas;
use super::{Shared, query, types};
use crate::build::BuildId;
use crate::exec::Subject;
use crate::instances::InstanceId;
use crate::store::{Role, SessionFilter};
use crate::token::Caller;

/// Sessions of a page where the caller does not say.
const DEFAULT_LIMIT: u32 = 50;
/// Most sessions of a page.
const MAX_LIMIT: u32 = 200;

/// What a caller may ask the list for.
struct Page;

params!(Page:
    params::query("build", "Only those in this build; not together with `instance`.", schemas::id()),
    params::query("instance", "Only those in this instance; not together with `build`.", schemas::id()),
    limit_parameter(MAX_LIMIT, DEFAULT_LIMIT),
    cursor_parameter(),
);

/// List sessions
///
/// Who entered what: the audit log of the caller's tenant, or of all for an administrator. Newest first.
#[utoipa::path(
    get, path = "/sessions", tag = "sessions", params(Page),
    responses(
        (status = 200, description = "A page.", body = Vec<types::Session>, headers(
            ("link" = String, description = "The next page, `rel=\"next\"`, where there is one (RFC 8288).")
        )),
        BadRequest, Forbidden,
    ),
)]
pub(super) async fn list_sessions(
    State(api): State<Shared>,
    caller: Caller,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    caller.require(Role::Tenant)?;
    let mut filter = parse(query.as_deref())?;
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
fn parse(text: Option<&str>) -> Result<SessionFilter, ApiError> {
    let mut filter = SessionFilter::default();
    for (name, value) in query::pairs(text)? {
        let refused = |allowed: &str| query::invalid(&name, &value, allowed);
        let fresh = match name.as_str() {
            "build" => {
                let id = BuildId::new(&*value).map_err(|_| refused("a build's id"))?;
                filter.subject.replace(Subject::Build(id)).is_none()
            }
            "instance" => {
                let id = InstanceId::parse(&value).ok_or_else(|| refused("an instance's id"))?;
                filter.subject.replace(Subject::Instance(id)).is_none()
            }
            "limit" => std::mem::replace(&mut filter.limit, limit(&value, MAX_LIMIT)?) == 0,
            "cursor" => {
                let id = BuildId::new(&*value)
                    .map_err(|_| refused("one that a Link header of this list gave"))?;
                filter.before.replace(id.to_string()).is_none()
            }
            _ => return Err(query::unknown(&name, "build, instance, limit and cursor")),
        };
        if !fresh {
            let message = format!(
                "{name} is one too many: give one build or instance, one limit, one cursor"
            );
            return Err(query::refused(message));
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

    fn parse(text: &str) -> Result<SessionFilter, ApiError> {
        super::parse(Some(text))
    }

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
