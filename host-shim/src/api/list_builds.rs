//! GET `/builds`: newest first, page by page.

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::http::HeaderValue;
use axum::http::header::LINK;
use axum::response::{IntoResponse, Response};
use url::form_urlencoded;

use super::error::{ApiError, shown};
use super::get_build::{find, shape};
use super::{Shared, fields};
use crate::build::{BuildId, Status};
use crate::store::{Filter, Role};
use crate::token::Caller;

/// Builds of a page where the caller does not say.
const DEFAULT_LIMIT: u32 = 50;
/// Most builds of a page.
const MAX_LIMIT: u32 = 200;

pub(super) async fn list_builds(
    State(api): State<Shared>,
    caller: Caller,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let mut filter = parse(query.as_deref().unwrap_or_default())?;
    if caller.role != Role::Admin {
        filter.tenant = Some(caller.tenant.clone());
    }
    if let Some(cursor) = &filter.before {
        find(&api, &caller, cursor).await.map_err(|_| bad_cursor(cursor.as_str()))?;
    }
    let limit = filter.limit;
    // One more tells whether there is a next page.
    let mut builds = api.state.store.builds(&Filter { limit: limit + 1, ..filter.clone() }).await?;
    let more = builds.len() > limit as usize;
    builds.truncate(limit as usize);

    let mut shapes = Vec::with_capacity(builds.len());
    for build in &builds {
        shapes.push(shape(&api, build).await?);
    }
    let mut response = Json(shapes).into_response();
    if let Some(last) = builds.last().filter(|_| more) {
        let link = HeaderValue::try_from(next_link(&filter, &last.id))
            .map_err(|e| ApiError::internal(&e))?;
        response.headers_mut().insert(LINK, link);
    }
    Ok(response)
}

fn bad_cursor(value: &str) -> ApiError {
    refused("cursor", value, "one that a Link header of this list gave")
}

fn refused(name: &str, value: &str, allowed: &str) -> ApiError {
    let message = format!("{name} is {}; it must be {allowed}", shown(value));
    ApiError::bad_request("invalid_query", message)
}

/// The filter that a query asks for. Pure.
fn parse(query: &str) -> Result<Filter, ApiError> {
    let mut filter = Filter { limit: 0, ..Filter::default() };
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        let tag = name.strip_prefix("tags[").and_then(|rest| rest.strip_suffix(']'));
        let fresh = match (&*name, tag) {
            (_, Some(key)) => {
                if filter.tags.len() == fields::MAX_TAGS {
                    let message =
                        format!("a list is filtered by at most {} tags", fields::MAX_TAGS);
                    return Err(ApiError::bad_request("invalid_query", message));
                }
                filter.tags.insert(key.to_owned(), value.into_owned()).is_none()
            }
            ("status", _) => {
                let names = Status::ALL.map(Status::as_str).join(", ");
                let allowed = format!("one of {names}");
                let status =
                    Status::from_name(&value).ok_or_else(|| refused("status", &value, &allowed))?;
                filter.status.replace(status).is_none()
            }
            ("limit", _) => {
                let limit = value.parse().ok().filter(|n| (1..=MAX_LIMIT).contains(n));
                let allowed = format!("a number from 1 to {MAX_LIMIT}");
                let limit = limit.ok_or_else(|| refused("limit", &value, &allowed))?;
                std::mem::replace(&mut filter.limit, limit) == 0
            }
            ("cursor", _) => {
                let cursor = BuildId::new(&*value).map_err(|_| bad_cursor(&value))?;
                filter.before.replace(cursor).is_none()
            }
            _ => {
                let message = format!(
                    "there is no parameter {}; a list has tags[KEY], status, limit and cursor",
                    shown(&name)
                );
                return Err(ApiError::bad_request("unknown_parameter", message));
            }
        };
        if !fresh {
            let message = format!("the parameter {} is given twice", shown(&name));
            return Err(ApiError::bad_request("invalid_query", message));
        }
    }
    if filter.limit == 0 {
        filter.limit = DEFAULT_LIMIT;
    }
    Ok(filter)
}

/// The `Link` of the page after a build, by RFC 8288. Pure.
fn next_link(filter: &Filter, last: &BuildId) -> String {
    let mut query = form_urlencoded::Serializer::new(String::new());
    for (key, value) in &filter.tags {
        query.append_pair(&format!("tags[{key}]"), value);
    }
    if let Some(status) = filter.status {
        query.append_pair("status", status.as_str());
    }
    query.append_pair("limit", &filter.limit.to_string());
    query.append_pair("cursor", last.as_str());
    format!("</builds?{}>; rel=\"next\"", query.finish())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_query_is_taken_as_a_whole_or_not_at_all() {
        let filter =
            parse("tags%5Bteam%5D=a%26b&tags[env]=x+y&status=ready&limit=200&cursor=b1").unwrap();
        assert_eq!(filter.tags["team"], "a&b");
        assert_eq!(filter.tags["env"], "x y");
        assert_eq!((filter.status, filter.limit), (Some(Status::Ready), 200));
        assert_eq!(filter.before, Some(BuildId::new("b1").unwrap()));
        assert_eq!(parse("").unwrap().limit, DEFAULT_LIMIT);
        for bad in [
            "limit=0",
            "limit=201",
            "limit=-1",
            "limit=",
            "limit=1&limit=1",
            "status=Ready",
            "cursor=A",
            "cursor=",
            "tags=x",
            "tags[a]=1&tags[a]=2",
            "page=2",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        let tags = |n| (0..n).map(|i| format!("tags[{i}]=x")).collect::<Vec<_>>().join("&");
        assert!(parse(&tags(fields::MAX_TAGS)).is_ok());
        assert!(parse(&tags(fields::MAX_TAGS + 1)).is_err());
    }

    #[test]
    fn the_next_page_asks_for_the_same() {
        let query = "tags%5Ba%3E%5D=%22%3B&status=queued&limit=2";
        let filter = parse(query).unwrap();
        let link = next_link(&filter, &BuildId::new("b9").unwrap());
        assert_eq!(link, format!("</builds?{query}&cursor=b9>; rel=\"next\""));
    }
}
