//! What can be wrong with an entry, in words for the one who sent the archive.

/// Longest part of a name that is shown. Names may have 4 KiB and hold anything.
const SHOWN_NAME: usize = 200;

/// What is wrong with an entry.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// It has no name.
    #[error("has no name; leave it out")]
    NoName,
    /// Its name is absolute.
    #[error("has an absolute name; pack names relative to the archive's directory")]
    Absolute,
    /// Its name leads upwards.
    #[error("has `..` in its name; pack names relative to the archive's directory")]
    ParentDir,
    /// Its name is too long.
    #[error("has a name that is longer than {0} bytes; shorten it")]
    LongName(usize),
    /// It lies too deep.
    #[error("lies more than {0} directories deep; pack fewer levels")]
    TooDeep(usize),
    /// It is the directory itself, and none.
    #[error("is the archive's directory itself, but not a directory; leave it out")]
    Root,
    /// A link on its way leads out.
    #[error(
        "goes through a symbolic link that leaves the directory; leave the entry or the link out"
    )]
    Escapes,
    /// It lies in what is no directory.
    #[error("lies in something that is not a directory; leave one of the two out")]
    NoParent,
    /// It would replace a directory.
    #[error("would replace a directory that has files in it; leave one of the two out")]
    ReplacesDirectory,
    /// It is a link to nothing.
    #[error("is a hard link to `{0}`, which is not a file that was packed before it")]
    BadHardLink(String),
    /// It is a link without a sensible target.
    #[error("is a symbolic link without a target, or with one that is too long; leave it out")]
    BadSymlink,
    /// It is a device.
    #[error("is a device; leave it out")]
    Device,
    /// It is a FIFO.
    #[error("is a FIFO; leave it out")]
    Fifo,
    /// It is sparse in an unknown way.
    #[error("is a sparse file in a form that is not understood; pack without --sparse")]
    Sparse,
    /// Its headers are damaged.
    #[error("has extended headers that are damaged; pack it again")]
    BadHeaders,
    /// It is a directory where something else is already.
    #[error("is a directory, and something else has its name already; remove that first")]
    NotDirectory,
    /// It is another top-level entry than the one that is renamed.
    #[error(
        "is a second top-level entry, and only one can have the name that was given; name a directory that exists"
    )]
    SecondTop,
    /// Its kind is unknown.
    #[error("is of a kind that is not understood (`{0}`); leave it out")]
    UnknownKind(char),
}

/// Where in the archive something was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place(pub Option<String>);

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Some(name) => write!(f, "at or after its entry `{name}`"),
            None => f.write_str("at its start"),
        }
    }
}

/// A name, or another text, of the archive as it may be shown: no control characters, no endless text.
pub fn shown(name: &[u8]) -> String {
    let name = &name[..name.len().min(SHOWN_NAME + 1)];
    let mut text: String = String::from_utf8_lossy(name)
        .chars()
        .take(SHOWN_NAME)
        .flat_map(char::escape_debug)
        .collect();
    if name.len() > SHOWN_NAME {
        text.push('…');
    }
    text
}
