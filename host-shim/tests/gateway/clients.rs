//! `/v2/*` and `/v2/token` with skopeo, oci-client and bare HTTP.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{Method, StatusCode};
use kiln::gateway::path::Name;
use kiln::gateway::rights::Action;
use kiln::staging::Digest;
use oci_client::client::{ClientConfig, ClientProtocol, Config, ImageLayer};
use oci_client::secrets::RegistryAuth;
use oci_client::{Client, Reference, RegistryOperation};
use serde_json::{Value, json};

use crate::support::{
    A, A_READER, ADMIN, B, Image, OCI_MANIFEST, World, code_of, fails, http, ok, skopeo,
};

/// A registry token for these scopes.
pub async fn token(world: &World, api_token: &str, scopes: &[&str]) -> String {
    let mut url = format!("http://{}/v2/token?service=kiln", world.gateway);
    for scope in scopes {
        url.push_str("&scope=");
        url.push_str(scope);
    }
    let answer = http().get(url).basic_auth("any", Some(api_token)).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    let answer: Value = answer.json().await.unwrap();
    assert_eq!(
        (answer["expires_in"].as_u64(), &answer["token"]),
        (Some(300), &answer["access_token"])
    );
    answer["token"].as_str().unwrap().to_owned()
}

/// What a token says to somebody who only reads it: its header and its claims.
fn read(token: &str) -> (Value, Value) {
    let mut parts = token.split('.').map(|part| URL_SAFE_NO_PAD.decode(part).unwrap());
    let mut json = || serde_json::from_slice(&parts.next().unwrap()).unwrap();
    (json(), json())
}

async fn send(world: &World, method: Method, path: &str, bearer: &str) -> reqwest::Response {
    let url = format!("http://{}{path}", world.gateway);
    http().request(method, url).bearer_auth(bearer).send().await.unwrap()
}

#[tokio::test]
async fn skopeo_logs_in_pushes_inspects_copies_and_deletes() {
    let world = World::new().await;
    let image = Image::new(&["one", "two"]);
    let layout = image.layout(world.path("layout"));
    let auth = world.path("auth.json");
    let (auth, server) = (auth.to_str().unwrap(), world.gateway.to_string());
    let login = ["login", "--tls-verify=false", "--authfile", auth, "-u", "any", "-p"];
    ok(&skopeo(&[&login[..], &[A, &server]].concat()).await);
    fails(&skopeo(&[&login[..], &["kiln_wrong", &server]].concat()).await);

    ok(&world.push(A, &layout, "a/app:v1").await);
    assert_eq!(ok(&world.inspect(A, "a/app:v1").await), image.digest().to_string());
    assert_eq!(ok(&world.inspect(A_READER, "a/app:v1").await), image.digest().to_string());
    let listed = ok(&skopeo(&[
        "list-tags",
        "--tls-verify=false",
        "--creds",
        &format!("x:{A}"),
        &world.docker("a/app"),
    ])
    .await);
    assert!(listed.contains("v1"), "{listed}");

    // Between two repositories of one's own: layers are mounted.
    let creds = format!("any:{A}");
    ok(&skopeo(&[
        "copy",
        "--preserve-digests",
        "--src-tls-verify=false",
        "--dest-tls-verify=false",
        "--src-creds",
        &creds,
        "--dest-creds",
        &creds,
        &world.docker("a/app:v1"),
        &world.docker("a/copy:v2"),
    ])
    .await);
    assert_eq!(ok(&world.inspect(A, "a/copy:v2").await), image.digest().to_string());

    let out = format!("oci:{}:x", world.path("out").display());
    ok(&skopeo(&[
        "copy",
        "--src-tls-verify=false",
        "--src-creds",
        &creds,
        &world.docker("a/app:v1"),
        &out,
    ])
    .await);
    fails(
        &skopeo(&[
            "delete",
            "--tls-verify=false",
            "--creds",
            &format!("any:{A_READER}"),
            &world.docker("a/app:v1"),
        ])
        .await,
    );
    ok(&skopeo(&["delete", "--tls-verify=false", "--creds", &creds, &world.docker("a/app:v1")])
        .await);
    fails(&world.inspect(A, "a/app:v1").await);
}

#[tokio::test]
async fn nobody_gets_past_the_rights() {
    let world = World::new().await;
    let image = Image::new(&["secret"]);
    let layout = image.layout(world.path("layout"));
    ok(&world.push(A, &layout, "a/app:v1").await);
    ok(&world.push(ADMIN, &layout, "base/debian:trixie").await);
    ok(&world.push(ADMIN, &layout, "b/given:v1").await);
    for (who, may_not_push) in [
        (B, "a/app:v2"),
        (A_READER, "a/app:v2"),
        (A, "base/debian:evil"),
        (A, "builds/of-a:v1"),
        (ADMIN, "builds/of-a:v1"),
        (ADMIN, "upstream/x:v1"),
        (A, "app:v1"),
        ("kiln_unknown", "a/app:v2"),
    ] {
        fails(&world.push(who, &layout, may_not_push).await);
    }
    for (who, name, may) in [
        (B, "a/app:v1", false),
        ("kiln_unknown", "a/app:v1", false),
        ("kiln_unknown", "base/debian:trixie", false),
        (B, "base/debian:trixie", true),
        (A_READER, "base/debian:trixie", true),
        (B, "b/given:v1", true),
        (A, "b/given:v1", false),
        (ADMIN, "a/app:v1", true),
    ] {
        let seen = world.inspect(who, name).await;
        assert_eq!(seen.status.success(), may, "{who} {name}");
    }
}

#[tokio::test]
async fn registry_token_generation() {
    let world = World::new().await;
    let begun = jiff::Timestamp::now().as_second();
    // More than A may is asked for; what it may not is left out.
    let scopes = [
        "repository:a/app:pull,push",
        "repository:a/cache:*",
        "repository:base/debian:pull,push",
        "repository:b/app:pull,push,delete",
        "repository:builds/unknown:pull",
        "registry:catalog:*",
    ];
    let made = token(&world, A, &scopes).await;
    let (header, claims) = read(&made);
    assert_eq!((&header["alg"], &header["typ"]), (&json!("ES256"), &json!("JWT")));
    assert_eq!(header.as_object().unwrap().len(), 3, "and the key's id: {header}");
    let granted = |name: &str, actions: &[&str]| json!({"type": "repository", "name": name, "actions": actions});
    let access = json!([
        granted("a/app", &["pull", "push"]),
        granted("a/cache", &["pull", "push", "delete"]),
        granted("base/debian", &["pull"]),
    ]);
    assert_eq!(claims["access"], access);
    for (claim, value) in [("iss", "kiln"), ("aud", "kiln"), ("sub", "a")] {
        assert_eq!(claims[claim], value, "{claim}");
    }
    let at = |claim: &str| claims[claim].as_i64().unwrap();
    assert!((begun..=jiff::Timestamp::now().as_second()).contains(&at("iat")), "{claims}");
    assert_eq!((at("nbf"), at("exp")), (at("iat"), at("iat") + 300));
    assert!(!claims.to_string().contains(A), "nothing of the API token: {claims}");
    assert!(world.keys.verify(&made).is_ok());

    // Each is another; who may only read gets no more; without scopes a token opens nothing.
    let (_, again) = read(&token(&world, A, &scopes).await);
    assert_ne!(again["jti"], claims["jti"]);
    let (_, reader) = read(&token(&world, A_READER, &scopes).await);
    let pull = ["a/app", "a/cache", "base/debian"].map(|name| granted(name, &["pull"]));
    assert_eq!((&reader["access"], &reader["sub"]), (&json!(pull), &json!("a")));
    let (_, nothing) = read(&token(&world, A, &[]).await);
    assert_eq!(nothing["access"], json!([]));

    // Nobody else is given one, and one makes no other.
    for password in [None, Some(""), Some("kiln_wrong"), Some(&*made)] {
        let url = format!("http://{}/v2/token?service=kiln", world.gateway);
        let request = http().get(url);
        let request = match password {
            Some(password) => request.basic_auth("any", Some(password)),
            None => request,
        };
        let refused = request.send().await.unwrap();
        assert_eq!(refused.status(), StatusCode::UNAUTHORIZED, "{password:?}");
        assert!(!refused.text().await.unwrap().contains("token\":"));
    }
}

#[tokio::test]
async fn a_token_opens_what_was_granted_and_nothing_else() {
    let world = World::new().await;
    let image = Image::new(&["secret"]);
    let layout = image.layout(world.path("layout"));
    ok(&world.push(A, &layout, "a/app:v1").await);
    let manifest = "/v2/a/app/manifests/v1";
    let blob = format!("/v2/a/app/blobs/{}", Digest::of(&image.layers[0]));

    // Asked for too much: only what B may is in the token.
    let scopes = ["repository:a/app:pull,push,delete", "repository:b/x:*", "registry:catalog:*"];
    let of_b = token(&world, B, &scopes).await;
    let claims = world.keys.verify(&of_b).unwrap();
    let names: Vec<_> = claims.access.iter().map(|access| access.name.as_str()).collect();
    assert_eq!(names, ["b/x"]);
    assert!(claims.allow(&Name::parse("b/x").unwrap(), Action::Delete));

    for (method, path) in [
        (Method::GET, manifest),
        (Method::HEAD, manifest),
        (Method::DELETE, manifest),
        (Method::PUT, "/v2/a/app/manifests/v2"),
        (Method::GET, &blob),
        (Method::DELETE, &blob),
        (Method::GET, "/v2/a/app/tags/list"),
        (Method::POST, "/v2/a/app/blobs/uploads/"),
        (Method::PATCH, "/v2/a/app/blobs/uploads/x"),
    ] {
        let answer = send(&world, method.clone(), path, &of_b).await;
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED, "{method} {path}");
        let challenge = answer.headers()["www-authenticate"].to_str().unwrap().to_owned();
        assert!(challenge.contains("scope=\"repository:a/app:"), "{challenge}");
    }
    // A blob of A's under B's name: the registry knows it, but not there.
    let stolen = blob.replace("a/app", "b/x");
    assert_eq!(send(&world, Method::GET, &stolen, &of_b).await.status(), StatusCode::NOT_FOUND);
    // A mount from A's repository by B becomes an ordinary upload; by A it works.
    let digest = Digest::of(&image.layers[0]);
    let mount = |to: &str| format!("/v2/{to}/blobs/uploads/?mount={digest}&from=a/app");
    assert_eq!(
        send(&world, Method::POST, &mount("b/x"), &of_b).await.status(),
        StatusCode::ACCEPTED
    );
    let twice = format!("{}&from=b/x", mount("b/x"));
    assert_eq!(send(&world, Method::POST, &twice, &of_b).await.status(), StatusCode::ACCEPTED);
    let of_a = token(&world, A, &["repository:a/app:pull", "repository:a/y:pull,push"]).await;
    assert_eq!(
        send(&world, Method::POST, &mount("a/y"), &of_a).await.status(),
        StatusCode::CREATED
    );
    assert_eq!(send(&world, Method::GET, &blob, &of_a).await.status(), StatusCode::OK);
    let begin = "/v2/a/app/blobs/uploads/";
    let only_pull = send(&world, Method::POST, begin, &of_a).await;
    assert_eq!(only_pull.status(), StatusCode::UNAUTHORIZED);

    for (method, path, status) in [
        (Method::GET, "/v2/", StatusCode::OK),
        (Method::GET, "/v2/_catalog", StatusCode::METHOD_NOT_ALLOWED),
        (Method::POST, manifest, StatusCode::METHOD_NOT_ALLOWED),
        (Method::GET, "/v2/a/app/nonsense", StatusCode::NOT_FOUND),
        (Method::GET, "/v2/a/app%2fx/tags/list", StatusCode::BAD_REQUEST),
        (Method::GET, "/v2/a/app/manifests/sha256:1", StatusCode::BAD_REQUEST),
    ] {
        assert_eq!(send(&world, method, path, &of_a).await.status(), status, "{path}");
    }
}

#[tokio::test]
async fn only_a_registry_token_in_one_bearer_header_is_looked_at() {
    let world = World::new().await;
    let url = format!("http://{}/v2/", world.gateway);
    let good = token(&world, A, &[]).await;
    let of = |request: reqwest::RequestBuilder| async move { request.send().await.unwrap() };

    let bare = of(http().get(&url)).await;
    let challenge = bare.headers()["www-authenticate"].to_str().unwrap().to_owned();
    let realm = format!("Bearer realm=\"http://{}/v2/token\",service=\"kiln\"", world.gateway);
    assert_eq!(challenge, realm);
    assert_eq!(code_of(bare).await, (401, "UNAUTHORIZED".into()));
    // The realm does not come from the request.
    let lured = of(http().get(&url).header("Host", "evil.example")).await;
    assert!(lured.headers()["www-authenticate"].to_str().unwrap().contains(&realm));

    assert_eq!(of(http().get(&url).bearer_auth(&good)).await.status(), StatusCode::OK);
    for (what, request) in [
        ("an API token", http().get(&url).bearer_auth(A)),
        ("an API token as a password", http().get(&url).basic_auth("any", Some(A))),
        ("a registry token as a password", http().get(&url).basic_auth("any", Some(&good))),
        ("in the query", http().get(format!("{url}?access_token={good}&token={good}"))),
        ("in a cookie", http().get(&url).header("Cookie", format!("token={good}"))),
        ("twice", http().get(&url).header("Authorization", "Bearer x").bearer_auth(&good)),
        ("cut", http().get(&url).bearer_auth(&good[..good.len() - 3])),
        ("from a trusted address", http().get(&url).header("X-Real-IP", "127.0.0.1")),
    ] {
        assert_eq!(of(request).await.status(), StatusCode::UNAUTHORIZED, "{what}");
    }
    let unknown = of(http().get(format!("http://{}/v2/nonsense", world.gateway))).await;
    assert_eq!(unknown.status(), StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn the_token_endpoint_takes_get_and_oauth_and_refuses_the_rest() {
    let world = World::new().await;
    let url = format!("http://{}/v2/token", world.gateway);
    let form = |pairs: &[(&str, &str)]| {
        let body =
            url::form_urlencoded::Serializer::new(String::new()).extend_pairs(pairs).finish();
        let post = http().post(&url).header("Content-Type", "application/x-www-form-urlencoded");
        post.body(body).send()
    };
    let grant = ("grant_type", "password");
    let scope = ("scope", "repository:a/x:pull repository:b/x:pull");
    let service = ("service", "kiln");
    let answer = form(&[grant, service, scope, ("username", "x"), ("password", A)]).await.unwrap();
    assert_eq!(answer.headers()["cache-control"], "no-store");
    let answer: Value = answer.json().await.unwrap();
    assert_eq!(answer["scope"], "repository:a/x:pull");
    let claims = world.keys.verify(answer["access_token"].as_str().unwrap()).unwrap();
    assert_eq!((claims.sub.as_str(), claims.access.len()), ("a", 1));

    let refresh = ("grant_type", "refresh_token");
    let refused = form(&[refresh, service, ("refresh_token", A)]).await.unwrap();
    assert_eq!(refused.status(), StatusCode::BAD_REQUEST);
    let refused = form(&[grant, service, ("password", "kiln_wrong")]).await.unwrap();
    assert_eq!(refused.status(), StatusCode::UNAUTHORIZED);
    assert!(refused.headers()["www-authenticate"].to_str().unwrap().starts_with("Basic"));

    let get = |query: &str| http().get(format!("{url}?{query}"));
    let status =
        |request: reqwest::RequestBuilder| async { request.send().await.unwrap().status() };
    assert_eq!(status(get("service=kiln")).await, StatusCode::UNAUTHORIZED);
    assert_eq!(status(get(&format!("password={A}&token={A}"))).await, StatusCode::UNAUTHORIZED);
    assert_eq!(status(get("").bearer_auth(A)).await, StatusCode::UNAUTHORIZED);
    let other = get("service=other").basic_auth("any", Some(A));
    assert_eq!(status(other).await, StatusCode::BAD_REQUEST);
    let good = token(&world, A, &[]).await;
    let again = get("").basic_auth("any", Some(&good));
    assert_eq!(status(again).await, StatusCode::UNAUTHORIZED, "a registry token buys no other");
    let put = http().put(&url).basic_auth("any", Some(A));
    assert_eq!(status(put).await, StatusCode::METHOD_NOT_ALLOWED);
}

#[tokio::test]
async fn oci_client_logs_in_pushes_lists_and_pulls() {
    let world = World::new().await;
    let _ = http();
    let fresh = || {
        let config = ClientConfig { protocol: ClientProtocol::Http, ..ClientConfig::default() };
        Client::try_from(config).unwrap()
    };
    let client = fresh();
    let reference: Reference = format!("{}/a/app:v1", world.gateway).parse().unwrap();
    let wrong = RegistryAuth::Basic("any".into(), "kiln_wrong".into());
    assert!(fresh().auth(&reference, &wrong, RegistryOperation::Push).await.is_err());
    let auth = RegistryAuth::Basic("any".into(), A.into());
    let token = client.auth(&reference, &auth, RegistryOperation::Push).await.unwrap().unwrap();
    // Larger than one of its chunks, so that PATCH and Content-Range are used.
    let data = vec![7; 9 * 1024 * 1024];
    let layer = ImageLayer::oci_v1(data.clone(), None);
    let config = Config::oci_v1(b"{}".to_vec(), None);
    client.push(&reference, &[layer], config, &auth, None).await.unwrap();
    let types = vec!["application/vnd.oci.image.layer.v1.tar"];
    let pulled = client.pull(&reference, &auth, types).await.unwrap();
    assert_eq!(pulled.layers[0].data, data);
    let listed = client.list_tags(&reference, &auth, None, None).await.unwrap();
    assert_eq!((listed.name.as_str(), listed.tags), ("a/app", vec!["v1".to_owned()]));
    // What is there need not be sent again, by who asks.
    let layer = Digest::of(&data).to_string();
    assert!(client.blob_exists(&reference, &layer).await.unwrap());
    assert!(!client.blob_exists(&reference, &Digest::of(b"").to_string()).await.unwrap());
    let other = RegistryAuth::Basic("any".into(), B.into());
    assert!(fresh().pull_manifest(&reference, &other).await.is_err());
    assert!(fresh().list_tags(&reference, &other, None, None).await.is_err());
    // It deletes nothing, and the token that it asked for does not allow it.
    let digest = pulled.digest.unwrap();
    let path = format!("/v2/a/app/manifests/{digest}");
    let refused = send(&world, Method::DELETE, &path, &token).await;
    assert_eq!(refused.status(), StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn uploads_and_ranges_pass_through() {
    let world = World::new().await;
    let bearer = token(&world, A, &["repository:a/x:pull,push,delete"]).await;
    let begun = send(&world, Method::POST, "/v2/a/x/blobs/uploads/", &bearer).await;
    assert_eq!(begun.status(), StatusCode::ACCEPTED);
    let location = begun.headers()["location"].to_str().unwrap().to_owned();
    assert!(location.starts_with("/v2/a/x/blobs/uploads/"), "{location}");
    let url = format!("http://{}{location}", world.gateway);
    let patch = http().patch(&url).bearer_auth(&bearer).body("0123").send().await.unwrap();
    assert_eq!(patch.status(), StatusCode::ACCEPTED);
    assert_eq!(patch.headers()["range"], "0-3");
    let location = patch.headers()["location"].to_str().unwrap();
    let digest = Digest::of(b"01234567");
    // Not under another's name, even with the right state.
    let elsewhere = location.replace("a/x", "a/y");
    let other = token(&world, A, &["repository:a/y:pull,push"]).await;
    let url = format!("http://{}{elsewhere}&digest={digest}", world.gateway);
    let refused = http().put(&url).bearer_auth(&other).body("4567").send().await.unwrap();
    assert!(refused.status().is_client_error(), "{}", refused.status());
    let url = format!("http://{}{location}&digest={digest}", world.gateway);
    let done = http().put(&url).bearer_auth(&bearer).body("4567").send().await.unwrap();
    assert_eq!(done.status(), StatusCode::CREATED);
    assert_eq!(done.headers()["location"], format!("/v2/a/x/blobs/{digest}").as_str());

    let url = format!("http://{}/v2/a/x/blobs/{digest}", world.gateway);
    let part =
        http().get(&url).bearer_auth(&bearer).header("Range", "bytes=2-4").send().await.unwrap();
    assert_eq!(part.status(), StatusCode::PARTIAL_CONTENT);
    assert_eq!(part.text().await.unwrap(), "234");
    let head = http().head(&url).bearer_auth(&bearer).send().await.unwrap();
    assert_eq!(head.headers()["content-length"], "8");
    assert!(!head.headers().contains_key("set-cookie"));
}

#[tokio::test]
async fn a_registry_that_is_gone_is_a_bad_gateway() {
    let world = World::new().await;
    let bearer = token(&world, A, &["repository:a/x:pull"]).await;
    let World { registry, gateway, .. } = world;
    registry.stop().await;
    let url = format!("http://{gateway}/v2/a/x/tags/list");
    let answer = http().get(url).bearer_auth(bearer).send().await.unwrap();
    assert_eq!(code_of(answer).await, (502, "UNKNOWN".into()));
}

#[tokio::test]
async fn a_page_of_tags_leads_to_the_next_through_the_gateway() {
    let world = World::new().await;
    let layout = Image::new(&["x"]).layout(world.path("layout"));
    for tag in ["a", "b", "c"] {
        ok(&world.push(A, &layout, &format!("a/app:{tag}")).await);
    }
    let bearer = token(&world, A, &["repository:a/app:pull"]).await;
    let page = send(&world, Method::GET, "/v2/a/app/tags/list?n=2", &bearer).await;
    let link = page.headers().get("link").map(|link| link.to_str().unwrap().to_owned());
    // docker-registry 2.8 lists all tags at once; newer ones page.
    if let Some(link) = link {
        assert!(link.starts_with("</v2/a/app/tags/list?"), "{link}");
    }
    let manifest = http()
        .get(format!("http://{}/v2/a/app/manifests/a", world.gateway))
        .header("Accept", OCI_MANIFEST)
        .bearer_auth(&bearer);
    assert_eq!(manifest.send().await.unwrap().status(), StatusCode::OK);
}
