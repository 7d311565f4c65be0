//! GET `/instances`: all that the caller may see, newest first.

use axum::Json;
use axum::extract::{RawQuery, State};

use super::Instance;
use crate::api::error::ApiError;
use crate::api::openapi::params::{self, params};
use crate::api::openapi::problems::BadRequest;
use crate::api::openapi::schemas;
use crate::api::{Shared, query};
use crate::instances::State as Lifecycle;
use crate::store::Role;
use crate::token::Caller;

/// What a caller may ask the list for.
struct Filter;

params!(Filter: params::query(
    "state",
    "Only instances that are there.",
    schemas::words(Lifecycle::ALL.map(Lifecycle::as_str)),
));

/// List instances
///
/// The caller's tenant's; an administrator sees all. Newest first.
#[utoipa::path(
    get, path = "/instances", tag = "instances", params(Filter),
    responses((status = 200, description = "All of them.", body = Vec<Instance>), BadRequest),
)]
pub(in crate::api) async fn list_instances(
    State(api): State<Shared>,
    caller: Caller,
    RawQuery(query): RawQuery,
) -> Result<Json<Vec<Instance>>, ApiError> {
    let state = parse(query.as_deref())?;
    let tenant = (caller.role != Role::Admin).then_some(&caller.tenant);
    let instances = api.state.store.instances(tenant).await?;
    let wanted = instances.iter().filter(|i| state.is_none_or(|state| i.state == state));
    Ok(Json(wanted.map(Instance::new).collect()))
}

fn parse(text: Option<&str>) -> Result<Option<Lifecycle>, ApiError> {
    let mut state = None;
    for (name, value) in query::pairs(text)? {
        if name != "state" {
            return Err(query::unknown(&name, "state and no other"));
        }
        let wanted = Lifecycle::from_name(&value).ok_or_else(|| {
            let names = Lifecycle::ALL.map(Lifecycle::as_str).join(", ");
            query::invalid(&name, &value, &format!("one of {names}"))
        })?;
        if state.replace(wanted).is_some() {
            return Err(query::twice(&name));
        }
    }
    Ok(state)
}
