//! The text parts of POST `/builds`: what each may hold. Pure.
//!
//! A field that Kiln does not act on yet is refused unless it asks for nothing: to take it and do
//! nothing would be worse.

mod network;
pub(super) mod schema;
mod secrets;
pub(super) mod tags;

use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use axum::http::StatusCode;
use kiln_protocol::job::{MAX_BUILD_ARGS, MAX_BUILD_ARGS_BYTES, MAX_DOCKERFILE, MAX_JOB_TEXT};

use super::Limits;
use super::error::{ApiError, shown};
use crate::build::{ImageName, NORMAL_PRIORITY, Request, Tenant};

/// The part that is not text.
pub(super) const SOURCE: &str = "source";
/// Longest repository, tenant included: the distribution specification's bound.
const MAX_REPOSITORY: usize = 255;
/// Longest tag of an image, by the same.
const MAX_IMAGE_TAG: usize = 128;
/// Longest name of a stage; they are words.
const MAX_TARGET: usize = 128;
/// Longest name of a build argument, in characters.
const MAX_ARG_NAME: usize = 256;

/// Longest time that a failed step stays: a day.
pub(super) const MAX_KEEP_SECONDS: u32 = 24 * 60 * 60;

/// A part that holds a number.
struct Number {
    name: &'static str,
    default: u32,
    least: u32,
    most: fn(&Limits) -> u32,
}

const TIMEOUT: Number = Number {
    name: "timeout_seconds",
    default: 600,
    least: 1,
    most: |limits| limits.max_timeout_seconds,
};
const MEMORY: Number =
    Number { name: "memory_mb", default: 2048, least: 256, most: |limits| limits.max_memory_mb };
const CPUS: Number = Number { name: "cpus", default: 2, least: 1, most: |limits| limits.max_cpus };
const DISK: Number =
    Number { name: "disk_gb", default: 10, least: 1, most: |limits| limits.max_disk_gb };
const KEEP: Number =
    Number { name: "keep_failed_seconds", default: 0, least: 0, most: |_| MAX_KEEP_SECONDS };

const PRIORITY: Number =
    Number { name: "priority", default: NORMAL_PRIORITY, least: 0, most: |_| 100 };

/// Every part that holds a number.
const NUMBERS: [Number; 6] = [TIMEOUT, MEMORY, CPUS, DISK, KEEP, PRIORITY];

impl Number {
    fn range(&self, limits: &Limits) -> RangeInclusive<u32> {
        self.least..=(self.most)(limits)
    }

    /// A host that allows less than the default gives what it allows.
    fn default_on(&self, limits: &Limits) -> u32 {
        self.default.clamp(self.least, (self.most)(limits))
    }
}

/// Every text part there is.
const NAMES: [&str; 20] = [
    "dockerfile",
    "target",
    "image_name",
    "cache_scope",
    "base_image_digest",
    "build_args",
    "tags",
    "secrets",
    "timeout_seconds",
    "memory_mb",
    "cpus",
    "disk_gb",
    "network_mode",
    "allowed_domains",
    "keep_failed_seconds",
    "priority",
    "builder_id",
    "global_cache_key",
    "is_admin_build",
    SOURCE,
];

/// The text parts that have come so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Fields(BTreeMap<&'static str, String>);

/// The name of a part, as a constant; what is none is refused.
pub(super) fn known(name: &str) -> Result<&'static str, ApiError> {
    NAMES.into_iter().find(|known| *known == name).ok_or_else(|| {
        let message = format!("there is no field {}; there are {}", shown(name), NAMES.join(", "));
        ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "unknown_field", message)
    })
}

/// A part that came before.
pub(super) fn duplicate(name: &str) -> ApiError {
    let message = format!("the field {name} is given twice");
    ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "duplicate_field", message)
}

impl Fields {
    /// Takes a part.
    pub(super) fn insert(&mut self, name: &'static str, text: String) -> Result<(), ApiError> {
        match self.0.insert(name, text) {
            None => Ok(()),
            Some(_) => Err(duplicate(name)),
        }
    }

    /// The request that the fields make, apart from the source.
    pub(super) fn request(&self, tenant: &Tenant, limits: &Limits) -> Result<Request, ApiError> {
        self.refuse_what_is_not_there_yet()?;
        let number = |field| self.number(field, limits);
        let (network, allowed_domains) = network::parse(self, limits.network_default)?;
        Ok(Request {
            dockerfile: self.dockerfile()?,
            target: self.target()?,
            image_name: self.image_name(tenant)?,
            build_args: self.build_args()?,
            tags: self.tags()?,
            base_image_digest: self.base_image_digest()?,
            secrets: secrets::parse(self.text("secrets"))?,
            network,
            allowed_domains,
            timeout_seconds: number(TIMEOUT)?,
            memory_mb: number(MEMORY)?,
            cpus: number(CPUS)?,
            disk_gb: number(DISK)?,
            keep_failed_seconds: number(KEEP)?,
            priority: number(PRIORITY)?,
            source_digest: String::new(),
            source_bytes: 0,
        })
    }

    /// A field's text; an empty one asks for nothing.
    fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|text| !text.is_empty())
    }

    fn base_image_digest(&self) -> Result<Option<String>, ApiError> {
        let name = "base_image_digest";
        let Some(text) = self.text(name) else { return Ok(None) };
        let hex = text.strip_prefix("sha256:").unwrap_or_default();
        let lower = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if hex.len() == 64 && hex.bytes().all(lower) {
            Ok(Some(text.to_owned()))
        } else {
            Err(ApiError::invalid(name, text, "sha256: and 64 lower-case hexadecimal digits"))
        }
    }

    fn refuse_what_is_not_there_yet(&self) -> Result<(), ApiError> {
        for name in ["cache_scope", "builder_id", "global_cache_key"] {
            if self.text(name).is_some() {
                return Err(ApiError::not_supported(name, "leave it out, or send it empty"));
            }
        }
        match self.text("is_admin_build") {
            None | Some("false") => {}
            Some("true") => {
                return Err(ApiError::not_supported(
                    "is_admin_build",
                    "leave it out, or send false",
                ));
            }
            Some(other) => {
                return Err(ApiError::invalid("is_admin_build", other, "empty or false"));
            }
        }
        Ok(())
    }

    /// A decimal number and nothing else: no sign, no space.
    #[expect(clippy::needless_pass_by_value, reason = "a constant each time")]
    fn number(&self, field: Number, limits: &Limits) -> Result<u32, ApiError> {
        let range = field.range(limits);
        let Some(text) = self.0.get(field.name) else { return Ok(field.default_on(limits)) };
        let plain = text.bytes().all(|b| b.is_ascii_digit());
        let number = text.parse().ok().filter(|n| plain && range.contains(n));
        let allowed = format!("a number from {} to {}", range.start(), range.end());
        number.ok_or_else(|| ApiError::invalid(field.name, text, &allowed))
    }

    fn dockerfile(&self) -> Result<Option<String>, ApiError> {
        let Some(text) = self.text("dockerfile") else { return Ok(None) };
        if text.len() > MAX_DOCKERFILE {
            let message = format!("dockerfile is longer than {MAX_DOCKERFILE} bytes");
            return Err(ApiError::too_large(message));
        }
        Ok(Some(text.to_owned()))
    }

    fn target(&self) -> Result<Option<String>, ApiError> {
        let Some(text) = self.text("target") else { return Ok(None) };
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
        if text.len() > MAX_TARGET || text.starts_with('-') || !text.bytes().all(plain) {
            let allowed = format!(
                "a stage's name or number: up to {MAX_TARGET} of letters, digits, '_', '.' and '-'"
            );
            return Err(ApiError::invalid("target", text, &allowed));
        }
        Ok(Some(text.to_owned()))
    }

    fn image_name(&self, tenant: &Tenant) -> Result<Option<ImageName>, ApiError> {
        let Some(text) = self.text("image_name") else { return Ok(None) };
        let (name, tag) = text.split_once(':').unwrap_or((text, "latest"));
        let fits = tenant.as_str().len() + 1 + name.len() <= MAX_REPOSITORY;
        if !fits || !name.split('/').all(is_path_component) || !is_image_tag(tag) {
            let allowed = "NAME or NAME:TAG below your tenant, by the grammar of the OCI distribution \
                           specification: NAME of lower-case letters and digits, separated by '.', \
                           '_', '__', '-' or '/'; TAG of up to 128 letters, digits, '_', '.' and '-'";
            return Err(ApiError::invalid("image_name", text, allowed));
        }
        Ok(Some(ImageName { name: name.to_owned(), tag: tag.to_owned() }))
    }

    fn build_args(&self) -> Result<BTreeMap<String, String>, ApiError> {
        let args = self.object("build_args")?;
        if args.len() > MAX_BUILD_ARGS {
            let message = format!("build_args has more than {MAX_BUILD_ARGS} arguments");
            return Err(ApiError::too_large(message));
        }
        let mut total = 0;
        for (name, value) in &args {
            let plain = |c: char| !c.is_control() && !c.is_whitespace() && c != '=';
            if name.is_empty() || name.chars().count() > MAX_ARG_NAME || !name.chars().all(plain) {
                let allowed = format!("1 to {MAX_ARG_NAME} characters without spaces and '='");
                return Err(ApiError::invalid("the name of a build argument", name, &allowed));
            }
            // The value is not repeated: people put passwords here, however often they are told.
            if value.len() > MAX_JOB_TEXT || value.contains('\0') {
                let message = format!(
                    "the value of build argument {name} must be at most {MAX_JOB_TEXT} bytes without NUL"
                );
                return Err(ApiError::new(
                    StatusCode::UNPROCESSABLE_ENTITY,
                    "invalid_field",
                    message,
                ));
            }
            total += name.len() + value.len();
        }
        if total > MAX_BUILD_ARGS_BYTES {
            let message = format!("build_args together are more than {MAX_BUILD_ARGS_BYTES} bytes");
            return Err(ApiError::too_large(message));
        }
        Ok(args)
    }

    fn tags(&self) -> Result<BTreeMap<String, String>, ApiError> {
        let tags = self.object("tags")?;
        tags::check_all(&tags)?;
        Ok(tags)
    }

    /// A JSON object whose values are strings. What it holds is not repeated in the refusal.
    fn object(&self, name: &str) -> Result<BTreeMap<String, String>, ApiError> {
        let Some(text) = self.text(name) else { return Ok(BTreeMap::new()) };
        serde_json::from_str(text).map_err(|error| {
            let message = format!(
                "{name} must be a JSON object of strings; it is not, at line {} column {}",
                error.line(),
                error.column()
            );
            ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, "invalid_field", message)
        })
    }
}

/// One component of a repository: `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`.
fn is_path_component(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    let ends_in_words =
        bytes.first().copied().is_some_and(word) && bytes.last().copied().is_some_and(word);
    let separated = text
        .split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        .all(|gap| matches!(gap, "" | "." | "_" | "__") || gap.bytes().all(|b| b == b'-'));
    ends_in_words && separated
}

/// `[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}`.
fn is_image_tag(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    (1..=MAX_IMAGE_TAG).contains(&text.len())
        && word(text.as_bytes()[0])
        && text.bytes().all(|b| word(b) || matches!(b, b'.' | b'-'))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
