//! The field `secrets`: what the build declares, `[{"id", "env_var"?}]`. Pure.

use axum::http::StatusCode;
use kiln_protocol::secret::{MAX_SECRET_VARIABLE, MAX_SECRETS, SecretId, SecretSpec};
use serde::Deserialize;

use crate::api::error::ApiError;
use crate::api::secrets::bad_id;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Declared {
    id: String,
    #[serde(default)]
    env_var: Option<String>,
}

/// Reads the field. What it holds is not repeated where it is no JSON: somebody may have put a value there.
pub(super) fn parse(text: Option<&str>) -> Result<Vec<SecretSpec>, ApiError> {
    let Some(text) = text else { return Ok(vec![]) };
    let declared: Vec<Declared> = serde_json::from_str(text).map_err(|error| {
        invalid(format!(
            "secrets must be a JSON array of objects with id and, if wanted, env_var; it is not, at line {} column {}. \
             A value goes into a part secret.<id>",
            error.line(),
            error.column()
        ))
    })?;
    if declared.len() > MAX_SECRETS {
        return Err(ApiError::too_large(format!("secrets has more than {MAX_SECRETS} secrets")));
    }
    let mut specs: Vec<SecretSpec> = Vec::with_capacity(declared.len());
    for Declared { id, env_var } in declared {
        let id = SecretId::new(id.as_str()).map_err(|_| bad_id(&id))?;
        let variable = env_var.filter(|name| !name.is_empty());
        if let Some(name) = &variable
            && !is_variable(name)
        {
            let allowed = "a variable's name: letters, digits and '_', the first no digit";
            return Err(ApiError::invalid(&format!("env_var of the secret {id}"), name, allowed));
        }
        if specs.iter().any(|earlier| earlier.id == id) {
            return Err(invalid(format!("the secret {id} is declared twice")));
        }
        if variable.is_some() && specs.iter().any(|earlier| earlier.variable == variable) {
            let name = variable.unwrap_or_default();
            return Err(invalid(format!("two secrets want to be the variable {name}")));
        }
        specs.push(SecretSpec { id, variable });
    }
    Ok(specs)
}

fn is_variable(name: &str) -> bool {
    name.len() <= MAX_SECRET_VARIABLE
        && name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

fn invalid(message: String) -> ApiError {
    ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_field", message)
}
