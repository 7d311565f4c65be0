//! Traces on their way to a collector: OTLP/HTTP with JSON (OpenTelemetry Protocol 1.x, "JSON Protobuf Encoding"), set by the
//! environment variables that OpenTelemetry has for it.

use std::time::Duration;

use reqwest::header::{HeaderMap, HeaderName, HeaderValue};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use url::Url;

use super::{Span, Trace};
use crate::causes::chain;

/// A collector answers within this, or the trace is lost.
const DEADLINE: Duration = Duration::from_secs(10);

/// Variables that cannot be.
#[derive(Debug, thiserror::Error)]
#[error("{variable} is {value:?}; it must be {allowed}")]
pub struct BadVariable {
    variable: &'static str,
    value: String,
    allowed: &'static str,
}

/// Sends traces, one at a time.
pub struct Sender {
    http: reqwest::Client,
    url: Url,
    headers: HeaderMap,
    service: String,
}

impl Sender {
    /// As the environment says; `None` where it does not say whereto, or that there are to be none. Pure but for setting up HTTP.
    pub fn configured(
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Self>, BadVariable> {
        let set = |name: &str| variable(name).filter(|value| !value.is_empty());
        if set("OTEL_SDK_DISABLED").is_some_and(|value| value.eq_ignore_ascii_case("true")) {
            return Ok(None);
        }
        let (name, whole) = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT");
        let url = match (set(name), set(whole)) {
            (Some(value), _) => endpoint(name, &value, "")?,
            (None, Some(value)) => endpoint(whole, &value, "v1/traces")?,
            (None, None) => return Ok(None),
        };
        let protocol = "OTEL_EXPORTER_OTLP_PROTOCOL";
        if let Some(value) = set(protocol).filter(|value| !value.starts_with("http/")) {
            let allowed = "http/json or http/protobuf, which collectors take at the same place";
            return Err(BadVariable { variable: protocol, value, allowed });
        }
        let headers = headers(&set("OTEL_EXPORTER_OTLP_HEADERS").unwrap_or_default())?;
        let service = set("OTEL_SERVICE_NAME").unwrap_or_else(|| "kiln".to_owned());
        let mut http = reqwest::Client::builder().timeout(DEADLINE);
        if matches!(url.host_str(), Some("localhost" | "127.0.0.1" | "[::1]")) {
            http = http.no_proxy();
        }
        let http = http.build().unwrap_or_default();
        Ok(Some(Self { http, url, headers, service }))
    }

    /// Sends until there is nobody left who could end a build.
    pub async fn run(self, mut traces: mpsc::Receiver<Trace>) {
        while let Some(trace) = traces.recv().await {
            if let Err(why) = self.send(&trace).await {
                tracing::warn!(trace = trace.id, why, "a trace could not be sent and is lost");
            }
        }
    }

    async fn send(&self, trace: &Trace) -> Result<(), String> {
        let request = self.http.post(self.url.clone()).headers(self.headers.clone());
        let answer = request.json(&encoded(trace, &self.service)).send().await;
        // Without the URL, which may hold what only the collector is to know.
        let answer = answer.map_err(|error| chain(&error.without_url()))?;
        let status = answer.status();
        if status.is_success() { Ok(()) } else { Err(format!("the collector answers {status}")) }
    }
}

fn endpoint(variable: &'static str, value: &str, path: &str) -> Result<Url, BadVariable> {
    let refused = || {
        let value = value.to_owned();
        BadVariable { variable, value, allowed: "http(s)://HOST[:PORT][/PATH]" }
    };
    let mut url = Url::parse(value).map_err(|_| refused())?;
    if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
        return Err(refused());
    }
    if !path.is_empty() {
        let joined = format!("{}/{path}", url.path().trim_end_matches('/'));
        url.set_path(&joined);
    }
    Ok(url)
}

/// `KEY=VALUE,…`, values percent-encoded.
fn headers(text: &str) -> Result<HeaderMap, BadVariable> {
    let mut headers = HeaderMap::new();
    for pair in text.split(',').map(str::trim).filter(|pair| !pair.is_empty()) {
        let header = pair.split_once('=').and_then(|(name, value)| {
            // Of a pair `v=…` the form's decoding is that of percent signs, once a plus is one.
            let value = format!("v={}", value.trim().replace('+', "%2B"));
            let (_, value) = url::form_urlencoded::parse(value.as_bytes()).next()?;
            let mut value = HeaderValue::from_str(&value).ok()?;
            value.set_sensitive(true);
            Some((HeaderName::from_bytes(name.trim().as_bytes()).ok()?, value))
        });
        let Some((name, value)) = header else {
            return Err(BadVariable {
                variable: "OTEL_EXPORTER_OTLP_HEADERS",
                // It may hold a key.
                value: "something else".to_owned(),
                allowed: "NAME=VALUE,NAME=VALUE",
            });
        };
        headers.insert(name, value);
    }
    Ok(headers)
}

/// An `ExportTraceServiceRequest`.
fn encoded(trace: &Trace, service: &str) -> Value {
    let spans: Vec<Value> = trace.spans.iter().map(|span| encoded_span(&trace.id, span)).collect();
    let version = env!("CARGO_PKG_VERSION");
    let resource = json!({"attributes": [
        attribute("service.name", &service.into()),
        attribute("service.version", &version.into()),
    ]});
    let scope = json!({"name": "kiln", "version": version});
    json!({"resourceSpans": [{"resource": resource, "scopeSpans": [{"scope": scope, "spans": spans}]}]})
}

fn encoded_span(trace: &str, span: &Span) -> Value {
    /// A request that is answered.
    const SERVER: u8 = 2;
    const INTERNAL: u8 = 1;
    const ERROR: u8 = 2;
    let nanos = |at: i64| format!("{at}000000");
    let attributes = span.attributes.iter().map(|(key, value)| attribute(key, value));
    let mut encoded = json!({
        "traceId": trace,
        "spanId": span.id,
        "name": span.name,
        "kind": if span.name == "request" { SERVER } else { INTERNAL },
        "startTimeUnixNano": nanos(span.from),
        // Clocks go back.
        "endTimeUnixNano": nanos(span.to.max(span.from)),
        "attributes": attributes.collect::<Vec<_>>(),
    });
    if let Some(parent) = &span.parent {
        encoded["parentSpanId"] = parent.as_str().into();
    }
    if let Some(error) = &span.error {
        encoded["status"] = json!({"code": ERROR, "message": error});
    }
    encoded
}

fn attribute(key: &str, value: &Value) -> Value {
    let value = match value {
        // 64 bits are texts in protobuf's JSON.
        Value::Number(number) => json!({"intValue": number.to_string()}),
        Value::String(text) => json!({"stringValue": text}),
        other => json!({"stringValue": other.to_string()}),
    };
    json!({"key": key, "value": value})
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn configured(variables: &[(&str, &str)]) -> Result<Option<Sender>, String> {
        let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
        let find = |name: &str| {
            let found = variables.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        Sender::configured(find).map_err(|error| error.to_string())
    }

    #[test]
    fn the_environment_says_whereto_and_nothing_is_sent_without() {
        let url = |variables: &[_]| configured(variables).unwrap().map(|s| s.url.to_string());
        let endpoint = "OTEL_EXPORTER_OTLP_ENDPOINT";
        assert_eq!(url(&[]), None);
        assert_eq!(url(&[(endpoint, "")]), None);
        assert_eq!(url(&[(endpoint, "http://c:4318")]).unwrap(), "http://c:4318/v1/traces");
        assert_eq!(url(&[(endpoint, "https://c/otlp/")]).unwrap(), "https://c/otlp/v1/traces");
        let own = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://c/mine");
        assert_eq!(url(&[(endpoint, "http://c"), own]).unwrap(), "http://c/mine");
        assert_eq!(url(&[(endpoint, "http://c"), ("OTEL_SDK_DISABLED", "TRUE")]), None);
        let protocol = "OTEL_EXPORTER_OTLP_PROTOCOL";
        assert!(url(&[(endpoint, "http://c"), (protocol, "http/protobuf")]).is_some());
        for (name, value) in [(endpoint, "c:4318"), (protocol, "grpc")] {
            let error = configured(&[(endpoint, "http://c"), (name, value)][1..])
                .and_then(|_| configured(&[(name, value), (endpoint, "http://c")]));
            let error = error.err().unwrap();
            assert!(error.starts_with(&format!("{name} is {value:?}")), "{error}");
        }
    }

    #[test]
    fn headers_are_pairs_with_percent_signs() {
        let all = headers("api-key=a%20b+c, x-tenant = t ,").unwrap();
        assert_eq!(
            (&all["api-key"], &all["x-tenant"]),
            (&"a b+c".parse().unwrap(), &"t".parse().unwrap())
        );
        assert!(all["api-key"].is_sensitive());
        for bad in ["no pair", "a b=c", "k=%0A"] {
            let error = headers(bad).unwrap_err().to_string();
            assert!(!error.contains(bad), "{error}");
        }
    }
}
