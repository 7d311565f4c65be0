//! The build context on disk: which Dockerfile, which ignore file, which paths, in which order.

use std::fs;
use std::io::{ErrorKind, Read};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use kiln_protocol::job::MAX_DOCKERFILE;

use super::dockerignore::Excludes;
use super::error::CliError;

/// Longest ignore file: far above any that people write.
const MAX_IGNORE_FILE: usize = 4 * 1024 * 1024;

/// A directory that is sent.
#[derive(Debug)]
pub struct Context {
    /// Where it is.
    pub root: PathBuf,
    /// What of it stays at home.
    pub excludes: Excludes,
    /// Sent as `.dockerignore` instead of what may have that name; see [`Context::open`].
    pub ignore_file: Option<Vec<u8>>,
    /// Entries of the root that stay at home whatever the ignore file says.
    withheld: Vec<&'static str>,
}

/// An entry of the context.
#[derive(Debug)]
pub struct Entry {
    /// Below the root.
    pub path: PathBuf,
    /// What it was when it was found; links not followed.
    pub metadata: fs::Metadata,
}

impl Context {
    /// Opens a directory and reads its ignore file: `<Dockerfile>.dockerignore` beside the Dockerfile,
    /// or `.dockerignore` at the root, as Docker does.
    ///
    /// As with Docker, an ignore file and the Dockerfile are sent even where they are excluded: the
    /// builder needs them, and applies the same rules to COPY. A Dockerfile of `-f` goes apart from
    /// the source, so the builder would not find the ignore file that belongs to it: that one is
    /// then sent as `.dockerignore`, with a line more that keeps it out of COPY.
    pub fn open(root: &Path, dockerfile: Option<&Path>) -> Result<Self, CliError> {
        let is_directory = fs::metadata(root)
            .map_err(|e| CliError::failed(format!("the source {}: {e}", root.display())))?
            .is_dir();
        if !is_directory {
            return Err(CliError::failed(format!(
                "the source {} is not a directory",
                root.display()
            ))
            .hint("give the directory; to send an archive: kiln build - < ARCHIVE.tar"));
        }
        let beside = match dockerfile {
            Some(dockerfile) => with_suffix(dockerfile, ".dockerignore"),
            None => root.join("Dockerfile.dockerignore"),
        };
        let general = root.join(".dockerignore");
        let own = read_if_there(&beside, MAX_IGNORE_FILE)?;
        let (path, mut text) = if let Some(text) = own {
            (beside.as_path(), text)
        } else {
            let text = read_if_there(&general, MAX_IGNORE_FILE)?.unwrap_or_default();
            (general.as_path(), text)
        };
        let mut excludes = Excludes::parse(&String::from_utf8_lossy(&text))
            .map_err(|e| CliError::failed(format!("{}: {e}", path.display())))?;
        let mut withheld = vec![];
        let ignore_file = if dockerfile.is_some() && path == beside {
            text.extend_from_slice(b"\n.dockerignore\n");
            withheld.push(".dockerignore");
            Some(text)
        } else {
            // Not kept where a file is sent in its place.
            excludes.keep(".dockerignore");
            None
        };
        if dockerfile.is_none() {
            excludes.keep("Dockerfile");
            excludes.keep("Dockerfile.dockerignore");
        }
        Ok(Self { root: root.to_owned(), excludes, ignore_file, withheld })
    }

    /// Keeps a `Dockerfile` at the root back: the one that was asked for is not there, and the build is
    /// to find that out, not to take another.
    #[must_use]
    pub fn without_dockerfile(mut self) -> Self {
        self.withheld.push("Dockerfile");
        self
    }

    /// Gives every entry that is sent to `send`, directories before what is in them, names in the
    /// order of their bytes; and every entry that cannot be sent to `skip`.
    pub fn walk<E: From<std::io::Error>>(
        &self,
        send: &mut impl FnMut(&Entry) -> Result<(), E>,
        skip: &mut impl FnMut(&Path, &str),
    ) -> Result<(), E> {
        let mut walk = Walk { context: self, waiting: vec![], send, skip };
        walk.directory(Path::new(""))
    }
}

struct Walk<'a, S, K> {
    context: &'a Context,
    /// Excluded directories above here, sent only when something in them is.
    waiting: Vec<Entry>,
    send: &'a mut S,
    skip: &'a mut K,
}

impl<S, K> Walk<'_, S, K> {
    fn directory<E>(&mut self, below: &Path) -> Result<(), E>
    where
        E: From<std::io::Error>,
        S: FnMut(&Entry) -> Result<(), E>,
        K: FnMut(&Path, &str),
    {
        let at = self.context.root.join(below);
        let mut names = fs::read_dir(&at)
            .and_then(|entries| {
                entries.map(|e| e.map(|e| e.file_name())).collect::<Result<Vec<_>, _>>()
            })
            .map_err(|e| named(&at, e))?;
        names.sort();
        for name in names {
            let path = below.join(&name);
            if self.context.withheld.iter().any(|withheld| path == Path::new(withheld)) {
                continue;
            }
            let text = path.to_string_lossy();
            let excluded = self.context.excludes.excludes(&text);
            if excluded && !self.context.excludes.may_include_below(&text) {
                continue;
            }
            let full = self.context.root.join(&path);
            let metadata = fs::symlink_metadata(&full).map_err(|e| named(&full, e))?;
            let kind = metadata.file_type();
            if kind.is_dir() {
                let depth = self.waiting.len();
                let entry = Entry { path: path.clone(), metadata };
                if excluded {
                    self.waiting.push(entry);
                } else {
                    self.flush()?;
                    (self.send)(&entry)?;
                }
                self.directory(&path)?;
                self.waiting.truncate(depth);
            } else if !excluded {
                let special = if kind.is_socket() {
                    Some("a socket")
                } else if kind.is_fifo() {
                    Some("a named pipe")
                } else if kind.is_block_device() || kind.is_char_device() {
                    Some("a device")
                } else {
                    None
                };
                if let Some(special) = special {
                    (self.skip)(&path, special);
                } else {
                    self.flush()?;
                    (self.send)(&Entry { path, metadata })?;
                }
            }
        }
        Ok(())
    }

    fn flush<E>(&mut self) -> Result<(), E>
    where
        S: FnMut(&Entry) -> Result<(), E>,
    {
        self.waiting.drain(..).try_for_each(|entry| (self.send)(&entry))
    }
}

/// Reads the Dockerfile that `-f` names, relative to the current directory as with Docker; `None`
/// where there is none.
pub fn read_dockerfile(path: &Path) -> Result<Option<Vec<u8>>, CliError> {
    let content = read_if_there(path, MAX_DOCKERFILE)?;
    // For the API an empty one is none, and the source's would be taken.
    Ok(content.map(|content| if content.is_empty() { b"\n".to_vec() } else { content }))
}

fn read_if_there(path: &Path, limit: usize) -> Result<Option<Vec<u8>>, CliError> {
    let wrong = |e: &dyn std::fmt::Display| CliError::failed(format!("{}: {e}", path.display()));
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            return Ok(None);
        }
        Err(error) => return Err(wrong(&error)),
    };
    let mut content = vec![];
    // One byte more than fits tells that there is more.
    file.take(limit as u64 + 1).read_to_end(&mut content).map_err(|e| wrong(&e))?;
    if content.len() > limit {
        return Err(wrong(&format!("it has more than {limit} bytes")));
    }
    Ok(Some(content))
}

/// An I/O error with the path that it is about.
#[expect(clippy::needless_pass_by_value, reason = "stands in map_err")]
pub fn named(path: &Path, error: std::io::Error) -> std::io::Error {
    std::io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn tree(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        dir
    }

    fn sent(context: &Context) -> Vec<String> {
        let mut paths = vec![];
        let mut send = |entry: &Entry| {
            paths.push(entry.path.to_str().unwrap().to_owned());
            Ok::<_, std::io::Error>(())
        };
        context.walk(&mut send, &mut |_, _| {}).unwrap();
        paths
    }

    #[test]
    fn entries_come_in_the_order_of_their_bytes() {
        let dir = tree(&[("b", ""), ("a/z", ""), ("a/B", ""), ("a.txt", ""), ("é", "")]);
        let context = Context::open(dir.path(), None).unwrap();
        assert_eq!(sent(&context), ["a", "a/B", "a/z", "a.txt", "b", "é"]);
    }

    #[test]
    fn what_is_excluded_stays_and_its_parents_come_with_what_is_taken_back() {
        let dir = tree(&[
            (".dockerignore", "docs\n!docs/keep/me\nout\nDockerfile\n.dockerignore\n"),
            ("Dockerfile", ""),
            ("docs/a", ""),
            ("docs/keep/me", ""),
            ("docs/keep/not", ""),
            ("out/x/y", ""),
            ("src/out", ""),
        ]);
        let context = Context::open(dir.path(), None).unwrap();
        let expected =
            [".dockerignore", "Dockerfile", "docs", "docs/keep", "docs/keep/me", "src", "src/out"];
        assert_eq!(sent(&context), expected);
    }

    #[test]
    fn the_dockerfiles_own_ignore_file_wins() {
        let dir = tree(&[
            (".dockerignore", "a\n"),
            ("Dockerfile.dockerignore", "b\n"),
            ("sub/x.dockerfile", ""),
            ("sub/x.dockerfile.dockerignore", "c\nsub\n"),
            ("a", ""),
            ("b", ""),
            ("c", ""),
        ]);
        let open =
            |dockerfile: Option<PathBuf>| Context::open(dir.path(), dockerfile.as_deref()).unwrap();
        let default = open(None);
        assert!(default.ignore_file.is_none());
        let paths = sent(&default);
        assert!(paths.contains(&"a".into()) && !paths.contains(&"b".into()));
        assert!(paths.contains(&"Dockerfile.dockerignore".into()));

        let named = open(Some(dir.path().join("sub/x.dockerfile")));
        assert_eq!(sent(&named), ["Dockerfile.dockerignore", "a", "b"]);
        assert_eq!(named.ignore_file.unwrap(), b"c\nsub\n\n.dockerignore\n");

        let other = open(Some(dir.path().join("sub/other")));
        assert!(other.ignore_file.is_none());
        assert!(!sent(&other).contains(&"a".into()), "the general one is next");
    }

    #[test]
    fn special_files_are_named_and_not_sent() {
        let dir = tree(&[("a", "")]);
        let _socket = std::os::unix::net::UnixListener::bind(dir.path().join("s")).unwrap();
        nix::unistd::mkfifo(&dir.path().join("p"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let context = Context::open(dir.path(), None).unwrap();
        let mut skipped = vec![];
        let mut sent = |_: &Entry| Ok::<_, std::io::Error>(());
        context
            .walk(&mut sent, &mut |path, what| skipped.push(format!("{} {what}", path.display())))
            .unwrap();
        assert_eq!(skipped, ["p a named pipe", "s a socket"]);
    }

    #[test]
    fn a_dockerfile_is_read_up_to_its_bound() {
        let dir = tree(&[
            ("fits", &"x".repeat(MAX_DOCKERFILE)),
            ("large", &"x".repeat(MAX_DOCKERFILE + 1)),
        ]);
        let read = |name| read_dockerfile(&dir.path().join(name));
        assert_eq!(read("fits").unwrap().unwrap().len(), MAX_DOCKERFILE);
        assert!(read("large").is_err());
        assert_eq!(read("none").unwrap(), None);
        assert_eq!(read("fits/none").unwrap(), None);
    }

    #[test]
    fn a_dockerfile_can_be_kept_back_whatever_the_patterns_say() {
        let dir = tree(&[
            (".dockerignore", "!Dockerfile\n"),
            ("Dockerfile/x", ""),
            ("Dockerfile.dev", ""),
            ("sub/Dockerfile", ""),
        ]);
        let context = Context::open(dir.path(), None).unwrap().without_dockerfile();
        assert_eq!(sent(&context), [".dockerignore", "Dockerfile.dev", "sub", "sub/Dockerfile"]);
    }

    #[test]
    fn a_bad_pattern_names_its_file() {
        let dir = tree(&[(".dockerignore", "a[\n")]);
        let error = Context::open(dir.path(), None).unwrap_err();
        assert!(error.message.contains(".dockerignore") && error.message.contains("a["), "{error}");
    }
}
