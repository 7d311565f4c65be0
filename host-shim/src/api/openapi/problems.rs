//! Refusals in the document: by status, with the codes that each can have.

use std::collections::BTreeMap;

use axum::http::header::{RETRY_AFTER, UPGRADE, WWW_AUTHENTICATE};
use utoipa::openapi::schema::{Object, Type};
use utoipa::openapi::{
    ComponentsBuilder, ContentBuilder, HeaderBuilder, Ref, RefOr, Response, ResponseBuilder,
};
use utoipa::{IntoResponses, ToSchema};

use crate::api::error::{PROBLEM, Problem};

macro_rules! problems {
    ($($name:ident $status:literal $(($header:expr))? $description:literal;)*) => {
        $(
            #[doc = $description]
            pub(crate) struct $name;

            impl IntoResponses for $name {
                fn responses() -> BTreeMap<String, RefOr<Response>> {
                    let reference = Ref::from_response_name(stringify!($name));
                    BTreeMap::from([(stringify!($status).to_owned(), reference.into())])
                }
            }
        )*

        /// All of them, where operations refer to them.
        pub(super) fn components() -> ComponentsBuilder {
            let components = ComponentsBuilder::new();
            $(
                let response = described($description, [$($header)?].as_slice());
                let components = components.response(stringify!($name), response);
            )*
            components
        }
    };
}

problems! {
    BadRequest 400
        "Malformed: a query, a header, a body or its source. `invalid_query`, `unknown_parameter`, `invalid_header`, \
         `invalid_json`, `invalid_body`, `invalid_multipart`, `invalid_source`, `missing_source`, `upload_broken`, \
         `undeclared_secret`";
    Unauthorized 401 (WWW_AUTHENTICATE.as_str())
        "No token, or one that is not valid now. `unauthorized`";
    Forbidden 403 "The token's role is less than this needs. `forbidden`";
    NotFound 404
        "It is not there, or another tenant's, or its id is none. `not_found`, `image_not_found`";
    Stalled 408 "The body stopped coming. `upload_stalled`";
    Conflict 409 (RETRY_AFTER.as_str())
        "It is not in the state for this. `finished`, `publishing`, `not_started`, `not_open`, `not_kept`, `no_step`, \
         `name_taken`, `too_many_secrets`, `idempotency_key_in_flight`, `conflict`";
    TooLarge 413 "A body, a part or a number of parts is beyond its bound. `too_large`";
    UnsupportedMediaType 415 "The body is of another media type. `unsupported_media_type`";
    Unprocessable 422
        "A field does not hold what it may. `invalid_field`, `unknown_field`, `missing_field`, `duplicate_field`, \
         `not_supported`, `idempotency_key_reused`, `other_registry`, `image_not_runnable`, `invalid_command`, \
         `not_copied`";
    UpgradeRequired 426 (UPGRADE.as_str()) "The path speaks WebSocket only. `upgrade_required`";
    TooMany 429 (RETRY_AFTER.as_str())
        "As many as there may be, or too fast. `too_many_requests`, `queue_full`, `too_many_uploads`, \
         `too_many_sessions`, `too_many_instances`";
    Internal 500 "The host failed; its log says why, under this answer's x-request-id. `internal`";
    BadGateway 502 "What the host asked did not answer as it should. `registry_failed`, `copy_failed`";
    Unavailable 503 (RETRY_AFTER.as_str())
        "Not now. `busy`, `stopping`, `not_open`, `not_ready`, `still_cancelling`, `still_stopping`, `read_only`";
    NoRoom 507 "The host's disk is full. `disk_full`";
}

fn described(description: &str, headers: &[&str]) -> Response {
    let schema = Ref::from_schema_name(Problem::name());
    let content = ContentBuilder::new().schema(Some(schema)).build();
    let response = ResponseBuilder::new().description(description).content(PROBLEM, content);
    let response = headers.iter().fold(response, |response, name| {
        let kind = if *name == RETRY_AFTER { Type::Integer } else { Type::String };
        response.header(*name, HeaderBuilder::new().schema(Some(Object::with_type(kind))).build())
    });
    response.build()
}
