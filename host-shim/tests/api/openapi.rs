//! The document that the API has of itself.

use std::collections::BTreeSet;
use std::path::Path;

use kiln::store::Role;
use reqwest::Method;
use serde_json::Value;

use crate::support::server;

const METHODS: [&str; 5] = ["get", "put", "post", "delete", "patch"];

fn document() -> Value {
    serde_json::from_str(&kiln::api::document()).unwrap()
}

/// Every operation with its path and method.
fn operations(document: &Value) -> Vec<(&str, &str, &Value)> {
    let paths = document["paths"].as_object().unwrap();
    paths
        .iter()
        .flat_map(|(path, item)| {
            item.as_object()
                .unwrap()
                .iter()
                .map(move |(method, op)| (path.as_str(), method.as_str(), op))
        })
        .collect()
}

/// `KILN_WRITE_GOLDEN=1` writes the file.
#[test]
fn the_checked_in_document_is_that_of_the_code() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/openapi.json");
    let made = kiln::api::document();
    if std::env::var_os("KILN_WRITE_GOLDEN").is_some_and(|v| v == "1") {
        std::fs::write(&path, &made).unwrap();
    }
    let checked_in = std::fs::read_to_string(&path).unwrap();
    assert!(
        made == checked_in,
        "docs/openapi.json is not what the code says: KILN_WRITE_GOLDEN=1 writes it; read the difference before you commit it"
    );
}

#[tokio::test]
async fn a_server_tells_its_own() {
    let server = server().await;
    let response = server.anonymous().get("/openapi.json").await;
    assert_eq!(response.headers()["content-type"], "application/json");
    let told: Value = response.json().await.unwrap();
    assert_eq!(told["openapi"], "3.1.0");
    let cpus = &told["components"]["schemas"]["NewBuild"]["properties"]["cpus"];
    assert_eq!(cpus["maximum"], 64);
    let image = &told["components"]["schemas"]["NewInstance"]["properties"]["image"];
    assert!(image["pattern"].as_str().unwrap().contains(r"kiln\.example:4973|"));
    assert_eq!(told["paths"], document()["paths"]);
}

/// What is in the document is there, and what is not is refused: the answer to any other method lists those of the document.
#[tokio::test]
async fn routes_and_document_are_the_same() {
    let server = server().await;
    let client = server.client("acme", Role::Admin).await;
    let document = document();
    for (path, item) in document["paths"].as_object().unwrap() {
        let item = item.as_object().unwrap();
        let path = path.replace("{id}", "nothing");
        let request = |method: &str| {
            let method: Method = method.to_uppercase().parse().unwrap();
            client.request(method, &path).send()
        };
        for method in METHODS {
            let response = request(method).await.unwrap();
            if let Some(operation) = item.get(method) {
                assert_ne!(response.status(), 405, "{method} {path}");
                let method: Method = method.to_uppercase().parse().unwrap();
                let unknown = server.anonymous().request(method, &path).send().await.unwrap();
                let open = operation["security"][0] == serde_json::json!({});
                assert_eq!(unknown.status() == 401, !open, "{path}");
                continue;
            }
            assert_eq!(response.status(), 405, "{method} {path}");
            let allowed = response.headers()["allow"].to_str().unwrap().to_lowercase();
            let allowed: BTreeSet<&str> = allowed.split(',').filter(|m| *m != "head").collect();
            assert_eq!(allowed, item.keys().map(String::as_str).collect(), "{path}");
        }
    }
}

#[test]
fn every_operation_says_all_that_clients_need() {
    let document = document();
    let mut ids = BTreeSet::new();
    for (path, method, operation) in operations(&document) {
        let id = operation["operationId"].as_str().unwrap();
        assert!(ids.insert(id.to_owned()), "{id} is there twice");
        assert!(!operation["summary"].as_str().unwrap().is_empty(), "{method} {path}");
        let responses = operation["responses"].as_object().unwrap();
        assert!(responses.keys().any(|status| status < &"300".to_owned()), "{id}");
        let open = operation["security"].as_array().unwrap().contains(&serde_json::json!({}));
        for status in ["401", "429", "500"] {
            assert_eq!(responses.contains_key(status), !open, "{id} {status}");
        }
    }
    for (name, response) in document["components"]["responses"].as_object().unwrap() {
        let schema = &response["content"]["application/problem+json"]["schema"]["$ref"];
        assert_eq!(schema, "#/components/schemas/Problem", "{name}");
    }
}
