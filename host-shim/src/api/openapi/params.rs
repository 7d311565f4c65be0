//! Parameters in the document. The type that reads a parameter describes it: see [`params!`].

use utoipa::openapi::Required;
use utoipa::openapi::path::{Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::schema::ObjectBuilder;

/// One of the path.
pub(crate) fn path(name: &str, description: &str, schema: ObjectBuilder) -> Parameter {
    parameter(ParameterIn::Path, name, description, schema).build()
}

/// One of the query that may be left out.
pub(crate) fn query(name: &str, description: &str, schema: ObjectBuilder) -> Parameter {
    parameter(ParameterIn::Query, name, description, schema).build()
}

/// A header that may be left out.
pub(crate) fn header(name: &str, description: &str, schema: ObjectBuilder) -> Parameter {
    parameter(ParameterIn::Header, name, description, schema).build()
}

/// One that has more to say.
pub(crate) fn parameter(
    place: ParameterIn,
    name: &str,
    description: &str,
    schema: ObjectBuilder,
) -> ParameterBuilder {
    ParameterBuilder::new()
        .name(name)
        .parameter_in(place)
        // Those of a path are all the same.
        .required(Required::False)
        .description(Some(description))
        .schema(Some(schema))
}

/// `params!(Type: parameter, …)`: what a type reads of a request.
macro_rules! params {
    ($type:ty: $($parameter:expr),+ $(,)?) => {
        impl utoipa::IntoParams for $type {
            fn into_params(
                _: impl Fn() -> Option<utoipa::openapi::path::ParameterIn>,
            ) -> Vec<utoipa::openapi::path::Parameter> {
                vec![$($parameter),+]
            }
        }
    };
}

pub(crate) use params;
