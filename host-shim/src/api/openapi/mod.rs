//! The API's description, OpenAPI 3.1: made of what the handlers say of themselves, so that a route cannot be there
//! without it.
//!
//! ```text
//! #[utoipa::path] on a handler ─▶ routes!(handler) ─▶ route and description ─▶ complete ─▶ GET /openapi.json
//! ```
//! Bounds come from the constants that the code checks, and from the server's own limits. `docs/openapi.json` is that of a
//! server with default settings.

pub(super) mod events;
pub(super) mod params;
pub(super) mod problems;
pub(crate) mod schemas;

use axum::body::Bytes;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use utoipa::openapi::path::{Operation, PathItem};
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::tag::TagBuilder;
use utoipa::openapi::{InfoBuilder, OpenApi, OpenApiBuilder};
use utoipa::{IntoResponses, ToSchema};

use self::events::{BuildEvent, InstanceEvent};
use self::problems::{Internal, TooMany, Unauthorized};
use super::error::Problem;
use super::fields::schema::NewBuild;
use super::instances::schema::NewInstance;
use super::{Limits, Shared};

/// Where clients reach a server with default settings.
pub(super) const HOST: &str = "127.0.0.1:4973";
/// The one way in.
const TOKEN: &str = "token";

/// This document
#[utoipa::path(
    get, path = "/openapi.json", tag = "server", security(()),
    responses((status = 200, description = "OpenAPI 3.1.", body = Object)),
)]
pub(super) async fn openapi(State(api): State<Shared>) -> Response {
    ([(CONTENT_TYPE, "application/json")], api.document.clone()).into_response()
}

/// What the paths are added to.
pub(super) fn base() -> OpenApi {
    let token = HttpBuilder::new()
        .scheme(HttpAuthScheme::Bearer)
        .description(Some("An API token, `kiln_…`. It is the only thing that tells who calls."));
    let components = problems::components()
        .schema_from::<Problem<'_>>()
        .schema_from::<BuildEvent>()
        .schema_from::<InstanceEvent>()
        .security_scheme(TOKEN, SecurityScheme::Http(token.build()))
        .build();
    let info = InfoBuilder::new()
        .title("Kiln")
        .version(env!("CARGO_PKG_VERSION"))
        .license(Some(utoipa::openapi::License::new(env!("CARGO_PKG_LICENSE"))))
        .description(Some(
            "Builds container images, each in a microVM of its own. Refusals are problem details (RFC 9457). The registry \
             below `/v2/` speaks the OCI distribution specification, with tokens from `/v2/token`, and is not described here.",
        ));
    let tag = |(name, description): (&str, &str)| {
        TagBuilder::new().name(name).description(Some(description)).build()
    };
    OpenApiBuilder::new()
        .info(info.build())
        .components(Some(components))
        .tags(Some(TAGS.map(tag)))
        .build()
}

const TAGS: [(&str, &str); 6] = [
    ("builds", "Source in, image out."),
    ("instances", "Images that run."),
    ("sessions", "Commands and files in VMs that are there."),
    ("secrets", "What builds may ask for."),
    ("tokens", "Who may call."),
    ("server", "The server itself. No token but for `/metrics` and `/gc`."),
];

/// The document of a server: what every operation has, and its own limits.
pub(super) fn complete(mut document: OpenApi, limits: &Limits, public_host: &str) -> Bytes {
    for item in document.paths.paths.values_mut() {
        for operation in operations(item) {
            guard(operation);
        }
    }
    if let Some(components) = &mut document.components {
        let schemas = &mut components.schemas;
        schemas.insert(NewBuild::name().into(), NewBuild::on(limits).into());
        schemas.insert(NewInstance::name().into(), NewInstance::on(limits, public_host).into());
    }
    let mut text = document.to_pretty_json().unwrap_or_default();
    text.push('\n');
    text.into()
}

fn operations(item: &mut PathItem) -> impl Iterator<Item = &mut Operation> {
    [&mut item.get, &mut item.put, &mut item.post, &mut item.delete].into_iter().flatten()
}

/// An operation that does not say otherwise needs a token, and then it can be refused for the token, for the rate of its
/// requests, and by a store that fails.
fn guard(operation: &mut Operation) {
    if operation.security.is_some() {
        return;
    }
    operation.security = Some(vec![SecurityRequirement::new(TOKEN, [] as [&str; 0])]);
    let common = [Unauthorized::responses(), TooMany::responses(), Internal::responses()];
    operation.responses.responses.extend(common.into_iter().flatten());
}
