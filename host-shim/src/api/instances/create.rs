//! POST `/instances`: 201 once the instance is stored. What can be known of the image is known by then: who may
//! not run it, or asks for one that is not there, is told at once.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::LOCATION;
use axum::response::{IntoResponse, Response};
use serde_json::{Map, Value};

use super::schema::NewInstance;
use super::{Instance, fields};
use crate::api::body::ApiJson;
use crate::api::error::{ApiError, TRY_AGAIN, shown};
use crate::api::openapi::problems::{
    BadGateway, BadRequest, Conflict, Forbidden, NoRoom, NotFound, Stalled, TooLarge, Unavailable,
    Unprocessable, UnsupportedMediaType,
};
use crate::api::{Api, Shared};
use crate::build::BuildId;
use crate::causes::chain;
use crate::gateway::path::Name;
use crate::gateway::rights::{Action, Caller as Who, Space, allowed};
use crate::instances::launch;
use crate::instances::pull::{self, PullError};
use crate::instances::reference::{BadImage, Image};
use crate::instances::{Instance as Stored, InstanceError, InstanceId, State as Lifecycle, Work};
use crate::store::{Role, StoreError};
use crate::token::Caller;

/// Run an image
#[utoipa::path(
    post, path = "/instances", tag = "instances", request_body = NewInstance,
    responses(
        (status = 201, description = "It is stored, and will run.", body = Instance, headers(
            ("location" = String, description = "The instance's path.")
        )),
        BadRequest, Forbidden, NotFound, Stalled, Conflict, TooLarge, UnsupportedMediaType, Unprocessable, BadGateway, Unavailable, NoRoom,
    ),
)]
pub(in crate::api) async fn create_instance(
    State(api): State<Shared>,
    caller: Caller,
    ApiJson(body): ApiJson<Map<String, Value>>,
) -> Result<Response, ApiError> {
    caller.require(Role::Tenant)?;
    api.state.instances.check_open()?;
    let wanted = fields::parse(body, &api.limits_of(&caller.tenant))?;
    let image = Image::parse(&wanted.image, &api.state.public_host, &caller.tenant);
    let image = image.map_err(|error| match &error {
        BadImage::Host { .. } => {
            ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "other_registry", error.to_string())
        }
        BadImage::Form { .. } => {
            let message = format!("image is {}; {error}", shown(&wanted.image));
            ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_field", message)
        }
    })?;
    if !may_run(&api, &caller, &image.name).await? {
        // Whether it is there is not for them to know.
        return Err(no_such_image(&image));
    }
    let resolved = pull::resolve(&api.state.backing, &image).await;
    let resolved = resolved.map_err(|error| no_image(&image, &error))?;
    let id = InstanceId::generate();
    // The end of an id is what differs between two.
    let name = wanted.name.unwrap_or_else(|| format!("run-{}", &id.as_str()[20..]));
    let job = launch::job(&name, &resolved.config, &wanted.wanted).map_err(|error| {
        ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_command", error.to_string())
    })?;
    let instance = Stored {
        id,
        tenant: caller.tenant,
        name,
        image: wanted.image,
        image_digest: resolved.digest.to_string(),
        vcpus: wanted.vcpus,
        memory_mb: wanted.memory_mb,
        state: Lifecycle::Created,
        created_at: api.now(),
        started_at: None,
        stopped_at: None,
        exit_code: None,
        exit_message: None,
    };
    let shape = Instance::new(&instance);
    let (instances, work) = (api.state.instances.clone(), Work { image: resolved, job });
    // A task of its own: a client that goes away leaves no half of one.
    let created = tokio::spawn(async move { instances.create(instance, work).await });
    let created = created.await.map_err(|error| ApiError::internal(&error))?;
    created.map_err(|error| not_created(error, &shape.name))?;
    let location = format!("/instances/{}", shape.id);
    Ok((StatusCode::CREATED, [(LOCATION, location)], Json(shape)).into_response())
}

fn not_created(error: InstanceError, name: &str) -> ApiError {
    match error {
        InstanceError::Store(StoreError::Taken(_)) => {
            ApiError::conflict("name_taken", format!("the tenant has an instance {name} already"))
        }
        InstanceError::Store(error @ StoreError::TooMany { .. }) => {
            let message = format!("{error}; delete some, stopped ones count too");
            ApiError::too_many("too_many_instances", message, TRY_AGAIN)
        }
        error => error.into(),
    }
}

/// Who may pull an image may run it.
async fn may_run(api: &Api, caller: &Caller, name: &Name) -> Result<bool, StoreError> {
    let space = Space::of(name);
    let owner = match space {
        Space::Build(id) => match BuildId::new(id) {
            Ok(id) => api.state.store.build(&id).await?.map(|build| build.tenant),
            Err(_) => None,
        },
        _ => None,
    };
    let who = Who { tenant: caller.tenant.clone(), role: caller.role };
    Ok(allowed(&who, space, owner.as_ref(), Action::Pull))
}

fn no_such_image(image: &Image) -> ApiError {
    let message = format!("there is no image {image} that this token may run");
    ApiError::new(StatusCode::NOT_FOUND, "image_not_found", message)
}

fn no_image(image: &Image, error: &PullError) -> ApiError {
    match error {
        PullError::Missing(_) => no_such_image(image),
        PullError::NotRunnable { .. } => {
            ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "image_not_runnable", error.to_string())
        }
        _ => {
            tracing::error!(error = chain(error), "an image cannot be looked up");
            ApiError::new(StatusCode::BAD_GATEWAY, "registry_failed", error.to_string())
        }
    }
}
