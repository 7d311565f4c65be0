//! Credentials from Docker's configuration (`$DOCKER_CONFIG/config.json`, else `~/.docker/config.json`).
//!
//! The file is opened here and not by docker_credential, which calls a missing file and a broken one by
//! the same name: the first means "anonymous", the second must be seen.

use std::path::{Path, PathBuf};

use docker_credential::{CredentialRetrievalError, DockerCredential};
use oci_client::secrets::RegistryAuth;

use crate::file::{self, FileError};

/// Tokens of many registries fit.
const MAX_CONFIG: u64 = 4 * 1024 * 1024;

/// Docker's configuration is there and cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// The file.
    #[error(transparent)]
    File(#[from] FileError),
    /// Its content, or a credential helper that it names.
    #[error("{} is of no use: {}", path.display(), told(cause))]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: CredentialRetrievalError,
    },
    /// The thread that asked a helper died.
    #[error("the credential helper could not be asked")]
    Helper,
}

/// What Docker's configuration has for a registry; anonymous when it has nothing.
pub async fn for_registry(registry: &str) -> Result<RegistryAuth, CredentialsError> {
    let Some(path) = config_path() else { return Ok(RegistryAuth::Anonymous) };
    let registry = registry.to_owned();
    // It may run a credential helper, which is a program that may ask for things.
    let found = tokio::task::spawn_blocking(move || from_file(&path, &registry)).await;
    found.unwrap_or(Err(CredentialsError::Helper))
}

fn from_file(path: &Path, registry: &str) -> Result<RegistryAuth, CredentialsError> {
    let bytes = match file::read_bounded(path, MAX_CONFIG) {
        Err(error) if error.is_not_found() => return Ok(RegistryAuth::Anonymous),
        other => other?,
    };
    match docker_credential::get_credential_from_reader(bytes.as_slice(), key(registry)) {
        Ok(DockerCredential::UsernamePassword(user, password)) => {
            Ok(RegistryAuth::Basic(user, password))
        }
        Ok(DockerCredential::IdentityToken(token)) => Ok(RegistryAuth::Bearer(token)),
        Err(CredentialRetrievalError::NoCredentialConfigured) => Ok(RegistryAuth::Anonymous),
        Err(cause) => Err(CredentialsError::Unusable { path: path.to_owned(), cause }),
    }
}

/// Docker stores its own registry's credentials under its first API's address.
fn key(registry: &str) -> &str {
    match registry {
        "docker.io" | "index.docker.io" => "https://index.docker.io/v1/",
        other => other,
    }
}

fn config_path() -> Option<PathBuf> {
    let directory = std::env::var_os("DOCKER_CONFIG").filter(|v| !v.is_empty()).map(PathBuf::from);
    let home = || Some(PathBuf::from(std::env::var_os("HOME")?).join(".docker"));
    Some(directory.or_else(home)?.join("config.json"))
}

/// A helper's output may hold a secret: only its name is told.
fn told(cause: &CredentialRetrievalError) -> String {
    match cause {
        CredentialRetrievalError::HelperFailure { helper, .. } => {
            format!("the credential helper {helper} failed")
        }
        other => other.to_string(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn ask(config: &str, registry: &str) -> Result<RegistryAuth, CredentialsError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.json");
        std::fs::write(&path, config).unwrap();
        from_file(&path, registry)
    }

    #[test]
    fn no_file_and_no_entry_mean_anonymous() {
        let none = from_file(Path::new("/nowhere/config.json"), "a:1").unwrap();
        assert_eq!(none, RegistryAuth::Anonymous);
        assert_eq!(ask("{}", "a:1").unwrap(), RegistryAuth::Anonymous);
        let other = r#"{"auths": {"b:2": {"auth": "dXNlcjpwYXNz"}}}"#;
        assert_eq!(ask(other, "a:1").unwrap(), RegistryAuth::Anonymous);
    }

    #[test]
    fn entries_are_found_by_host_and_port() {
        let basic = RegistryAuth::Basic("user".into(), "pass".into());
        let config = r#"{"auths": {"a:1": {"auth": "dXNlcjpwYXNz"}}}"#;
        assert_eq!(ask(config, "a:1").unwrap(), basic);
        let hub = r#"{"auths": {"https://index.docker.io/v1/": {"auth": "dXNlcjpwYXNz"}}}"#;
        assert_eq!(ask(hub, "index.docker.io").unwrap(), basic);
    }

    #[test]
    fn a_broken_file_is_named() {
        let error = ask("{", "a:1").unwrap_err().to_string();
        assert!(error.contains("config.json is of no use"), "{error}");
        let error = ask(r#"{"auths": {"a:1": {"auth": "%"}}}"#, "a:1").unwrap_err().to_string();
        assert!(error.contains("decode"), "{error}");
    }

    #[test]
    fn what_a_helper_printed_is_not_told() {
        let cause = CredentialRetrievalError::HelperFailure {
            helper: "pass".into(),
            stdout: "hunter2".into(),
            stderr: String::new(),
        };
        let error = CredentialsError::Unusable { path: "c".into(), cause }.to_string();
        assert_eq!(error, "c is of no use: the credential helper pass failed");
    }
}
