//! The field `tags`: the user's labels of a build. Pure.

use std::collections::BTreeMap;

use utoipa::openapi::schema::{AdditionalProperties, ObjectBuilder, Type};

use crate::api::error::{ApiError, shown};
use crate::api::openapi::schemas;

/// Most tags of a build.
pub(in crate::api) const MAX_TAGS: usize = 64;
/// Longest key of a tag, in characters.
pub(super) const MAX_KEY: usize = 128;
/// Longest value of a tag, in characters.
pub(super) const MAX_VALUE: usize = 512;

/// Refuses what cannot be a build's tags.
pub(super) fn check_all(tags: &BTreeMap<String, String>) -> Result<(), ApiError> {
    if tags.len() > MAX_TAGS {
        return Err(ApiError::too_large(format!("tags has more than {MAX_TAGS} tags")));
    }
    tags.iter().try_for_each(|(key, value)| check(key, value))
}

/// Refuses what cannot be a tag.
pub(in crate::api) fn check(key: &str, value: &str) -> Result<(), ApiError> {
    let fits = |text: &str, most| text.chars().count() <= most && !text.contains(char::is_control);
    if key.is_empty() || !fits(key, MAX_KEY) {
        let allowed = format!("1 to {MAX_KEY} characters, none of them a control character");
        return Err(ApiError::invalid("the key of a tag", key, &allowed));
    }
    if !fits(value, MAX_VALUE) {
        let allowed = format!("at most {MAX_VALUE} characters, none of them a control character");
        return Err(ApiError::invalid(&format!("the tag {}", shown(key)), value, &allowed));
    }
    Ok(())
}

/// The same, for the document.
pub(in crate::api) fn schema() -> ObjectBuilder {
    let key = schemas::sized(1, MAX_KEY).pattern(Some(schemas::PLAIN)).build();
    let value = schemas::sized(0, MAX_VALUE).pattern(Some(schemas::PLAIN)).build();
    ObjectBuilder::new()
        .schema_type(Type::Object)
        .property_names(Some(key))
        .additional_properties(Some(AdditionalProperties::RefOr(value.into())))
        .max_properties(Some(MAX_TAGS))
}
