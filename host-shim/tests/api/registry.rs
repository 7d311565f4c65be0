//! A registry that has a few images and speaks as much of the distribution API as a pull needs.

use std::collections::HashMap;
use std::sync::Arc;

use axum::Router;
use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use kiln::staging::Digest;
use serde_json::{Value, json};

const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";

#[derive(Default)]
struct Content(HashMap<String, (&'static str, Vec<u8>)>);

impl Content {
    fn blob(&mut self, name: &str, bytes: &[u8]) -> Value {
        let digest = Digest::of(bytes);
        let path = format!("/v2/{name}/blobs/{digest}");
        self.0.insert(path, ("application/octet-stream", bytes.to_vec()));
        json!({ "mediaType": "application/octet-stream", "digest": digest.to_string(), "size": bytes.len() })
    }

    /// Under its tag and its digest; gives the descriptor.
    fn manifest(&mut self, name: &str, tag: &str, kind: &'static str, manifest: &Value) -> Value {
        let bytes = manifest.to_string().into_bytes();
        let digest = Digest::of(&bytes);
        let size = bytes.len();
        for reference in [tag, &digest.to_string()] {
            self.0.insert(format!("/v2/{name}/manifests/{reference}"), (kind, bytes.clone()));
        }
        json!({ "mediaType": kind, "digest": digest.to_string(), "size": size })
    }

    fn image(&mut self, name: &str, tag: &str, architecture: &str, config: &Value) -> Value {
        self.image_of(name, tag, architecture, config, b"a layer")
    }

    fn image_of(
        &mut self,
        name: &str,
        tag: &str,
        architecture: &str,
        config: &Value,
        layer: &[u8],
    ) -> Value {
        let rootfs = json!({ "type": "layers", "diff_ids": [Digest::of(layer).to_string()] });
        let file = json!({
            "os": "linux", "architecture": architecture, "config": config, "rootfs": rootfs,
        });
        let mut config = self.blob(name, file.to_string().as_bytes());
        config["mediaType"] = json!("application/vnd.oci.image.config.v1+json");
        let mut layer = self.blob(name, layer);
        layer["mediaType"] = json!("application/vnd.oci.image.layer.v1.tar");
        let manifest = json!({
            "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer],
        });
        self.manifest(name, tag, MANIFEST, &manifest)
    }
}

pub async fn start() -> String {
    let mut content = Content::default();
    let app = json!({
        "User": "app", "Env": ["A=1"], "Entrypoint": ["/app"], "Cmd": ["serve"],
        "WorkingDir": "/srv", "StopSignal": "SIGINT",
    });
    for name in ["a/app", "b/app", "base/debian", "builds/b1"] {
        content.image(name, "latest", "amd64", &app);
    }
    // An archive without entries.
    content.image_of("a/real", "latest", "amd64", &app, &[0; 1024]);
    content.image("a/bare", "latest", "amd64", &Value::Null);
    content.image("a/arm", "latest", "arm64", &app);
    let mut listed = content.image("a/many", "x", "amd64", &app);
    listed["platform"] = json!({ "os": "linux", "architecture": "amd64" });
    let mut other = content.image("a/many", "y", "arm64", &app);
    other["platform"] = json!({ "os": "linux", "architecture": "arm64" });
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [other, listed] });
    content.manifest("a/many", "latest", INDEX, &index);

    let router = Router::new().fallback(answer).with_state(Arc::new(content));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
    url
}

async fn answer(State(content): State<Arc<Content>>, request: Request) -> Response {
    match content.0.get(request.uri().path()) {
        Some((kind, bytes)) => {
            let mut response = bytes.clone().into_response();
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
            response
        }
        None => StatusCode::NOT_FOUND.into_response(),
    }
}
