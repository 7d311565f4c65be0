//! `/instances`: images that run. The names are hypeman's (0.28.0); what Kiln does not do is refused by name.

pub(super) mod create;
pub(super) mod delete;
mod fields;
pub(super) mod get;
pub(super) mod list;
pub(super) mod logs;
pub(super) mod schema;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::openapi::schemas;
use super::types::rfc3339;
use crate::instances::{Instance as Stored, InstanceError};

use super::error::ApiError;

/// An instance.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Instance {
    /// Its id.
    #[schema(value_type = schemas::Id)]
    pub id: String,
    /// Its name, the tenant's only one.
    pub name: String,
    /// The image as it was asked for.
    pub image: String,
    /// Of the image's manifest.
    #[schema(value_type = schemas::Digest)]
    pub image_digest: String,
    /// `Created`, `Initializing`, `Running` or `Stopped`.
    #[schema(value_type = schemas::InstanceState)]
    pub state: String,
    /// RFC 3339.
    #[schema(value_type = schemas::Time)]
    pub created_at: String,
    /// RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = schemas::Time, required = false)]
    pub started_at: Option<String>,
    /// RFC 3339.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = schemas::Time, required = false)]
    pub stopped_at: Option<String>,
    /// Of the program, once it has ended: 128 + n when signal n ended it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub exit_code: Option<u8>,
    /// Why it ended, where it was not its program's own end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(nullable = false)]
    pub exit_message: Option<String>,
    /// Of its VM.
    pub vcpus: u32,
    /// Of its VM's memory, such as `1024MB`.
    pub size: String,
    /// Whose it is.
    #[schema(value_type = schemas::TenantName)]
    pub tenant: String,
}

impl Instance {
    /// The JSON of an instance.
    pub fn new(instance: &Stored) -> Self {
        Self {
            id: instance.id.to_string(),
            name: instance.name.clone(),
            image: instance.image.clone(),
            image_digest: instance.image_digest.clone(),
            state: instance.state.to_string(),
            created_at: rfc3339(instance.created_at),
            started_at: instance.started_at.map(rfc3339),
            stopped_at: instance.stopped_at.map(rfc3339),
            exit_code: instance.exit_code,
            exit_message: instance.exit_message.clone(),
            vcpus: instance.vcpus,
            size: format!("{}MB", instance.memory_mb),
            tenant: instance.tenant.to_string(),
        }
    }
}

impl From<InstanceError> for ApiError {
    fn from(error: InstanceError) -> Self {
        match error {
            InstanceError::Store(error) => error.into(),
            InstanceError::Stopping => {
                let status = axum::http::StatusCode::SERVICE_UNAVAILABLE;
                Self::new(status, "stopping", error.to_string()).retry_after(5)
            }
            InstanceError::Io { .. } => Self::internal(&error),
        }
    }
}
