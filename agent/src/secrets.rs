//! A build's secrets inside the VM: asked for before the first step, in files of memory that only root reads,
//! overwritten when the build ends.
//!
//! The engine never has a value, for buildah would copy it to the scratch disk: it is given a placeholder for each
//! secret, by whose content the runtime's wrapper knows where the value belongs ([`crate::runtime`]).

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kiln_protocol::event::{Failure, FailureKind};
use kiln_protocol::secret::{SecretAnswer, SecretId, SecretSpec, SecretValue};
use tokio::time::timeout;

use crate::events::Reporter;
use crate::session::fail;

const VALUES: &str = "values";
const PLACEHOLDERS: &str = "placeholders";

/// How long the host may take for one of them.
const PATIENCE: Duration = Duration::from_secs(30);

/// The secrets of one build. Dropped, they are wiped.
#[derive(Debug)]
pub struct Secrets {
    directory: PathBuf,
    list: Vec<Secret>,
}

/// A secret whose value is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Secret {
    /// What the Dockerfile calls it.
    pub id: SecretId,
    /// Holds the value.
    pub file: PathBuf,
    /// What the engine is given in its place.
    pub placeholder: PathBuf,
    /// What the placeholder holds: nobody's file but ours.
    pub marker: String,
    /// A variable of every step that is to hold it.
    pub variable: Option<String>,
}

impl Secrets {
    /// Asks for each, in order. The first that cannot be had fails the build by its name.
    pub async fn fetch(
        specs: Vec<SecretSpec>,
        directory: &Path,
        reporter: &Reporter,
    ) -> Result<Self, Failure> {
        let mut secrets = Self { directory: directory.to_owned(), list: Vec::new() };
        if specs.is_empty() {
            return Ok(secrets);
        }
        let nonce = secrets.begin().map_err(|error| cannot_keep(directory, &error))?;
        for SecretSpec { id, variable } in specs {
            let value = ask(&id, reporter).await?;
            if variable.is_some() {
                check_variable(&id, &value)?;
            }
            let file = directory.join(VALUES).join(id.as_str());
            write(&file, value.expose()).map_err(|error| cannot_keep(&file, &error))?;
            let marker = format!("kiln-secret {nonce} {id}");
            let placeholder = directory.join(PLACEHOLDERS).join(id.as_str());
            write(&placeholder, marker.as_bytes())
                .map_err(|error| cannot_keep(&placeholder, &error))?;
            secrets.list.push(Secret { id, file, placeholder, marker, variable });
        }
        Ok(secrets)
    }

    /// Those that are there.
    pub fn list(&self) -> &[Secret] {
        &self.list
    }

    /// Makes the directories; gives what nobody else's file holds.
    fn begin(&self) -> io::Result<String> {
        for name in [VALUES, PLACEHOLDERS] {
            DirBuilder::new().mode(0o700).recursive(true).create(self.directory.join(name))?;
        }
        let mut nonce = [0; 16];
        File::open("/dev/urandom")?.read_exact(&mut nonce)?;
        Ok(nonce.iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

impl Drop for Secrets {
    fn drop(&mut self) {
        if let Err(error) = wipe(&self.directory)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::error!(%error, "the build's secrets could not be wiped");
        }
    }
}

async fn ask(id: &SecretId, reporter: &Reporter) -> Result<SecretValue, Failure> {
    let missing = |why: &str| {
        fail(FailureKind::SecretMissing, format!("the secret \"{id}\" cannot be had: {why}"))
    };
    match timeout(PATIENCE, reporter.ask(id.clone())).await {
        Ok(Some(SecretAnswer::Value(value))) => Ok(value),
        Ok(Some(SecretAnswer::Missing)) => Err(missing(
            "nobody has given it: send it with the build, or set it with `kiln secret set`",
        )),
        Ok(Some(SecretAnswer::Denied)) => Err(missing("the build has not declared it")),
        Ok(None) => Err(missing("the session is over")),
        Err(_) => {
            let seconds = PATIENCE.as_secs();
            Err(missing(&format!("the host did not give it within {seconds} s; build again")))
        }
    }
}

/// The kernel ends a variable at a NUL, and a container's config is text.
fn check_variable(id: &SecretId, value: &SecretValue) -> Result<(), Failure> {
    let why = match std::str::from_utf8(value.expose()) {
        Err(_) => "it is not UTF-8",
        Ok(text) if text.contains('\0') => "it holds a NUL",
        Ok(_) => return Ok(()),
    };
    let message = format!("the secret \"{id}\" cannot be a variable: {why}; mount it as a file");
    Err(fail(FailureKind::SecretMissing, message))
}

fn write(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o400).open(path)?;
    file.write_all(content)
}

fn cannot_keep(path: &Path, error: &io::Error) -> Failure {
    let path = path.display();
    fail(FailureKind::Internal, format!("the agent could not keep secrets in {path}: {error}"))
}

/// Overwrites what the directory and those in it hold, and removes it.
fn wipe(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let kind = entry.file_type()?;
        if kind.is_dir() {
            wipe(&entry.path())?;
        } else if kind.is_file() {
            overwrite(&OpenOptions::new().write(true).open(entry.path())?)?;
        }
    }
    fs::remove_dir_all(directory)
}

fn overwrite(mut file: &File) -> io::Result<()> {
    let mut left = file.metadata()?.len();
    let zeros = [0; 4096];
    while left > 0 {
        let length = usize::try_from(left).unwrap_or(zeros.len()).min(zeros.len());
        file.write_all(&zeros[..length])?;
        left -= length as u64;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::events::{Report, channel};

    fn spec(id: &str, variable: Option<&str>) -> SecretSpec {
        SecretSpec { id: SecretId::new(id).unwrap(), variable: variable.map(str::to_owned) }
    }

    fn value(bytes: &[u8]) -> SecretAnswer {
        SecretAnswer::Value(SecretValue::new(bytes.to_vec()))
    }

    /// What the build gets when the host answers like this, in order.
    async fn fetched(
        specs: Vec<SecretSpec>,
        answers: Vec<SecretAnswer>,
        directory: &Path,
    ) -> Result<Secrets, Failure> {
        let (reporter, mut reports) = channel();
        let host = tokio::spawn(async move {
            for given in answers {
                let Some(Report::Ask { answer, .. }) = reports.recv().await else { panic!() };
                answer.send(given).unwrap();
            }
            // Whoever asks more is not answered.
            while let Some(report) = reports.recv().await {
                std::mem::forget(report);
            }
        });
        let secrets = Secrets::fetch(specs, directory, &reporter).await;
        drop(reporter);
        host.await.unwrap();
        secrets
    }

    #[tokio::test]
    async fn values_are_kept_byte_for_byte_for_root_alone_and_wiped() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("secrets");
        let bytes = b" \n\0\xff trailing \n";
        let specs = vec![spec("a", None), spec("b.c", Some("B"))];
        let secrets = fetched(specs, vec![value(bytes), value(b"")], &directory).await.unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o7777;
        let [a, b] = secrets.list() else { panic!() };
        assert_eq!(fs::read_to_string(&a.placeholder).unwrap(), a.marker);
        assert!(a.marker != b.marker && a.marker.ends_with(" a"), "{}", a.marker);
        assert_eq!(fs::read(&a.file).unwrap(), bytes);
        assert_eq!((fs::read(&b.file).unwrap().len(), b.variable.as_deref()), (0, Some("B")));
        assert_eq!((mode(&a.file), mode(&directory)), (0o400, 0o700));
        // Whoever still has it open, reads zeros.
        let mut open = File::open(&a.file).unwrap();
        drop(secrets);
        let mut left = Vec::new();
        open.read_to_end(&mut left).unwrap();
        assert_eq!(left, vec![0; bytes.len()]);
        assert!(!directory.exists());
    }

    #[tokio::test]
    async fn one_that_cannot_be_had_fails_by_name_and_the_others_go() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("secrets");
        for (answer, why) in
            [(SecretAnswer::Missing, "kiln secret set"), (SecretAnswer::Denied, "not declared")]
        {
            let specs = vec![spec("first", None), spec("second", None)];
            let failure = fetched(specs, vec![value(b"x"), answer], &directory).await.unwrap_err();
            assert_eq!(failure.kind, FailureKind::SecretMissing);
            assert!(failure.message.contains("\"second\""), "{}", failure.message);
            assert!(failure.message.contains(why), "{}", failure.message);
            assert!(!directory.exists());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_does_not_come_in_time_fails_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let failure = fetched(vec![spec("late", None)], vec![], dir.path()).await.unwrap_err();
        assert_eq!(failure.kind, FailureKind::SecretMissing);
        assert!(failure.message.contains("\"late\"") && failure.message.contains("30 s"));
    }

    #[tokio::test]
    async fn what_cannot_be_a_variable_is_refused_as_one() {
        let dir = tempfile::tempdir().unwrap();
        for (bytes, why) in [(&b"\xff"[..], "UTF-8"), (b"a\0b", "NUL")] {
            let directory = dir.path().join("secrets");
            let specs = vec![spec("binary", Some("B"))];
            let failure = fetched(specs, vec![value(bytes)], &directory).await.unwrap_err();
            assert!(failure.message.contains(why), "{}", failure.message);
        }
    }

    #[tokio::test]
    async fn a_build_without_any_makes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("secrets");
        let secrets = fetched(vec![], vec![], &directory).await.unwrap();
        assert!(secrets.list().is_empty() && !directory.exists());
    }
}
