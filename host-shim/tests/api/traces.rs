//! OpenTelemetry: a real `kiln serve` and a collector that keeps what it is sent.

use std::sync::{Arc, Mutex};

use axum::Router;
use axum::extract::{Json, State};
use axum::http::HeaderMap;
use axum::routing::post;
use serde_json::Value;
use tokio::sync::mpsc;

type Sent = mpsc::UnboundedSender<(HeaderMap, Value)>;

async fn collect(State(sent): State<Arc<Mutex<Sent>>>, headers: HeaderMap, body: Json<Value>) {
    sent.lock().unwrap().send((headers, body.0)).unwrap();
}

#[tokio::test]
async fn a_collector_gets_a_build_s_trace_when_it_ends() {
    let (sent, mut received) = mpsc::unbounded_channel();
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    let collector =
        Router::new().route("/v1/traces", post(collect)).with_state(Arc::new(Mutex::new(sent)));
    tokio::spawn(async move { axum::serve(listener, collector).await.unwrap() });

    let (id, server) = tokio::task::spawn_blocking(move || {
        let bundle = tempfile::tempdir().unwrap();
        crate::bundle::whole(bundle.path());
        let environment = [
            ("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint.as_str()),
            ("OTEL_EXPORTER_OTLP_HEADERS", "api-key=a%20key"),
        ];
        let server = crate::real::Server::start_without_vms_in(bundle.path(), &environment, &[]);
        let id = server.submit(&[("Dockerfile", b"FROM scratch\n")], &[]);
        (id, server)
    })
    .await
    .unwrap();
    let (headers, request) = received.recv().await.unwrap();
    assert_eq!(headers["content-type"], "application/json");
    assert_eq!(headers["api-key"], "a key");
    let resource = &request["resourceSpans"][0];
    let service = &resource["resource"]["attributes"][0];
    assert_eq!(
        (&service["key"], &service["value"]["stringValue"]),
        (&"service.name".into(), &"kiln".into())
    );
    let spans = resource["scopeSpans"][0]["spans"].as_array().unwrap();
    let names: Vec<_> = spans.iter().map(|span| span["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["build", "request", "queued", "boot"]);
    let root = &spans[0];
    assert!(root.get("parentSpanId").is_none() && root["status"]["code"] == 2, "{root}");
    assert_eq!(root["status"]["message"], "internal");
    for span in spans {
        assert_eq!(span["traceId"], *id);
        assert_eq!(span["spanId"].as_str().unwrap().len(), 16);
        let time = |key: &str| span[key].as_str().unwrap().parse::<u64>().unwrap();
        assert!(time("startTimeUnixNano") <= time("endTimeUnixNano"), "{span}");
        assert!(span["name"] == "build" || span["parentSpanId"] == root["spanId"], "{span}");
    }
    tokio::task::spawn_blocking(|| server.stop()).await.unwrap();
}
