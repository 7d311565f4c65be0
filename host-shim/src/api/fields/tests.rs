use serde_json::{Value, json};

use super::tags::{MAX_KEY, MAX_TAGS, MAX_VALUE};
use super::*;
use crate::build::NetworkMode;

fn request(pairs: &[(&'static str, &str)]) -> Result<Request, ApiError> {
    let mut fields = Fields::default();
    for (name, text) in pairs {
        fields.insert(known(name).unwrap(), (*text).to_owned()).unwrap();
    }
    fields.request(&Tenant::new("acme").unwrap(), &Limits::default())
}

fn code(pairs: &[(&'static str, &str)]) -> &'static str {
    request(pairs).map_or_else(|error| error.code(), |_| "fine")
}

#[test]
fn without_any_field_there_are_defaults() {
    let r = request(&[]).unwrap();
    assert_eq!((r.timeout_seconds, r.memory_mb, r.cpus, r.disk_gb), (600, 2048, 2, 10));
    assert_eq!(r.priority, 50);
    assert_eq!(
        (r.network, r.dockerfile, r.target, r.image_name),
        (NetworkMode::Open, None, None, None)
    );
    let small =
        Limits { max_memory_mb: 1024, network_default: NetworkMode::None, ..Limits::default() };
    let r = Fields::default().request(&Tenant::new("acme").unwrap(), &small).unwrap();
    assert_eq!((r.memory_mb, r.network), (1024, NetworkMode::None));
}

#[test]
fn numbers_hold_at_their_bounds_and_break_beyond() {
    let limits = Limits::default();
    for (name, least, most) in [
        ("timeout_seconds", 1, limits.max_timeout_seconds),
        ("memory_mb", 256, limits.max_memory_mb),
        ("cpus", 1, limits.max_cpus),
        ("disk_gb", 1, limits.max_disk_gb),
        ("priority", 0, 100),
    ] {
        for good in [least, most] {
            assert_eq!(code(&[(name, &good.to_string())]), "fine", "{name} {good}");
        }
        for bad in [(i64::from(least) - 1).to_string(), (most + 1).to_string()] {
            assert_eq!(code(&[(name, &bad)]), "invalid_field", "{name} {bad}");
        }
        for bad in ["", " 1", "+1", "1.0", "1s", "-1", "0x10", "99999999999999999999", "ten"] {
            assert_eq!(code(&[(name, bad)]), "invalid_field", "{name} {bad:?}");
        }
    }
}

#[test]
fn image_names_follow_the_distribution_grammar() {
    let name = |text: &str| request(&[("image_name", text)]).map(|r| r.image_name.unwrap());
    assert_eq!(name("app").unwrap(), ImageName { name: "app".into(), tag: "latest".into() });
    assert_eq!(
        name("a/b-c/d__e.f:V_1").unwrap(),
        ImageName { name: "a/b-c/d__e.f".into(), tag: "V_1".into() }
    );
    let longest = "a".repeat(MAX_REPOSITORY - "acme/".len());
    let tag = "t".repeat(MAX_IMAGE_TAG);
    assert!(name(&longest).is_ok() && name(&format!("a:{tag}")).is_ok() && name("a---b").is_ok());
    for bad in [
        "App",
        "a/",
        "/a",
        "a//b",
        "..",
        "a/../b",
        ".a",
        "a.",
        "a..b",
        "a___b",
        "a-_b",
        "a b",
        "é",
        "a:",
        "a:.x",
        "a:-x",
        ":x",
        "a:b:c",
        "host:5000/a",
        "a@sha256:00",
        "a\n",
        "-a",
        &format!("{longest}a"),
        &format!("a:{tag}t"),
    ] {
        assert_eq!(name(bad).unwrap_err().code(), "invalid_field", "{bad:?}");
    }
}

#[test]
fn stages_are_words() {
    for good in ["build", "Stage-2", "0", "a.b_c", &"t".repeat(MAX_TARGET)] {
        assert_eq!(request(&[("target", good)]).unwrap().target.as_deref(), Some(good));
    }
    for bad in ["-x", "--help", "a b", "a/b", "a\n", &"t".repeat(MAX_TARGET + 1)] {
        assert_eq!(code(&[("target", bad)]), "invalid_field", "{bad:?}");
    }
}

#[test]
fn dockerfiles_are_bounded() {
    assert_eq!(code(&[("dockerfile", &"x".repeat(MAX_DOCKERFILE))]), "fine");
    assert_eq!(code(&[("dockerfile", &"x".repeat(MAX_DOCKERFILE + 1))]), "too_large");
    assert_eq!(
        request(&[("dockerfile", " FROM x \n")]).unwrap().dockerfile.as_deref(),
        Some(" FROM x \n")
    );
}

#[test]
fn an_empty_dockerfile_is_none_as_hypeman_has_it() {
    assert_eq!(request(&[("dockerfile", "")]).unwrap().dockerfile, None);
    assert_eq!(request(&[("dockerfile", "\n")]).unwrap().dockerfile.as_deref(), Some("\n"));
}

#[test]
fn build_arguments_are_bounded_and_never_repeated() {
    let args = |value: Value| code(&[("build_args", &value.to_string())]);
    let many =
        |n: usize| (0..n).map(|i| (i.to_string(), json!(""))).collect::<serde_json::Map<_, _>>();
    assert_eq!(args(json!({"A": "", "b-c.d": "x=y z\n"})), "fine");
    assert_eq!(args(many(MAX_BUILD_ARGS).into()), "fine");
    assert_eq!(args(many(MAX_BUILD_ARGS + 1).into()), "too_large");
    assert_eq!(args(json!({"A": "v".repeat(MAX_JOB_TEXT)})), "fine");
    assert_eq!(args(json!({"A": "v".repeat(MAX_JOB_TEXT + 1)})), "invalid_field");
    assert_eq!(args(json!({"n".repeat(MAX_ARG_NAME): ""})), "fine");
    assert_eq!(args(json!({"n".repeat(MAX_ARG_NAME + 1): ""})), "invalid_field");
    for bad in ["", "A B", "A=B", "A\n"] {
        assert_eq!(args(json!({bad: ""})), "invalid_field", "{bad:?}");
    }
    assert_eq!(args(json!({"A": "a\0b"})), "invalid_field");
    let total = |n: usize| {
        let value = "v".repeat(MAX_JOB_TEXT - 1);
        (0..n).map(|i| (i.to_string(), json!(value))).collect::<serde_json::Map<_, _>>()
    };
    let most = MAX_BUILD_ARGS_BYTES / MAX_JOB_TEXT;
    assert_eq!(args(total(most).into()), "fine");
    assert_eq!(args(total(most + 1).into()), "too_large");

    for bad in ["[]", "{\"PASS\":1}", "{\"PASS\":\"hunter2\"", "null", "hunter2"] {
        let refused = request(&[("build_args", bad)]).unwrap_err();
        assert_eq!(refused.code(), "invalid_field");
        assert!(!format!("{refused:?}").contains("hunter2"));
    }
    let refused = request(&[("build_args", "{\"PASS\":\"hunter2\\u0000\"}")]).unwrap_err();
    assert!(!format!("{refused:?}").contains("hunter2"));
}

#[test]
fn tags_are_bounded() {
    let tags = |value: Value| code(&[("tags", &value.to_string())]);
    let many =
        |n: usize| (0..n).map(|i| (i.to_string(), json!("x"))).collect::<serde_json::Map<_, _>>();
    assert_eq!(tags(many(MAX_TAGS).into()), "fine");
    assert_eq!(tags(many(MAX_TAGS + 1).into()), "too_large");
    assert_eq!(tags(json!({"k".repeat(MAX_KEY): "v".repeat(MAX_VALUE)})), "fine");
    assert_eq!(tags(json!({"k".repeat(MAX_KEY + 1): "v"})), "invalid_field");
    assert_eq!(tags(json!({"k": "v".repeat(MAX_VALUE + 1)})), "invalid_field");
    for bad in [
        json!({"": "v"}),
        json!({"a\n": "v"}),
        json!({"a": "\u{1b}"}),
        json!({"a": null}),
        json!([]),
    ] {
        assert_eq!(tags(bad.clone()), "invalid_field", "{bad}");
    }
}

#[test]
fn what_comes_later_is_refused_and_not_ignored() {
    for (name, nothing, something) in [
        ("cache_scope", "", "main"),
        ("builder_id", "", "b"),
        ("global_cache_key", "", "node"),
        ("is_admin_build", "false", "true"),
    ] {
        assert_eq!(code(&[(name, nothing)]), "fine", "{name}");
        assert_eq!(code(&[(name, something)]), "not_supported", "{name}");
    }
    for (name, bad) in [("is_admin_build", "yes"), ("keep_failed_seconds", "x"), ("secrets", "{}")]
    {
        assert_eq!(code(&[(name, bad)]), "invalid_field", "{name}");
    }
}

#[test]
fn unknown_and_repeated_fields_are_refused() {
    assert_eq!(known("volume_size").unwrap_err().code(), "unknown_field");
    assert_eq!(known("").unwrap_err().code(), "unknown_field");
    let mut fields = Fields::default();
    fields.insert("cpus", "1".into()).unwrap();
    assert_eq!(fields.insert("cpus", "1".into()).unwrap_err().code(), "duplicate_field");
}

#[test]
fn a_base_is_pinned_by_a_whole_digest() {
    let digest = format!("sha256:{}", "0a".repeat(32));
    let pinned = |text: &str| request(&[("base_image_digest", text)]).unwrap().base_image_digest;
    assert_eq!(pinned(&digest), Some(digest.clone()));
    assert_eq!(pinned(""), None);
    for bad in ["sha256:00", &digest.to_uppercase(), &digest[7..], &format!("{digest}0")] {
        assert_eq!(code(&[("base_image_digest", bad)]), "invalid_field", "{bad}");
    }
}

#[test]
fn secrets_are_declared_by_id_and_variable() {
    let declared =
        r#"[{"id":"npm.token"},{"id":"pip","env_var":"PIP_TOKEN"},{"id":"x","env_var":""}]"#;
    let secrets = request(&[("secrets", declared)]).unwrap().secrets;
    let shown: Vec<_> =
        secrets.iter().map(|spec| (spec.id.as_str(), spec.variable.as_deref())).collect();
    assert_eq!(shown, [("npm.token", None), ("pip", Some("PIP_TOKEN")), ("x", None)]);
    assert!(request(&[("secrets", "[]")]).unwrap().secrets.is_empty());
    for bad in [
        "{}",
        "[1]",
        "hunter2",
        "[{}]",
        r#"[{"id":"a/b"}]"#,
        r#"[{"id":".a"}]"#,
        r#"[{"id":"a"},{"id":"a"}]"#,
        r#"[{"id":"a","env_var":"1A"}]"#,
        r#"[{"id":"a","env_var":"A=B"}]"#,
        r#"[{"id":"a","env_var":"A"},{"id":"b","env_var":"A"}]"#,
        r#"[{"id":"a","value":"hunter2"}]"#,
    ] {
        let refusal = request(&[("secrets", bad)]).unwrap_err();
        assert_eq!(refusal.code(), "invalid_field", "{bad}");
        assert!(!format!("{refusal:?}").contains("hunter2"), "{refusal:?}");
    }
    let many: Vec<_> = (0..65).map(|n| json!({"id": format!("s{n}")})).collect();
    assert_eq!(code(&[("secrets", &json!(many).to_string())]), "too_large");
}
