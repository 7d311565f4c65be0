//! The texts that the API's JSON is made of: each with the bounds that the code holds it to.
//!
//! Types here stand for a `String` where a shape is derived: `#[schema(value_type = Time)]`.

use kiln_protocol::event::FailureKind as Kind;
use kiln_protocol::job::MAX_BUILD_ID;
use kiln_protocol::secret::MAX_SECRET_ID;
use serde_json::{Value, json};
use utoipa::openapi::extensions::Extensions;
use utoipa::openapi::schema::{KnownFormat, ObjectBuilder, Schema, SchemaFormat, SchemaType, Type};
use utoipa::openapi::{Object, RefOr};
use utoipa::{PartialSchema, ToSchema};

use crate::build::{MAX_TENANT, RESERVED_TENANTS};
use crate::exec::How;
use crate::instances::State as Lifecycle;
use crate::store::Role;
use crate::token;

/// Nothing, or a text that is none of the others: no control characters (Unicode's Cc).
pub(crate) const PLAIN: &str = r"^[^\u0000-\u001f\u007f-\u009f]*$";
/// Of SHA-256, as OCI writes it.
pub(crate) const DIGEST: &str = "^sha256:[0-9a-f]{64}$";

/// A text.
pub(crate) fn text() -> ObjectBuilder {
    ObjectBuilder::new().schema_type(Type::String)
}

/// A text that matches, from the first character to the last.
pub(crate) fn matching(pattern: impl Into<String>) -> ObjectBuilder {
    text().pattern(Some(pattern))
}

/// A keyword of JSON Schema that the builders do not have.
pub(crate) fn keyword(name: &str, value: Value) -> Extensions {
    [(name, value)].into_iter().collect()
}

/// A text of so many characters.
pub(crate) fn sized(least: usize, most: usize) -> ObjectBuilder {
    text().min_length((least > 0).then_some(least)).max_length(Some(most))
}

/// One of some words.
pub(crate) fn words(words: impl IntoIterator<Item = &'static str>) -> ObjectBuilder {
    text().enum_values(Some(words))
}

/// A whole number.
pub(crate) fn number(least: u64, most: u64) -> ObjectBuilder {
    let bound = |n| usize::try_from(n).unwrap_or(usize::MAX);
    ObjectBuilder::new()
        .schema_type(Type::Integer)
        .minimum(Some(bound(least)))
        .maximum(Some(bound(most)))
}

/// `true` or `false`.
pub(crate) fn flag() -> ObjectBuilder {
    ObjectBuilder::new().schema_type(Type::Boolean)
}

/// The same, or `null`, which is as good as none.
pub(crate) fn or_null(kind: Type) -> SchemaType {
    SchemaType::from_iter([kind, Type::Null])
}

/// Any bytes.
pub(crate) fn bytes() -> ObjectBuilder {
    text().format(Some(SchemaFormat::KnownFormat(KnownFormat::Binary)))
}

/// The grammar of a build's id.
pub(crate) fn id() -> ObjectBuilder {
    matching(format!("^[a-z0-9-]{{1,{MAX_BUILD_ID}}}$"))
}

/// The grammar of a secret's id, with what stands before it.
pub(crate) fn secret_pattern(prefix: &str) -> String {
    format!("^{prefix}[A-Za-z0-9_-][A-Za-z0-9._-]{{0,{}}}$", MAX_SECRET_ID - 1)
}

/// A secret's id.
pub(crate) fn secret_id() -> ObjectBuilder {
    matching(secret_pattern(""))
}

fn tenant() -> ObjectBuilder {
    matching(format!("^[a-z0-9][a-z0-9-]{{0,{}}}$", MAX_TENANT - 1))
}

fn token_name() -> ObjectBuilder {
    sized(1, token::MAX_NAME).pattern(Some(PLAIN))
}

macro_rules! named {
    ($($(#[$doc:meta])* $name:ident = $schema:expr;)*) => {$(
        $(#[$doc])*
        pub(crate) struct $name;

        impl PartialSchema for $name {
            fn schema() -> RefOr<Schema> {
                let schema: Object = $schema.build();
                schema.into()
            }
        }

        impl ToSchema for $name {}
    )*};
}

named! {
    /// A time.
    Time = text()
        .format(Some(SchemaFormat::KnownFormat(KnownFormat::DateTime)))
        .description(Some("RFC 3339, in UTC, with milliseconds."));
    /// A digest.
    Digest = matching(DIGEST);
    /// Of builds, instances and sessions.
    Id = id();
    /// Of a secret.
    SecretId = secret_id();
    /// Of a tenant.
    TenantName = tenant().extensions(Some(keyword("not", json!({ "enum": RESERVED_TENANTS }))));
    /// Of a token.
    RoleName = words(Role::ALL.map(Role::as_str));
    /// Of an instance.
    InstanceState = words(Lifecycle::ALL.map(Lifecycle::as_str));
    /// Of a session.
    SessionEnd = words(How::ALL.map(How::as_str));
    /// Of a failed build.
    FailureKind = words(Kind::ALL.map(Kind::as_str));
    /// Of a new token.
    TtlSeconds = number(1, token::MAX_TTL_SECONDS)
        .schema_type(or_null(Type::Integer))
        .description(Some("How long it lives; for ever where it is absent."));
    /// Of a new token.
    TokenName = token_name()
        .schema_type(or_null(Type::String))
        .description(Some("A name for people."));
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use kiln_protocol::job::BuildId;
    use proptest::prelude::*;
    use regex::Regex;

    use super::*;
    use crate::build::Tenant;

    fn matches(schema: ObjectBuilder, text: &str) -> bool {
        Regex::new(schema.build().pattern.as_deref().unwrap()).unwrap().is_match(text)
    }

    proptest! {
        #[test]
        fn patterns_say_what_the_code_takes(text in "[a-zA-Z0-9._ \u{e9}\n-]{0,130}") {
            prop_assert_eq!(matches(id(), &text), BuildId::new(&*text).is_ok());
            prop_assert_eq!(matches(tenant(), &text), Tenant::new(&*text).is_ok());
            let secret = kiln_protocol::secret::SecretId::new(&*text);
            prop_assert_eq!(matches(secret_id(), &text), secret.is_ok());
        }
    }

    #[test]
    fn lengths_are_those_of_the_code() {
        for (n, fits) in [(MAX_BUILD_ID, true), (MAX_BUILD_ID + 1, false)] {
            assert_eq!(BuildId::new("a".repeat(n)).is_ok(), fits);
            assert_eq!(matches(id(), &"a".repeat(n)), fits);
        }
        for (n, fits) in [(MAX_TENANT, true), (MAX_TENANT + 1, false)] {
            assert_eq!(Tenant::new("a".repeat(n)).is_ok(), fits);
            assert_eq!(matches(tenant(), &"a".repeat(n)), fits);
        }
    }
}
