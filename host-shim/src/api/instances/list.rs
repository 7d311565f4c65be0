//! GET `/instances`: all that the caller may see, newest first.

use axum::Json;
use axum::extract::{RawQuery, State};
use url::form_urlencoded;

use super::Instance;
use crate::api::Shared;
use crate::api::error::{ApiError, shown};
use crate::instances::State as Lifecycle;
use crate::store::Role;
use crate::token::Caller;

pub(in crate::api) async fn list_instances(
    State(api): State<Shared>,
    caller: Caller,
    RawQuery(query): RawQuery,
) -> Result<Json<Vec<Instance>>, ApiError> {
    let state = parse(query.as_deref().unwrap_or_default())?;
    let tenant = (caller.role != Role::Admin).then_some(&caller.tenant);
    let instances = api.state.store.instances(tenant).await?;
    let wanted = instances.iter().filter(|i| state.is_none_or(|state| i.state == state));
    Ok(Json(wanted.map(Instance::new).collect()))
}

fn parse(query: &str) -> Result<Option<Lifecycle>, ApiError> {
    let mut state = None;
    for (name, value) in form_urlencoded::parse(query.as_bytes()) {
        if name != "state" {
            let message =
                format!("there is no parameter {}; this list has only state", shown(&name));
            return Err(ApiError::bad_request("unknown_parameter", message));
        }
        let wanted = Lifecycle::from_name(&value).ok_or_else(|| {
            let names = Lifecycle::ALL.map(Lifecycle::as_str).join(", ");
            let message = format!("state is {}; it must be one of {names}", shown(&value));
            ApiError::bad_request("invalid_query", message)
        })?;
        if state.replace(wanted).is_some() {
            return Err(ApiError::bad_request("invalid_query", "state is given twice"));
        }
    }
    Ok(state)
}
