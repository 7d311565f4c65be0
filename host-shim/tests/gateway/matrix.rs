//! Every kind of token against every kind of request, over a real registry: what is to be refused is, and nothing else.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::{Method, StatusCode};
use jsonwebtoken::{Algorithm, EncodingKey};
use kiln::build::Tenant;
use kiln::staging::Digest;
use serde_json::{Value, json};

use crate::support::{A, Image, World, http, ok};

/// What a token is made of.
#[derive(Clone)]
struct Parts {
    header: Value,
    claims: Value,
    /// Who signs, and how.
    key: EncodingKey,
    algorithm: Algorithm,
    signed: bool,
}

impl Parts {
    /// A good one of tenant `a` with this access.
    fn of(world: &World, access: Value) -> Self {
        let (token, _) = world.keys.sign(&Tenant::new("a").unwrap(), vec![]).unwrap();
        let mut parts = token.split('.').map(|part| URL_SAFE_NO_PAD.decode(part).unwrap());
        let mut json = || serde_json::from_slice::<Value>(&parts.next().unwrap()).unwrap();
        let (header, mut claims) = (json(), json());
        claims["access"] = access;
        let key = EncodingKey::from_ec_der(&std::fs::read(world.path("key")).unwrap());
        Self { header, claims, key, algorithm: Algorithm::ES256, signed: true }
    }

    fn header(mut self, name: &str, value: Value) -> Self {
        self.header[name] = value;
        self
    }

    fn claim(mut self, name: &str, value: Value) -> Self {
        self.claims[name] = value;
        self
    }

    fn without(mut self, name: &str) -> Self {
        for part in [&mut self.header, &mut self.claims] {
            part.as_object_mut().unwrap().remove(name);
        }
        self
    }

    fn token(&self) -> String {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let message = format!("{}.{}", part(&self.header), part(&self.claims));
        if !self.signed {
            return format!("{message}.");
        }
        let bytes = message.as_bytes();
        let signature = jsonwebtoken::crypto::sign(bytes, &self.key, self.algorithm).unwrap();
        format!("{message}.{signature}")
    }
}

fn grant(name: &str, actions: &[&str]) -> Value {
    json!({ "type": "repository", "name": name, "actions": actions })
}

async fn ask(world: &World, method: &Method, path: &str, token: &str) -> StatusCode {
    let url = format!("http://{}{path}", world.gateway);
    let asked = http().request(method.clone(), url).bearer_auth(token).send();
    asked.await.unwrap().status()
}

/// A world with `a/app:v1`, and the digest of its layer.
async fn world() -> (World, Digest) {
    let world = World::new().await;
    let image = Image::new(&["content"]);
    let layout = image.layout(world.path("layout"));
    ok(&world.push(A, &layout, "a/app:v1").await);
    (world, Digest::of(&image.layers[0]))
}

/// What needs which action.
fn requests(repository: &str, blob: &Digest) -> Vec<(Method, String, &'static str)> {
    let at = |rest: &str| format!("/v2/{repository}/{rest}");
    let blob = at(&format!("blobs/{blob}"));
    let upload = at("blobs/uploads/0b6f2a52-7d4c-4f0e-9c39-5b0a1c1c2d3e");
    vec![
        (Method::GET, at("manifests/v1"), "pull"),
        (Method::HEAD, at("manifests/v1"), "pull"),
        (Method::GET, blob.clone(), "pull"),
        (Method::HEAD, blob.clone(), "pull"),
        (Method::GET, at("tags/list"), "pull"),
        (Method::POST, at("blobs/uploads/"), "push"),
        (Method::PATCH, upload.clone(), "push"),
        (Method::PUT, upload.clone(), "push"),
        (Method::DELETE, upload, "push"),
        (Method::PUT, at("manifests/v2"), "push"),
        (Method::DELETE, at("manifests/gone"), "delete"),
        (Method::DELETE, blob, "delete"),
    ]
}

#[tokio::test]
async fn a_token_with_anything_wrong_in_it_opens_nothing() {
    let (world, blob) = world().await;
    let other = World::new().await;
    let good = Parts::of(&world, json!([grant("a/app", &["pull", "push", "delete"])]));
    let foreign = Parts::of(&other, json!([]));
    let now = good.claims["iat"].as_u64().unwrap();
    let kid = good.header["kid"].clone();
    let g = || good.clone();
    let secret = EncodingKey::from_secret(kid.as_str().unwrap().as_bytes());
    let hmac = |name: &str, algorithm| Parts {
        key: secret.clone(),
        algorithm,
        ..g().header("alg", json!(name))
    };
    let bad = [
        ("alg none", Parts { signed: false, ..g().header("alg", json!("none")) }),
        ("alg NONE", Parts { signed: false, ..g().header("alg", json!("NONE")) }),
        ("no signature", Parts { signed: false, ..g() }),
        ("alg RS256", g().header("alg", json!("RS256"))),
        ("alg ES384", g().header("alg", json!("ES384"))),
        ("alg EdDSA", g().header("alg", json!("EdDSA"))),
        ("alg HS256", hmac("HS256", Algorithm::HS256)),
        ("alg HS512", hmac("HS512", Algorithm::HS512)),
        ("no alg", g().without("alg")),
        ("another key id", g().header("kid", foreign.header["kid"].clone())),
        ("no key id", g().without("kid")),
        ("a key id that is a path", g().header("kid", json!("../key"))),
        ("another key", Parts { key: foreign.key.clone(), ..g() }),
        ("crit", g().header("crit", json!(["exp"]))),
        ("an empty crit", g().header("crit", json!([]))),
        ("a crit of nothing that is there", g().header("crit", json!(["b64"]))),
        ("a key in the header", g().header("jwk", json!({"kty": "EC"}))),
        ("another audience", g().claim("aud", json!("other"))),
        ("an audience among others", g().claim("aud", json!(["kiln", "other"]))),
        ("no audience", g().without("aud")),
        ("another issuer", g().claim("iss", json!("other"))),
        ("expired", g().claim("exp", json!(now - 1))),
        ("expires never", g().without("exp")),
        ("expires as a text", g().claim("exp", json!("2099"))),
        ("not yet", g().claim("nbf", json!(now + 3600))),
        ("no subject", g().without("sub")),
    ];
    let (mut cells, token) = (0, good.token());
    for (method, path, _) in requests("a/app", &blob) {
        let status = ask(&world, &method, &path, &token).await;
        assert_ne!(status, StatusCode::UNAUTHORIZED, "good: {method} {path}");
        for (what, parts) in &bad {
            let status = ask(&world, &method, &path, &parts.token()).await;
            assert_eq!(status, StatusCode::UNAUTHORIZED, "{what}: {method} {path}");
            cells += 1;
        }
    }
    println!("{cells} cells");
    assert!(cells >= 300);
}

#[tokio::test]
async fn a_token_opens_the_repository_and_the_actions_in_it() {
    let (world, blob) = world().await;
    let mut cells = 0;
    for actions in [
        &[][..],
        &["pull"],
        &["push"],
        &["delete"],
        &["pull", "push"],
        &["pull", "delete"],
        &["push", "delete"],
        &["pull", "push", "delete"],
    ] {
        for granted in ["a/app", "a/ap", "a/app/x", "b/app", "a", "A/app", "a/app:v1", "a/*"] {
            let token = Parts::of(&world, json!([grant(granted, actions)])).token();
            for (method, path, needs) in requests("a/app", &blob) {
                let may = granted == "a/app" && actions.contains(&needs);
                let status = ask(&world, &method, &path, &token).await;
                let refused = status == StatusCode::UNAUTHORIZED;
                assert_eq!(refused, !may, "{actions:?} in {granted}: {method} {path}: {status}");
                cells += 1;
            }
        }
    }
    println!("{cells} cells");
    assert!(cells >= 500);
}

#[tokio::test]
async fn a_blob_is_mounted_from_where_the_token_may_read() {
    let (world, blob) = world().await;
    let pull = || grant("a/app", &["pull"]);
    let cells = [
        ("readable", vec![pull()], "from=a/app", true),
        ("not granted", vec![], "from=a/app", false),
        ("for writing only", vec![grant("a/app", &["push", "delete"])], "from=a/app", false),
        ("another is readable", vec![grant("a/other", &["pull"])], "from=a/app", false),
        ("a part of the name", vec![grant("a/ap", &["pull"])], "from=a/app", false),
        (
            "another kind",
            vec![json!({"type": "registry", "name": "a/app", "actions": ["pull"]})],
            "from=a/app",
            false,
        ),
        ("nowhere", vec![pull()], "", false),
        ("two places", vec![pull()], "from=a/app&from=b/x", false),
        ("two places, the other first", vec![pull()], "from=b/x&from=a/app", false),
        ("the same twice", vec![pull()], "from=a/app&from=a/app", false),
        ("no name", vec![pull()], "from=../app", false),
        ("a path", vec![pull()], "from=a/app/../../b", false),
        ("encoded", vec![pull()], "from=a%2Fapp", true),
    ];
    for (n, (what, mut access, from, mounted)) in cells.into_iter().enumerate() {
        let to = format!("a/to-{n}");
        access.push(grant(&to, &["push"]));
        let token = Parts::of(&world, Value::from(access)).token();
        let path = format!("/v2/{to}/blobs/uploads/?mount={blob}&{from}");
        let status = ask(&world, &Method::POST, &path, &token).await;
        let expected = if mounted { StatusCode::CREATED } else { StatusCode::ACCEPTED };
        assert_eq!(status, expected, "{what}");
    }
}
