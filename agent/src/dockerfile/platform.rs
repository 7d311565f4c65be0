//! `FROM --platform`: this machine's, in whatever way it is written, or refused. Pure.
//!
//! For an image of one platform the engine only warns that it is another one's, and builds from it. So the
//! flag never reaches it: what is left out is this machine's.

use std::collections::BTreeMap;
use std::ops::Range;

use super::words::Words;

/// Docker's name for the processor that this runs on.
const ARCHITECTURE: &str = match std::env::consts::ARCH.as_bytes() {
    b"x86_64" => "amd64",
    b"aarch64" => "arm64",
    _ => std::env::consts::ARCH,
};

/// The variables that a platform can be written with.
pub struct Platforms<'a> {
    /// `--build-arg`; they win.
    given: &'a [(String, String)],
    /// Those of every `ARG` before the first `FROM`.
    globals: BTreeMap<String, Option<String>>,
    in_stages: bool,
}

impl<'a> Platforms<'a> {
    /// With the build's arguments.
    pub fn new(given: &'a [(String, String)]) -> Self {
        Self { given, globals: BTreeMap::new(), in_stages: false }
    }

    /// Takes the next instruction. Gives the flags to leave out; or why it is refused.
    pub fn see(&mut self, words: &Words<'_>) -> Result<Vec<Range<usize>>, String> {
        match words.keyword.as_str() {
            "ARG" if !self.in_stages => {
                for word in words.rest.split_ascii_whitespace() {
                    let (name, value) =
                        word.split_once('=').map_or((word, None), |(name, value)| {
                            let value: String =
                                value.chars().filter(|c| !['"', '\''].contains(c)).collect();
                            // One that is not known here is not known where it is used either.
                            (name, Some(self.expanded(&value).unwrap_or(value)))
                        });
                    self.globals.insert(name.to_owned(), value);
                }
                Ok(Vec::new())
            }
            "FROM" => {
                self.in_stages = true;
                let flags = words.flags.iter().filter(|flag| flag.name == "platform");
                flags
                    .map(|flag| {
                        let written = flag.value.as_deref().unwrap_or_default();
                        self.is_own(written).map(|()| flag.range.clone())
                    })
                    .collect()
            }
            _ => Ok(Vec::new()),
        }
    }

    fn is_own(&self, written: &str) -> Result<(), String> {
        let own = format!("linux/{ARCHITECTURE}");
        let Some(platform) = self.expanded(written) else {
            return Err(format!(
                "FROM --platform={written}: what it is cannot be told: write it out, or leave it out for {own}"
            ));
        };
        if is_machines(&platform.to_ascii_lowercase()) {
            return Ok(());
        }
        let is = if platform == written { String::new() } else { format!(" is {platform:?}") };
        Err(format!("FROM --platform={written}{is}: only {own} is built here, this machine's own"))
    }

    /// A text with its variables put in: `$name`, `${name}`, `${name:-word}`, `${name:+word}`.
    fn expanded(&self, text: &str) -> Option<String> {
        let Some((before, rest)) = text.split_once('$') else {
            return (!text.contains(['\\', '{', '}'])).then(|| text.to_owned());
        };
        let is_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
        let braced = rest.strip_prefix('{');
        let from = braced.unwrap_or(rest);
        let (name, rest) = from.split_at(from.find(|c| !is_name(c)).unwrap_or(from.len()));
        if name.is_empty() || before.contains(['\\', '{', '}']) {
            return None;
        }
        let value = self.value(name);
        let (value, rest) = if braced.is_none() {
            (value, rest)
        } else {
            let (modifier, rest) = rest.split_once('}')?;
            let word = |word| self.expanded(word);
            let value = match (modifier.get(..2).unwrap_or(modifier), value.is_empty()) {
                ("", _) | (":-", false) => value,
                (":-", true) | (":+", false) => word(modifier.get(2..)?)?,
                (":+", true) => String::new(),
                _ => return None,
            };
            (value, rest)
        };
        Some(format!("{before}{value}{}", self.expanded(rest)?))
    }

    fn value(&self, name: &str) -> String {
        let automatic = match name {
            "BUILDPLATFORM" | "TARGETPLATFORM" => Some(format!("linux/{ARCHITECTURE}")),
            "BUILDOS" | "TARGETOS" => Some("linux".to_owned()),
            "BUILDARCH" | "TARGETARCH" => Some(ARCHITECTURE.to_owned()),
            _ => None,
        };
        let declared = self.globals.get(name);
        let given = self.given.iter().rfind(|(given, _)| given == name);
        let given = given.filter(|_| declared.is_some() || automatic.is_some());
        given
            .map(|(_, value)| value.clone())
            .or_else(|| declared.cloned().flatten())
            .or(automatic)
            .unwrap_or_default()
    }
}

/// `linux/amd64`, `linux`, `amd64`, and processors by the names that Docker takes for the same
/// (containerd's `platforms`, *Parse* and *Normalize*).
fn is_machines(platform: &str) -> bool {
    let architecture = |name: &str| match name {
        "x86_64" | "x86-64" => ARCHITECTURE == "amd64",
        "aarch64" => ARCHITECTURE == "arm64",
        name => name == ARCHITECTURE,
    };
    let parts: Vec<_> = platform.split('/').collect();
    match parts[..] {
        [one] => one == "linux" || architecture(one),
        ["linux", name] => architecture(name),
        // The first of each is what one without a variant is.
        ["linux", name, variant] => {
            architecture(name)
                && matches!((ARCHITECTURE, variant), ("amd64", "v1") | ("arm64", "v8"))
        }
        _ => false,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::scan::scan;
    use super::*;

    fn last(text: &str, given: &[(&str, &str)]) -> Result<usize, String> {
        let given: Vec<_> =
            given.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let mut platforms = Platforms::new(&given);
        let scanned = scan(text).unwrap();
        let seen = scanned.instructions.iter().map(|i| platforms.see(&Words::of(i)));
        seen.last().unwrap().map(|flags| flags.len())
    }

    fn own() -> String {
        format!("linux/{ARCHITECTURE}")
    }

    #[test]
    fn this_machines_is_left_out() {
        for platform in [
            &own(),
            "linux",
            &own().to_uppercase(),
            ARCHITECTURE,
            "$BUILDPLATFORM",
            "${TARGETPLATFORM}",
            "\"$TARGETOS/${TARGETARCH}\"",
            "${NONE:-linux}",
            "${BUILDOS:+linux}/$BUILDARCH",
        ] {
            assert_eq!(last(&format!("FROM --platform={platform} x"), &[]), Ok(1), "{platform}");
        }
        assert_eq!(last("FROM x", &[]), Ok(0));
        let named = "ARG O=linux A=$BUILDARCH\nARG P=\"$O/$A\"\nFROM --platform=$P x";
        assert_eq!(last(named, &[]), Ok(1));
        let own = own();
        assert_eq!(last("ARG P=linux/s390x\nFROM --platform=$P x", &[("P", &own)]), Ok(1));
        assert_eq!(
            last("ARG P\nFROM x\nARG P=linux/s390x\nFROM --platform=${P:-linux} y", &[]),
            Ok(1)
        );
    }

    #[test]
    fn another_one_is_refused() {
        for platform in [
            "linux/s390x",
            "windows/amd64",
            "linux/amd64/v3",
            "riscv64",
            "linux/",
            "",
            "/",
            "$NONE",
            "${BUILDPLATFORM",
            "${BUILDPLATFORM#linux/}",
            "${BUILDPLATFORM?x}",
            "\\$BUILDPLATFORM",
            "$",
            "é",
            "${BUILDPLATFORM:é}",
        ] {
            let refused = last(&format!("FROM --platform={platform} x"), &[]).unwrap_err();
            assert!(refused.starts_with("FROM --platform="), "{platform}: {refused}");
        }
        let refused = last("ARG P=linux\nFROM --platform=$P x", &[("P", "linux/s390x")]);
        assert!(refused.unwrap_err().contains("is \"linux/s390x\""));
        last("FROM --platform=$P x", &[("P", "linux")]).unwrap_err();
        last("FROM --platform=$TARGETPLATFORM x", &[("TARGETPLATFORM", "linux/s390x")])
            .unwrap_err();
        last("ARG TARGETPLATFORM=linux/s390x\nFROM --platform=$TARGETPLATFORM x", &[]).unwrap_err();
    }
}
