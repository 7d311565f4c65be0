//! GET and PUT `/builds/{id}/files` and `/instances/{id}/files`: files of a VM that is there, as a tar archive.
//!
//! ```text
//! token ─▶ role ─▶ whose it is ─▶ is it open? ─▶ room ─▶ exec::Admitted::open ─▶ the agent begins ─▶ 200, the archive
//!                                                          └─▶ the agent refuses ─▶ a problem
//! ```
//! A copy is a session: bounded, permitted and recorded as one. What goes wrong after the first byte breaks the body,
//! so that half an archive never looks like a whole one.

mod asked;
mod download;
mod refused;
mod upload;

use axum::body::Body;
use axum::extract::{RawQuery, State};
use axum::http::StatusCode;
use axum::response::Response;
use kiln_protocol::exec::{Copy, Open};
use utoipa::openapi::{RefOr, Schema};
use utoipa::{PartialSchema, ToSchema};

use self::asked::Asked;
use super::error::ApiError;
use super::exec::{enter_build, enter_instance, permitted};
use super::get_build::Wanted;
use super::instances::get as get_instance;
use super::openapi::problems::{
    BadGateway, BadRequest, Conflict, Forbidden, NotFound, Unavailable, Unprocessable,
};
use super::openapi::schemas;
use super::{Api, Shared};
use crate::exec::Admitted;
use crate::token::Caller;

/// Copy files out of a build's VM
///
/// As a tar archive. What goes wrong after its first byte breaks the body.
#[utoipa::path(
    get, path = "/builds/{id}/files", tag = "sessions", params(Wanted, Asked),
    responses(
        (status = 200, description = "The archive.", body = inline(Archive), content_type = "application/x-tar"),
        BadRequest, Forbidden, NotFound, Conflict, Unprocessable, BadGateway, Unavailable,
    ),
)]
pub(super) async fn get_of_build(
    State(api): State<Shared>,
    caller: Caller,
    Wanted(id): Wanted,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let copy = asked::parse(query.as_deref())?;
    let admitted = enter_build(&api, caller, id).await?;
    download(&api, admitted, copy).await
}

/// Copy files out of an instance's VM
///
/// As a tar archive. What goes wrong after its first byte breaks the body.
#[utoipa::path(
    get, path = "/instances/{id}/files", tag = "sessions", params(get_instance::Wanted, Asked),
    responses(
        (status = 200, description = "The archive.", body = inline(Archive), content_type = "application/x-tar"),
        BadRequest, Forbidden, NotFound, Conflict, Unprocessable, BadGateway, Unavailable,
    ),
)]
pub(super) async fn get_of_instance(
    State(api): State<Shared>,
    caller: Caller,
    get_instance::Wanted(id): get_instance::Wanted,
    RawQuery(query): RawQuery,
) -> Result<Response, ApiError> {
    let copy = asked::parse(query.as_deref())?;
    let admitted = enter_instance(&api, caller, id).await?;
    download(&api, admitted, copy).await
}

/// Copy files into a build's VM
///
/// The body is an uncompressed tar archive.
#[utoipa::path(
    put, path = "/builds/{id}/files", tag = "sessions", params(Wanted, Asked),
    request_body(content((inline(Archive) = "application/x-tar"), (inline(Archive) = "application/octet-stream"))),
    responses(
        (status = 204, description = "All of it is there."),
        BadRequest, Forbidden, NotFound, Conflict, Unprocessable, BadGateway, Unavailable,
    ),
)]
pub(super) async fn put_to_build(
    State(api): State<Shared>,
    caller: Caller,
    Wanted(id): Wanted,
    RawQuery(query): RawQuery,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let copy = asked::parse(query.as_deref())?;
    let admitted = enter_build(&api, caller, id).await?;
    upload(&api, admitted, copy, body).await
}

/// Copy files into an instance's VM
///
/// The body is an uncompressed tar archive.
#[utoipa::path(
    put, path = "/instances/{id}/files", tag = "sessions", params(get_instance::Wanted, Asked),
    request_body(content((inline(Archive) = "application/x-tar"), (inline(Archive) = "application/octet-stream"))),
    responses(
        (status = 204, description = "All of it is there."),
        BadRequest, Forbidden, NotFound, Conflict, Unprocessable, BadGateway, Unavailable,
    ),
)]
pub(super) async fn put_to_instance(
    State(api): State<Shared>,
    caller: Caller,
    get_instance::Wanted(id): get_instance::Wanted,
    RawQuery(query): RawQuery,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let copy = asked::parse(query.as_deref())?;
    let admitted = enter_instance(&api, caller, id).await?;
    upload(&api, admitted, copy, body).await
}

/// A tar archive.
struct Archive;

impl PartialSchema for Archive {
    fn schema() -> RefOr<Schema> {
        schemas::bytes().build().into()
    }
}

impl ToSchema for Archive {}

async fn download(api: &Api, admitted: Admitted, copy: Copy) -> Result<Response, ApiError> {
    let open = allowed(&admitted, Open::CopyOut(copy)).await?;
    download::answer(&api.state.sessions, admitted, open).await
}

async fn upload(
    api: &Api,
    admitted: Admitted,
    copy: Copy,
    body: Body,
) -> Result<StatusCode, ApiError> {
    let open = allowed(&admitted, Open::CopyIn(copy)).await?;
    upload::answer(&api.state.sessions, admitted, open, body).await
}

/// Who may not is refused, and that is recorded.
async fn allowed(admitted: &Admitted, open: Open) -> Result<Open, ApiError> {
    let place = match &open {
        Open::CopyOut(copy) | Open::CopyIn(copy) => copy.place,
        Open::Exec(exec) => exec.place,
    };
    if let Err(why) = permitted(place, admitted.who().role) {
        admitted.refuse(&open, why.clone()).await;
        return Err(ApiError::forbidden(why));
    }
    Ok(open)
}
