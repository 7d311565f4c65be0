//! What of an image's configuration a VM needs to start it (OCI image-spec 1.1, `config.md`).

use serde::Deserialize;

use crate::digest::Digest;

/// How the image wants to be run. Nothing in it is checked but its form: it is the image's word, and for the VM.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
pub struct Config {
    /// The program and first arguments; may be empty.
    #[serde(deserialize_with = "or_default")]
    pub entrypoint: Vec<String>,
    /// Further arguments, or the whole command when there is no entry point.
    #[serde(deserialize_with = "or_default")]
    pub cmd: Vec<String>,
    /// `NAME=VALUE`.
    #[serde(deserialize_with = "or_default")]
    pub env: Vec<String>,
    /// `USER[:GROUP]` as names or numbers; empty for root.
    #[serde(deserialize_with = "or_default")]
    pub user: String,
    /// Empty for `/`.
    #[serde(deserialize_with = "or_default")]
    pub working_dir: String,
    /// `SIGTERM`, `15`; none for the runtime's own choice.
    pub stop_signal: Option<String>,
}

/// What of it is checked when a disk is made.
#[derive(Debug, Deserialize)]
pub(super) struct Image {
    #[serde(default)]
    pub(super) architecture: String,
    #[serde(default)]
    pub(super) os: String,
    #[serde(default, deserialize_with = "or_default")]
    pub(super) config: Config,
    pub(super) rootfs: Rootfs,
}

/// The layers once more, as what they are unpacked.
#[derive(Debug, Deserialize)]
pub(super) struct Rootfs {
    #[serde(deserialize_with = "or_default")]
    pub(super) diff_ids: Vec<Digest>,
}

/// Go writes `null` for what it has not got.
fn or_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Option::deserialize(deserializer).map(Option::unwrap_or_default)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_configuration_may_have_nulls_and_lack_things() {
        let text = r#"{"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": []},
            "config": {"Env": ["A=b"], "Cmd": null, "Entrypoint": ["/x"], "User": "1:2", "StopSignal": "SIGINT",
            "Labels": {"a": "b"}}}"#;
        let image: Image = serde_json::from_str(text).unwrap();
        let expected = Config {
            entrypoint: vec!["/x".into()],
            env: vec!["A=b".into()],
            user: "1:2".into(),
            stop_signal: Some("SIGINT".into()),
            ..Config::default()
        };
        assert_eq!(image.config, expected);
        let bare = r#"{"rootfs": {"diff_ids": []}, "config": null}"#;
        assert_eq!(serde_json::from_str::<Image>(bare).unwrap().config, Config::default());
        assert!(serde_json::from_str::<Image>(r#"{"config": {}}"#).is_err());
    }
}
