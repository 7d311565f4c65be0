//! Tokens over the API: what `kiln token` does when it is not offline.

use kiln::store::Role;
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{refusal, server};

#[tokio::test]
async fn api_tokens_are_made_listed_and_revoked() {
    let server = server().await;
    let admin = server.client("dev", Role::Admin).await;
    let post = async |body: Value| {
        admin.request(Method::POST, "/tokens").json(&body).send().await.unwrap()
    };
    let response =
        post(json!({"tenant": "acme", "role": "tenant", "name": "ci", "ttl_seconds": 3600})).await;
    assert_eq!(response.status(), 201);
    let made: Value = response.json().await.unwrap();
    let token = made["token"].as_str().unwrap();
    assert!(token.starts_with("kiln_") && token.len() == 48, "{}", token.len());
    assert_eq!(
        (&made["tenant"], &made["role"], &made["name"]),
        (&json!("acme"), &json!("tenant"), &json!("ci"))
    );
    made["expires_at"].as_str().unwrap().parse::<jiff::Timestamp>().unwrap();

    let as_made = || server.anonymous().request(Method::GET, "/builds").bearer_auth(token).send();
    assert_eq!(as_made().await.unwrap().status(), 200);
    let all = admin.json("/tokens").await;
    assert_eq!(all.as_array().unwrap().len(), 2);
    assert!(!all.to_string().contains(token) && !all.to_string().contains("hash"));
    assert_eq!(all[1]["id"], made["id"]);

    let path = format!("/tokens/{}", made["id"].as_str().unwrap());
    assert_eq!(admin.delete(&path).await.status(), 204);
    refusal(as_made().await.unwrap(), 401, "unauthorized").await;
    assert_eq!(admin.json("/tokens").await[1]["revoked"], true);
    refusal(admin.delete("/tokens/nothing").await, 404, "not_found").await;

    for bad in [
        json!({"tenant": "Acme", "role": "tenant"}),
        json!({"tenant": "builds", "role": "tenant"}),
        json!({"tenant": "acme", "role": "root"}),
        json!({"tenant": "acme", "role": "tenant", "ttl_seconds": 0}),
        json!({"tenant": "acme", "role": "tenant", "name": ""}),
        json!({"tenant": "acme", "role": "tenant", "admin": true}),
        json!({"tenant": "acme"}),
    ] {
        refusal(post(bad).await, 422, "invalid_field").await;
    }
}

#[tokio::test]
async fn when_a_token_was_last_used_is_listed_with_what_became_of_it() {
    let server = server().await;
    let admin = server.client("dev", Role::Admin).await;
    let used = server.client("acme", Role::Reader).await;
    server.client("acme", Role::Reader).await;
    let before = jiff::Timestamp::now();
    let listed = admin.json("/tokens").await;
    // No request waits for its being stored.
    assert!(listed.as_array().unwrap().iter().all(|token| token.get("last_used_at").is_none()));
    used.get("/builds").await;
    refusal(used.get("/tokens").await, 403, "forbidden").await;
    server.uses.store(&*server.store).await.unwrap();
    let listed = admin.json("/tokens").await;
    let last = |n: usize| {
        listed[n]["last_used_at"].as_str().map(|at| at.parse::<jiff::Timestamp>().unwrap())
    };
    let (first, second) = (last(0).unwrap(), last(1).unwrap());
    assert!(first.as_millisecond() >= before.as_millisecond() && second >= first);
    assert_eq!(last(2), None);
    assert_eq!((&listed[1]["revoked"], &listed[1]["expired"]), (&json!(false), &json!(false)));

    let tenant = kiln::build::Tenant::new("acme").unwrap();
    let old = kiln::token::create(&*server.store, tenant, Role::Reader, Some(1), None, 0).await;
    let (old, record) = old.unwrap();
    let refused = server.anonymous().request(Method::GET, "/builds").bearer_auth(old);
    refusal(refused.send().await.unwrap(), 401, "unauthorized").await;
    server.uses.store(&*server.store).await.unwrap();
    let listed = admin.json("/tokens").await;
    let expired = listed.as_array().unwrap().iter().find(|t| t["id"] == record.id.as_str());
    // One that opens nothing is not used.
    let expired = expired.unwrap();
    assert!(expired["expired"] == true && expired.get("last_used_at").is_none(), "{expired}");
}
