//! The body of POST `/instances` for the document, with the bounds that the fields are held to.

use std::collections::BTreeSet;

use kiln_protocol::name::REGISTRY;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{
    AdditionalProperties, ArrayBuilder, Object, ObjectBuilder, Schema, SchemaFormat, Type,
};
use utoipa::{PartialSchema, ToSchema};

use super::fields::{DEFAULT_MEMORY_MB, DEFAULT_VCPUS, LEAST_MEMORY_MB, MAX_NAME};
use crate::api::Limits;
use crate::api::fields::schema::{COMPONENT, image_tag};
use crate::api::openapi::schemas::{matching, number, or_null, text};

/// The fields of a request for an instance.
pub(in crate::api) struct NewInstance;

impl PartialSchema for NewInstance {
    fn schema() -> RefOr<Schema> {
        NewInstance::on(&Limits::default(), crate::api::openapi::HOST).into()
    }
}

impl ToSchema for NewInstance {}

impl NewInstance {
    /// As a host takes them. `public_host` is where clients reach its registry.
    pub(in crate::api) fn on(limits: &Limits, public_host: &str) -> Object {
        let name = matching(name()).schema_type(or_null(Type::String));
        let vcpus = number(1, limits.max_cpus.into())
            .schema_type(or_null(Type::Integer))
            .default(Some(DEFAULT_VCPUS.into()));
        let default_size = format!("{}MB", DEFAULT_MEMORY_MB.min(limits.max_memory_mb));
        let size = matching(SIZE)
            .schema_type(or_null(Type::String))
            .format(Some(SchemaFormat::Custom("size".into())))
            .default(Some(default_size.into()))
            .description(Some(format!(
                "Of its memory, by powers of 1024: from {LEAST_MEMORY_MB}MB to {}MB.",
                limits.max_memory_mb
            )));
        let image = matching(image(public_host)).description(Some(
            "REPOSITORY[:TAG][@DIGEST] of this server's registry, with its HOST:PORT/ or without. A repository without a slash is \
             the tenant's.",
        ));
        ObjectBuilder::new()
            .schema_type(Type::Object)
            .additional_properties(Some(AdditionalProperties::<Schema>::FreeForm(false)))
            .required("image")
            .property("image", image)
            .property("name", name.description(Some("The tenant's only one of that name.")))
            .property("cmd", words())
            .property("entrypoint", words())
            .property("env", variables())
            .property("vcpus", vcpus)
            .property("size", size)
            .build()
    }
}

/// As [`super::fields::memory`] has it, but for the range.
const SIZE: &str = r"^[0-9]+\s*(?:[bB]|[kKmMgGtT](?:[iI]?[bB])?)?\s*$";

/// As [`super::fields::parse_name`] has it.
fn name() -> String {
    format!("^[a-z0-9](?:[a-z0-9-]{{0,{}}}[a-z0-9])?$", MAX_NAME - 2)
}

/// As [`crate::instances::reference::Image::parse`] has it, but for lengths. What stands before the first slash is a host where it
/// has a dot.
fn image(public_host: &str) -> String {
    let plain = COMPONENT.replacen(r"\.|", "", 1);
    let names = [
        public_host.to_owned(),
        public_host.replace("localhost", "127.0.0.1"),
        public_host.replace("127.0.0.1", "localhost"),
        REGISTRY.to_owned(),
    ];
    let names: BTreeSet<_> = names.iter().map(|name| regex::escape(name)).collect();
    let own = names.into_iter().collect::<Vec<_>>().join("|");
    let tag = image_tag();
    format!(
        "^(?:(?:{own})/{COMPONENT}(?:/{COMPONENT})*|{plain}(?:/{COMPONENT})*|{COMPONENT})(?::{tag})?(?:@sha256:[0-9a-f]{{64}})?$"
    )
}

fn words() -> ArrayBuilder {
    ArrayBuilder::new().schema_type(or_null(Type::Array)).items(text())
}

fn variables() -> ObjectBuilder {
    ObjectBuilder::new()
        .schema_type(or_null(Type::Object))
        .property_names(Some(matching(r"^[^=\u0000]+$").build()))
        .additional_properties(Some(AdditionalProperties::RefOr(text().build().into())))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;
    use regex::Regex;

    use super::super::fields::{memory, parse_name};
    use super::*;
    use crate::build::Tenant;
    use crate::instances::reference::Image;

    proptest! {
        #[test]
        fn a_size_that_the_code_takes_is_of_the_form(text in "[0-9]{1,4}[ kKmMgGiIbB]{0,4}") {
            let matches = Regex::new(SIZE).unwrap().is_match(&text);
            prop_assert!(matches || memory(&text, u32::MAX).is_err());
        }

        #[test]
        fn patterns_say_what_the_code_takes(
            text in "[a0-]{0,3}|[a0-]{60,64}|((localhost|127.0.0.1):1/|registry.kiln/)?[a0._/:-]{0,9}(@sha256:[0-9a-f]{63,65})?"
        ) {
            let matches = |pattern: &str| Regex::new(pattern).unwrap().is_match(&text);
            prop_assert_eq!(matches(&name()), parse_name(text.clone()).is_ok());
            let host = "127.0.0.1:1";
            let image_is = Image::parse(&text, host, &Tenant::new("acme").unwrap()).is_ok();
            prop_assert_eq!(matches(&image(host)), image_is);
        }
    }
}
