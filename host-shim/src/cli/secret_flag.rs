//! The value of `kiln build --secret`: `id=ID[,src=FILE|,env=VAR][,env_var=NAME]`.

use std::ffi::OsString;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use kiln_protocol::secret::{MAX_SECRET_VALUE, SecretId};
use serde_json::{Value, json};
use zeroize::Zeroizing;

use super::error::CliError;

/// A secret of a build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SecretFlag {
    id: SecretId,
    from: From,
    /// The variable of every step that holds it.
    variable: Option<String>,
}

/// Where the value is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum From {
    /// With the server: `kiln secret set`.
    Server,
    File(PathBuf),
    Environment(String),
}

/// A value to send.
pub type SecretPart = (String, Zeroizing<Vec<u8>>);

impl FromStr for SecretFlag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = "it has to be of the form id=ID[,src=FILE|,env=VAR][,env_var=NAME]";
        let (mut id, mut from, mut variable) = (None, From::Server, None);
        for part in text.split(',') {
            let (key, value) = part.split_once('=').ok_or(form)?;
            if value.is_empty() {
                return Err(format!("{key} is empty; {form}"));
            }
            let is_new = match key {
                "id" => id.replace(SecretId::new(value).map_err(|e| e.to_string())?).is_none(),
                "src" | "source" | "env" => {
                    let given = if key == "env" {
                        From::Environment(value.into())
                    } else {
                        From::File(value.into())
                    };
                    std::mem::replace(&mut from, given) == From::Server
                }
                "env_var" => variable.replace(value.to_owned()).is_none(),
                "type" if ["file", "env"].contains(&value) => true,
                _ => return Err(format!("there is no {key}; {form}")),
            };
            if !is_new {
                return Err(format!("{part} comes after another of its kind; {form}"));
            }
        }
        Ok(Self { id: id.ok_or(form)?, from, variable })
    }
}

impl SecretFlag {
    /// How the API has it, without a value.
    pub fn declared(&self) -> Value {
        match &self.variable {
            Some(variable) => json!({"id": self.id, "env_var": variable}),
            None => json!({"id": self.id}),
        }
    }

    /// Reads its value, byte for byte, where it is to be sent.
    pub fn part(&self) -> Result<Option<SecretPart>, CliError> {
        let value = match &self.from {
            From::Server => return Ok(None),
            From::File(path) => read(path)?,
            From::Environment(name) => {
                let value = std::env::var_os(name).map(OsString::into_vec).ok_or_else(|| {
                    let message = format!("--secret id={}: there is no variable {name}", self.id);
                    CliError::usage(message)
                        .hint("export it, or leave env= out to use the server's")
                })?;
                Zeroizing::new(value)
            }
        };
        if value.len() > MAX_SECRET_VALUE {
            return Err(CliError::usage(format!(
                "the secret {} has more than {MAX_SECRET_VALUE} bytes",
                self.id
            )));
        }
        Ok(Some((format!("secret.{}", self.id), value)))
    }
}

/// A file's bytes, at most one more than a secret may have.
pub fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, CliError> {
    let wrong = |e| CliError::usage(format!("the secret's file {}: {e}", path.display()));
    let mut value = Zeroizing::new(Vec::new());
    let file = File::open(path).map_err(wrong)?;
    file.take(MAX_SECRET_VALUE as u64 + 1).read_to_end(&mut value).map_err(wrong)?;
    Ok(value)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn flag(text: &str) -> Result<SecretFlag, String> {
        text.parse()
    }

    #[test]
    fn forms_of_the_flag() {
        assert_eq!(flag("id=a").unwrap().declared(), json!({"id": "a"}));
        let both = flag("id=a,src=x/y,env_var=A").unwrap();
        assert_eq!(both.declared(), json!({"id": "a", "env_var": "A"}));
        assert_eq!(both.from, From::File("x/y".into()));
        assert_eq!(flag("type=env,env=B,id=b").unwrap().from, From::Environment("B".into()));
        for bad in [
            "",
            "a",
            "id=",
            "id=a/b",
            "src=x",
            "id=a,id=b",
            "id=a,src=x,env=Y",
            "id=a,nosuch=1",
            "id=a,env_var=",
            "id=a,type=ssh",
        ] {
            assert!(flag(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn values_are_read_byte_for_byte() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("value");
        std::fs::write(&path, b" \n\0\xff\n").unwrap();
        let (name, value) =
            flag(&format!("id=a,src={}", path.display())).unwrap().part().unwrap().unwrap();
        assert_eq!((name.as_str(), value.as_slice()), ("secret.a", &b" \n\0\xff\n"[..]));
        assert_eq!(flag("id=a").unwrap().part().unwrap(), None);
        std::fs::write(&path, vec![b'x'; MAX_SECRET_VALUE + 1]).unwrap();
        assert!(flag(&format!("id=a,src={}", path.display())).unwrap().part().is_err());
        assert!(flag("id=a,src=/nonexistent").unwrap().part().is_err());
        assert!(flag("id=a,env=KILN_TEST_HAS_NO_SUCH_VARIABLE").unwrap().part().is_err());
    }
}
