//! GET `/builds`: newest first, page by page.

use axum::Json;
use axum::extract::{RawQuery, State};
use axum::http::HeaderValue;
use axum::http::header::LINK;
use axum::response::{IntoResponse, Response};
use url::form_urlencoded;
use utoipa::openapi::path::{ParameterIn, ParameterStyle};

use super::error::ApiError;
use super::fields::tags;
use super::get_build::{find, shape};
use super::openapi::params::{self, params};
use super::openapi::problems::BadRequest;
use super::openapi::schemas;
use super::{Shared, query, types};
use crate::build::{BuildId, Status};
use crate::store::{Filter, Role};
use crate::token::Caller;

/// Builds of a page where the caller does not say.
const DEFAULT_LIMIT: u32 = 50;
/// Most builds of a page.
const MAX_LIMIT: u32 = 200;

/// What a caller may ask a list for.
struct Page;

params!(Page:
    params::parameter(ParameterIn::Query, "tags", "Only builds with this tag: `tags[KEY]=VALUE`; may be repeated.", tags::schema())
        .style(Some(ParameterStyle::DeepObject))
        .explode(Some(true))
        .build(),
    params::query("status", "Only builds that are there.", schemas::words(Status::ALL.map(Status::as_str))),
    limit_parameter(MAX_LIMIT, DEFAULT_LIMIT),
    cursor_parameter(),
);

/// How many a page has.
pub(super) fn limit_parameter(most: u32, default: u32) -> utoipa::openapi::path::Parameter {
    let schema = schemas::number(1, most.into()).default(Some(default.into()));
    params::query("limit", "So many of a page.", schema)
}

/// Where a page begins.
pub(super) fn cursor_parameter() -> utoipa::openapi::path::Parameter {
    params::query("cursor", "After this one; of the Link header of the page before.", schemas::id())
}

/// List builds
///
/// The caller's tenant's; an administrator sees all. Newest first.
#[utoipa::path(
    get, path = "/builds", tag = "builds", params(Page),
    responses(
        (status = 200, description = "A page.", body = Vec<types::Build>, headers(
            ("link" = String, description = "The next page, `rel=\"next\"`, where there is one (RFC 8288).")
        )),
        BadRequest,
    ),
)]
pub(super) async fn list_builds(
    State(api): State<Shared>,
    caller: Caller,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let mut filter = parse(query.as_deref())?;
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
    query::invalid("cursor", value, "one that a Link header of this list gave")
}

/// The filter that a query asks for. Pure.
fn parse(text: Option<&str>) -> Result<Filter, ApiError> {
    let mut filter = Filter { limit: 0, ..Filter::default() };
    for (name, value) in query::pairs(text)? {
        let tag = name.strip_prefix("tags[").and_then(|rest| rest.strip_suffix(']'));
        let fresh = match (name.as_str(), tag) {
            (_, Some(key)) => {
                tags::check(key, &value).map_err(|error| query::refused(error.message()))?;
                if filter.tags.len() == tags::MAX_TAGS {
                    let message = format!("a list is filtered by at most {} tags", tags::MAX_TAGS);
                    return Err(query::refused(message));
                }
                filter.tags.insert(key.to_owned(), value).is_none()
            }
            ("status", _) => {
                let names = Status::ALL.map(Status::as_str).join(", ");
                let status = Status::from_name(&value)
                    .ok_or_else(|| query::invalid("status", &value, &format!("one of {names}")))?;
                filter.status.replace(status).is_none()
            }
            ("limit", _) => std::mem::replace(&mut filter.limit, limit(&value, MAX_LIMIT)?) == 0,
            ("cursor", _) => {
                let cursor = BuildId::new(&*value).map_err(|_| bad_cursor(&value))?;
                filter.before.replace(cursor).is_none()
            }
            _ => return Err(query::unknown(&name, "tags[KEY], status, limit and cursor")),
        };
        if !fresh {
            return Err(query::twice(&name));
        }
    }
    if filter.limit == 0 {
        filter.limit = DEFAULT_LIMIT;
    }
    Ok(filter)
}

/// The size of a page.
pub(super) fn limit(value: &str, most: u32) -> Result<u32, ApiError> {
    let number = query::number(value, &(1..=most.into())).and_then(|n| u32::try_from(n).ok());
    number.ok_or_else(|| query::invalid("limit", value, &format!("a number from 1 to {most}")))
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

    fn parse(text: &str) -> Result<Filter, ApiError> {
        super::parse(Some(text))
    }

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
            "limit=+1",
            "limit=1&limit=1",
            "status=Ready",
            "cursor=A",
            "cursor=",
            "tags=x",
            "tags[a]=1&tags[a]=2",
            "tags[]=1",
            "tags[a]=%00",
            "tags[a]=%ff",
            "page=2",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
        let many = |n| (0..n).map(|i| format!("tags[{i}]=x")).collect::<Vec<_>>().join("&");
        assert!(parse(&many(tags::MAX_TAGS)).is_ok());
        assert!(parse(&many(tags::MAX_TAGS + 1)).is_err());
    }

    #[test]
    fn the_next_page_asks_for_the_same() {
        let query = "tags%5Ba%3E%5D=%22%3B&status=queued&limit=2";
        let filter = parse(query).unwrap();
        let link = next_link(&filter, &BuildId::new("b9").unwrap());
        assert_eq!(link, format!("</builds?{query}&cursor=b9>; rel=\"next\""));
    }
}
