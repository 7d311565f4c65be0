//! Failed builds that stay, over the API: whose they are, for how long, and who may let them go. What stays here is no
//! VM.

use std::io;
use std::time::Duration;

use async_trait::async_trait;
use kiln::build::{BuildId, Tenant};
use kiln::exec::Dial;
use kiln::kept::{Guest, MAX_STAY_SECONDS, Machine};
use kiln::store::Role;
use kiln::vmm::VmmError;
use reqwest::{Method, Response, StatusCode};
use serde_json::{Value, json};

use crate::agent::{NONCE, Vm};
use crate::support::{Client, Server, form, id_of, refusal, server};

/// Longest time that can be asked for at once.
const DAY: u32 = 24 * 60 * 60;

/// It is entered as a VM is, and needs nothing to be stopped or to go.
struct Parked(Vm);

#[async_trait]
impl Machine for Parked {
    fn dial(&self) -> io::Result<Box<dyn Dial>> {
        Ok(Box::new(self.0.line()))
    }

    fn qemu(&self) -> Option<i32> {
        None
    }

    fn pause(&self) -> Result<(), VmmError> {
        Ok(())
    }

    fn resume(&self) -> Result<(), VmmError> {
        Ok(())
    }

    async fn over(&self) -> String {
        std::future::pending().await
    }

    async fn remove(self) {}
}

/// A build of the client's that has failed.
async fn failed(server: &Server, client: &Client<'_>) -> BuildId {
    let build = client.submit(form()).await;
    let claimed = server.scheduler.claim().await;
    server.scheduler.fail(&claimed).await;
    id_of(&build)
}

/// One that is kept besides.
async fn kept(server: &Server, client: &Client<'_>, tenant: &str) -> BuildId {
    let id = failed(server, client).await;
    let guest = Guest {
        id: id.clone(),
        tenant: Tenant::new(tenant).unwrap(),
        memory_mb: 512,
        seconds: 600,
        nonce: NONCE,
        with_it: Box::new(()),
    };
    server.kept.keep(Parked(Vm::new()), guest).await;
    id
}

async fn extend(client: &Client<'_>, id: &BuildId, body: &Value) -> Response {
    let request = client.request(Method::PUT, &format!("/kept/{id}"));
    request.json(body).send().await.unwrap()
}

async fn release(client: &Client<'_>, id: &BuildId) -> Response {
    client.delete(&format!("/kept/{id}")).await
}

fn ids(leases: &Value) -> Vec<&str> {
    leases.as_array().unwrap().iter().map(|lease| lease["id"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn a_tenant_sees_its_own_and_an_admin_all() {
    let server = server().await;
    let a = server.client("a", Role::Tenant).await;
    let b = server.client("b", Role::Tenant).await;
    let admin = server.client("ops", Role::Admin).await;
    let (of_a, of_b) = (kept(&server, &a, "a").await, kept(&server, &b, "b").await);
    assert_eq!(ids(&a.json("/kept").await), [of_a.as_str()]);
    assert_eq!(ids(&b.json("/kept").await), [of_b.as_str()]);
    let all = admin.json("/kept").await;
    assert_eq!(ids(&all), [of_a.as_str(), of_b.as_str()]);
    assert_eq!((&all[1]["tenant"], &all[1]["memory_mb"]), (&json!("b"), &json!(512)));
    assert_eq!(all[1]["sessions"], 0);
    let shown = b.json(&format!("/builds/{of_b}")).await;
    assert_eq!(shown["kept_until"], all[1]["until"]);

    // Another tenant's is as one that never was.
    let nobodys = BuildId::new("0198b1c2-0000-7000-8000-000000000000").unwrap();
    for id in [&of_b, &nobodys] {
        refusal(extend(&a, id, &json!({ "seconds": 60 })).await, 404, "not_found").await;
        refusal(release(&a, id).await, 404, "not_found").await;
    }
    refusal(a.get(&format!("/builds/{of_b}/exec")).await, 404, "not_found").await;
    assert_eq!(ids(&b.json("/kept").await), [of_b.as_str()]);

    assert_eq!(release(&a, &of_a).await.status(), StatusCode::NO_CONTENT);
    assert_eq!(a.json("/kept").await, json!([]));
    assert_eq!(extend(&admin, &of_b, &json!({ "seconds": 60 })).await.status(), StatusCode::OK);
    assert_eq!(release(&admin, &of_b).await.status(), StatusCode::NO_CONTENT);
    assert_eq!(admin.json("/kept").await, json!([]));
}

#[tokio::test]
async fn a_reader_has_nothing_to_do_with_them() {
    let server = server().await;
    let a = server.client("a", Role::Tenant).await;
    let reader = server.client("a", Role::Reader).await;
    let id = kept(&server, &a, "a").await;
    refusal(reader.get("/kept").await, 403, "forbidden").await;
    refusal(extend(&reader, &id, &json!({ "seconds": 60 })).await, 403, "forbidden").await;
    refusal(release(&reader, &id).await, 403, "forbidden").await;
    refusal(reader.get(&format!("/builds/{id}/exec")).await, 403, "forbidden").await;
    assert_eq!(ids(&a.json("/kept").await), [id.as_str()]);
    let anonymous = server.anonymous();
    assert_eq!(anonymous.get("/kept").await.status(), StatusCode::UNAUTHORIZED);
    assert_eq!(release(&anonymous, &id).await.status(), StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn what_is_not_kept_or_no_more_says_so() {
    let server = server().await;
    let a = server.client("a", Role::Tenant).await;
    let (never, gone) = (failed(&server, &a).await, kept(&server, &a, "a").await);
    // Until its release it can be entered.
    refusal(a.get(&format!("/builds/{gone}/exec")).await, 426, "upgrade_required").await;
    assert_eq!(release(&a, &gone).await.status(), StatusCode::NO_CONTENT);
    for id in [&never, &gone] {
        refusal(extend(&a, id, &json!({ "seconds": 60 })).await, 409, "not_kept").await;
        refusal(release(&a, id).await, 409, "not_kept").await;
        refusal(a.get(&format!("/builds/{id}/exec")).await, 409, "finished").await;
        assert_eq!(a.json(&format!("/builds/{id}")).await.get("kept_until"), None);
    }
}

#[tokio::test]
async fn seconds_have_bounds() {
    let server = server().await;
    let a = server.client("a", Role::Tenant).await;
    let id = kept(&server, &a, "a").await;
    let before = a.json("/kept").await;
    for seconds in [json!(0), json!(DAY + 1), json!(u64::MAX)] {
        refusal(extend(&a, &id, &json!({ "seconds": seconds })).await, 422, "invalid_field").await;
    }
    for body in [
        json!({}),
        json!([]),
        json!({ "seconds": -1 }),
        json!({ "seconds": 1.5 }),
        json!({ "seconds": "60" }),
        json!({ "seconds": null }),
        json!({ "seconds": 60, "minutes": 1 }),
    ] {
        refusal(extend(&a, &id, &body).await, 400, "invalid_body").await;
    }
    assert_eq!(a.json("/kept").await, before, "what was refused changed nothing");
    // At the bounds, the upper one first: the lower one is soon over.
    for seconds in [DAY, 1] {
        let response = extend(&a, &id, &json!({ "seconds": seconds })).await;
        assert_eq!(response.status(), StatusCode::OK);
        let lease: Value = response.json().await.unwrap();
        assert!(until(&lease) - since(&lease) >= f64::from(seconds));
    }
    // Then it goes.
    while a.json("/kept").await != json!([]) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn two_days_are_all() {
    let server = server().await;
    let a = server.client("a", Role::Tenant).await;
    let id = failed(&server, &a).await;
    // The API gives a day at most. One that has been here for long, and has not used all of it, is as this one.
    let guest = Guest {
        id: id.clone(),
        tenant: Tenant::new("a").unwrap(),
        memory_mb: 512,
        seconds: 600,
        nonce: NONCE,
        with_it: Box::new(()),
    };
    server.kept.keep(Parked(Vm::new()), guest).await;
    let lease = server.kept.extend(&id, 3 * DAY).unwrap();
    assert_eq!(lease.until - lease.since, i64::from(MAX_STAY_SECONDS) * 1000);
    assert_eq!(MAX_STAY_SECONDS, 2 * DAY);
    let lease = server.kept.extend(&id, MAX_STAY_SECONDS - 60).unwrap();
    assert!(lease.until - lease.since < i64::from(MAX_STAY_SECONDS) * 1000);
    // It can be made shorter as well, by who has the API alone.
    let response = extend(&a, &id, &json!({ "seconds": 60 })).await;
    let lease: Value = response.json().await.unwrap();
    assert!(until(&lease) - since(&lease) < 120.0);
}

fn seconds(time: &Value) -> f64 {
    let time: jiff::Timestamp = time.as_str().unwrap().parse().unwrap();
    time.as_duration().as_secs_f64()
}

fn since(lease: &Value) -> f64 {
    seconds(&lease["since"])
}

fn until(lease: &Value) -> f64 {
    seconds(&lease["until"])
}
