//! A registry of somebody's own: images below a prefix of it, and uploads where it says.

use http::{Method, StatusCode, header};
use kiln::gateway::Upstreams;
use kiln::gateway::path::Route;
use kiln::publish::{check, is_published, push};
use serde_json::{Value, json};

use crate::clients::token;
use crate::publish::stage;
use crate::support::{A, B, Image, World, fails, http, ok, skopeo};

/// A request to the registry itself.
async fn tags(world: &World, name: &str) -> Option<Value> {
    let route = Route::parse(&format!("/v2/{name}/tags/list")).unwrap();
    let answer = world.registry.backing().request(Method::GET, route).send().await.unwrap();
    (answer.status() == StatusCode::OK).then_some(answer.json().await.unwrap())
}

#[tokio::test]
async fn images_land_below_a_prefix_of_ones_own_registry() {
    let (world, counter, backing) = World::below("acme/kiln").await;
    let image = Image::new(&["one", "two"]);
    let layout = image.layout(world.path("layout"));
    ok(&world.push(A, &layout, "a/app:v1").await);
    let moved = counter.take().iter().filter(|seen| seen.path.starts_with("/takes/")).count();
    assert!(moved >= 3, "{moved} requests for two layers and a configuration");
    assert_eq!(ok(&world.inspect(A, "a/app:v1").await), image.digest().to_string());
    fails(&world.inspect(B, "a/app:v1").await);
    let expected = json!({"name": "acme/kiln/a/app", "tags": ["v1"]});
    assert_eq!(tags(&world, "acme/kiln/a/app").await, Some(expected));
    assert_eq!(tags(&world, "a/app").await, None);

    // Clients see Kiln's names.
    let (creds, docker) = (format!("any:{A}"), world.docker("a/app"));
    let list = ["list-tags", "--tls-verify=false", "--creds", &creds, &docker];
    let listed: Value = serde_json::from_str(&ok(&skopeo(&list).await)).unwrap();
    assert_eq!(listed["Tags"], json!(["v1"]));
    let bearer = token(&world, A, &["repository:a/app:pull,push"]).await;
    let list = format!("http://{}/v2/a/app/tags/list?n=1", world.gateway);
    let list = http().get(list).bearer_auth(&bearer).send().await.unwrap();
    assert_eq!(list.json::<Value>().await.unwrap(), json!({"name": "a/app", "tags": ["v1"]}));

    // What a build made goes there too, and layers are mounted from where it pulled them.
    let (ctx, _) = world.guest().await;
    stage(&ctx, &image, &[]).await;
    let checked = check(&ctx, &image.digest().to_string()).await.unwrap();
    push(&checked, &backing, &Upstreams::none(), "a/built", "v2").await.unwrap();
    assert!(is_published(&backing, "a/built", image.digest()).await.unwrap());
    let expected = json!({"name": "acme/kiln/a/built", "tags": ["v2"]});
    assert_eq!(tags(&world, "acme/kiln/a/built").await, Some(expected));
}

/// A place of the registry's is sealed: nobody reaches another path of it with Kiln's login.
#[tokio::test]
async fn an_upload_goes_on_only_where_the_registry_said() {
    let (world, counter, _) = World::below("acme").await;
    let bearer = token(&world, A, &["repository:a/app:pull,push"]).await;
    let send = |method: Method, path: String, body: &'static str| {
        let url = format!("http://{}{path}", world.gateway);
        http().request(method, url).bearer_auth(&bearer).body(body).send()
    };
    let begun = send(Method::POST, "/v2/a/app/blobs/uploads/".into(), "").await.unwrap();
    assert_eq!(begun.status(), StatusCode::ACCEPTED);
    let place = begun.headers()[header::LOCATION].to_str().unwrap().to_owned();
    assert!(place.starts_with("/v2/a/app/blobs/uploads/at."), "{place}");
    let written = send(Method::PATCH, place.clone(), "content").await.unwrap();
    assert_eq!(written.status(), StatusCode::ACCEPTED);
    let place = written.headers()[header::LOCATION].to_str().unwrap().to_owned();
    counter.take();
    let sealed = place.rsplit_once('.').unwrap().0;
    for forged in [format!("{sealed}.AAAAAAAAAAAAAAAAAAAAAA"), sealed.to_owned()] {
        let refused = send(Method::PUT, forged, "").await.unwrap();
        assert_eq!(refused.status(), StatusCode::NOT_FOUND);
        let body: Value = refused.json().await.unwrap();
        assert_eq!(body["errors"][0]["code"], "BLOB_UPLOAD_UNKNOWN");
    }
    assert!(counter.take().is_empty(), "it came to the registry");
    let digest = kiln::staging::Digest::of(b"content");
    let done = send(Method::PUT, format!("{place}?digest={digest}"), "").await.unwrap();
    assert_eq!(done.status(), StatusCode::CREATED);
    assert_eq!(done.headers()[header::LOCATION], format!("/v2/a/app/blobs/{digest}"));
}
