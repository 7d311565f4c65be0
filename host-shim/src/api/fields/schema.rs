//! The parts of POST `/builds` for the document, with the bounds that the fields are held to.

use kiln_protocol::job::{MAX_BUILD_ARGS, MAX_DOCKERFILE, MAX_JOB_TEXT};
use kiln_protocol::secret::{MAX_SECRET_VALUE, MAX_SECRET_VARIABLE, MAX_SECRETS};
use serde_json::{Value, json};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{
    AdditionalProperties, ArrayBuilder, Object, ObjectBuilder, Schema, Type,
};
use utoipa::{PartialSchema, ToSchema};

use super::{MAX_ARG_NAME, MAX_IMAGE_TAG, MAX_TARGET, NUMBERS, SOURCE, network, tags};
use crate::api::openapi::schemas::{
    bytes, keyword, matching, number, or_null, secret_id, secret_pattern, sized, text, words,
};
use crate::api::{Limits, own_secrets};

/// One component of a repository, as [`super::is_path_component`] has it.
pub(in crate::api) const COMPONENT: &str = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*";

/// The parts of a build's request.
pub(in crate::api) struct NewBuild;

impl PartialSchema for NewBuild {
    fn schema() -> RefOr<Schema> {
        NewBuild::on(&Limits::default()).into()
    }
}

impl ToSchema for NewBuild {}

impl NewBuild {
    /// As a host takes them.
    pub(in crate::api) fn on(limits: &Limits) -> Object {
        let form = ObjectBuilder::new()
            .schema_type(Type::Object)
            .description(Some(
                "The parts may come in any order. A part `secret.ID` holds the value of the declared secret ID for this build alone.",
            ))
            .extensions(Some(keyword("patternProperties", own_secrets())))
            .additional_properties(Some(AdditionalProperties::<Schema>::FreeForm(false)))
            .required(SOURCE)
            .property(SOURCE, bytes().description(Some("A tar, tar.gz or tar.zst archive.")))
            .property(
                "dockerfile",
                // In bytes, which a schema cannot count.
                text().description(Some(format!(
                    "Its content, at most {MAX_DOCKERFILE} bytes. It wins over the archive's."
                ))),
            )
            .property("target", target().description(Some("The stage to build: its name or number.")))
            .property(
                "image_name",
                image_name().description(Some(
                    "NAME or NAME:TAG below the tenant, NAME with the tenant of at most 255 bytes. Without it the image is `builds/ID`.",
                )),
            )
            .property(
                "base_image_digest",
                matching("^(?:sha256:[0-9a-f]{64})?$")
                    .description(Some("What the base of the built stage has to be.")),
            )
            .property("build_args", build_args())
            .property("tags", tags::schema())
            .property("secrets", json_text(secrets()).description(Some("A JSON array, in one part.")))
            .property("network_mode", words(network::MODES))
            .property(
                "allowed_domains",
                json_text(network::schema()).description(Some(
                    "A JSON array, in one part: what steps may reach. With entries and without `network_mode`, that is `allowlist`; with `none` or `open` they are refused. A list without entries reaches nothing.",
                )),
            );
        let form = ["cache_scope", "builder_id", "global_cache_key"]
            .into_iter()
            .fold(form, |form, name| {
                form.property(name, sized(0, 0).description(Some("Not available yet.")))
            });
        let form = form.property("is_admin_build", words(["", "false"]));
        let form = NUMBERS.into_iter().fold(form, |form, field| {
            let range = field.range(limits);
            let schema = number((*range.start()).into(), (*range.end()).into());
            form.property(field.name, schema.default(Some(field.default_on(limits).into())))
        });
        form.build()
    }
}

/// The parts `secret.ID`.
fn own_secrets() -> Value {
    let pattern = secret_pattern(&regex::escape(own_secrets::PREFIX));
    json!({ pattern: bytes().max_length(Some(MAX_SECRET_VALUE)).build() })
}

/// A text that is JSON: what is an array otherwise is one part for each item (OpenAPI 3.1, 4.8.14.3).
fn json_text(schema: impl Into<RefOr<Schema>>) -> ObjectBuilder {
    text().content_media_type("application/json").content_schema(Some(schema))
}

/// As [`super::Fields::target`] has it.
fn target() -> ObjectBuilder {
    matching(format!("^(?:[A-Za-z0-9_.][A-Za-z0-9_.-]{{0,{}}})?$", MAX_TARGET - 1))
}

/// As [`super::Fields::image_name`] has it, but for the length of the repository.
fn image_name() -> ObjectBuilder {
    matching(format!("^(?:{COMPONENT}(?:/{COMPONENT})*(?::{})?)?$", image_tag()))
}

/// As [`super::is_image_tag`] has it.
pub(in crate::api) fn image_tag() -> String {
    format!("[A-Za-z0-9_][A-Za-z0-9_.-]{{0,{}}}", MAX_IMAGE_TAG - 1)
}

fn build_args() -> ObjectBuilder {
    let name = matching(format!(r"^[^\s=\u0000-\u001f\u007f-\u009f]{{1,{MAX_ARG_NAME}}}$"));
    let value = sized(0, MAX_JOB_TEXT).pattern(Some(r"^[^\u0000]*$")).build();
    ObjectBuilder::new()
        .schema_type(Type::Object)
        .property_names(Some(name.build()))
        .additional_properties(Some(AdditionalProperties::RefOr(value.into())))
        .max_properties(Some(MAX_BUILD_ARGS))
}

fn secrets() -> ArrayBuilder {
    let variable = matching(variable_pattern())
        .schema_type(or_null(Type::String))
        .description(Some("The variable that steps see it in; no two of the same."));
    let declared = ObjectBuilder::new()
        .schema_type(Type::Object)
        .property("id", secret_id().description(Some("No two of the same.")))
        .property("env_var", variable)
        .required("id")
        .additional_properties(Some(AdditionalProperties::<Schema>::FreeForm(false)));
    ArrayBuilder::new().items(declared).max_items(Some(MAX_SECRETS)).unique_items(true)
}

fn variable_pattern() -> String {
    format!("^(?:[A-Za-z_][A-Za-z0-9_]{{0,{}}})?$", MAX_SECRET_VARIABLE - 1)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use proptest::prelude::*;
    use regex::Regex;

    use super::super::Fields;
    use super::*;
    use crate::build::Tenant;

    fn matches(schema: ObjectBuilder, text: &str) -> bool {
        Regex::new(schema.build().pattern.as_deref().unwrap()).unwrap().is_match(text)
    }

    fn taken(name: &'static str, text: &str) -> bool {
        let mut fields = Fields::default();
        fields.insert(name, text.to_owned()).unwrap();
        fields.request(&Tenant::new("acme").unwrap(), &Limits::default()).is_ok()
    }

    proptest! {
        #[test]
        fn patterns_say_what_the_code_takes(text in "[aA0._/: \u{e9}-]{0,12}|[a.]{126,130}") {
            prop_assert_eq!(matches(target(), &text), taken("target", &text));
            prop_assert_eq!(matches(image_name(), &text), taken("image_name", &text));
        }

        #[test]
        fn so_do_those_of_names(name in "[aA0_= \u{e9}\u{7}-]{0,4}|[a0]{254,258}") {
            let args = serde_json::json!({ &name: "" }).to_string();
            let schema = build_args().build().property_names.unwrap();
            let Schema::Object(schema) = *schema else { panic!("a text") };
            let pattern = Regex::new(&schema.pattern.unwrap()).unwrap();
            prop_assert_eq!(pattern.is_match(&name), taken("build_args", &args));
            let secrets = serde_json::json!([{ "id": "a", "env_var": &name }]).to_string();
            let pattern = Regex::new(&variable_pattern()).unwrap();
            prop_assert_eq!(pattern.is_match(&name), taken("secrets", &secrets));
        }
    }

    #[test]
    fn numbers_are_those_of_the_host() {
        let form = NewBuild::on(&Limits { max_cpus: 1, ..Limits::default() });
        let RefOr::T(Schema::Object(cpus)) = &form.properties["cpus"] else { panic!("a number") };
        assert!(cpus.maximum == Some(1_usize.into()));
        assert_eq!(cpus.default, Some(1.into()));
    }
}
