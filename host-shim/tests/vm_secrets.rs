//! Secrets in real VMs: what a step that asks for one sees, and what nobody else does.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::process::Stdio;

use kiln_protocol::secret::MAX_SECRET_VALUE;
use sha2::{Digest as _, Sha256};
use support::holders::{Holder, holders};
use support::image::Image;
use support::{Server, sha256, text};

/// Spaces, a NUL, bytes that are no UTF-8, and a newline at the end.
const FILE: &[u8] = b" hunter2-file\0\xff \n";
const TENANT: &str = "hunter2-of-the-tenant";
/// What that is afterwards.
const CHANGED: &str = "hunter2-of-the-tenant, changed";
const ENVIRONMENT: &str = "hunter2-of-the-environment\n";
/// In the midst of the largest secret.
const LARGE: &str = "hunter2-of-the-large";
/// No secret: a step writes it to the image; the Dockerfile has it in capitals.
const PUBLIC: &str = "published in a layer only";

/// Values are compared by their sums, which are in the history; of the one that changes the log has the sum.
const DOCKERFILE: &str = r#"FROM scratch
COPY --chmod=755 busybox /bin/busybox
SHELL ["/bin/busybox", "sh", "-ec"]
RUN ["/bin/busybox", "--install", "-s", "/bin"]
RUN --mount=type=secret,id=file \
    [ "$(sha256sum </run/secrets/file)" = "@FILE@  -" ] && [ "$(stat -c '%a %u:%g' /run/secrets/file)" = "400 0:0" ]
RUN --mount=type=secret,id=file,target=/else/where,mode=0444,uid=7,gid=8 \
    [ "$(sha256sum </else/where)" = "@FILE@  -" ] && [ "$(stat -c '%a %u:%g' /else/where)" = "444 7:8" ]
RUN --mount=type=secret,id=tenant,env=TOKEN \
    [ ! -e /run/secrets/tenant ] && [ ! -e /dev/kiln-secret-variables ] && printf %s "$TOKEN" | sha256sum
RUN --mount=type=secret,id=large --mount=type=secret,id=file --mount=type=secret,id=tenant \
    [ "$(sha256sum </run/secrets/large)" = "@LARGE@  -" ] && [ "$(sha256sum </run/secrets/file)" = "@FILE@  -" ] && \
    [ "$(stat -c %s /run/secrets/large)" = 524288 ] && sha256sum </run/secrets/tenant
RUN [ -z "$TOKEN" ] && [ ! -e /run/secrets/file ] && [ ! -s /else/where ]
RUN echo "@PUBLIC@" | tr A-Z a-z >/public
RUN [ "$(printf %s "$EVERY" | sha256sum)" = "@ENVIRONMENT@  -" ]
RUN --mount=type=secret,id=other [ ! -e /run/secrets/other ]
"#;

#[test]
fn vm_secrets_reach_the_steps_that_ask_and_nothing_else() {
    let server = Server::start();
    set(&server, "tenant", TENANT);
    let busybox = std::fs::read("/bin/busybox").unwrap();
    let large = large();
    let dockerfile = DOCKERFILE
        .replace("@FILE@", &sha256(FILE))
        .replace("@LARGE@", &sha256(&large))
        .replace("@PUBLIC@", &PUBLIC.to_uppercase())
        .replace("@ENVIRONMENT@", &sha256(ENVIRONMENT.as_bytes()));
    let dir = tempfile::tempdir().unwrap();
    let file = |id: &str, value: &[u8]| {
        std::fs::write(dir.path().join(id), value).unwrap();
        format!("id={id},src={}", dir.path().join(id).display())
    };
    let (file, large) = (file("file", FILE), file("large", &large));
    let source = support::source(&[("Dockerfile", dockerfile.as_bytes()), ("busybox", &busybox)]);
    let build = || {
        let flags = ["--progress", "plain", "--cpus", support::CPUS, "--secret", &file];
        let out = server
            .kiln(&[&["build", source.path().to_str().unwrap()][..], &flags].concat())
            .args(["--secret", &large, "--secret", "id=tenant"])
            .args(["--secret", "id=environment,env=KILN_TEST_VALUE,env_var=EVERY"])
            .env("KILN_TEST_VALUE", ENVIRONMENT)
            .output()
            .unwrap();
        let log = text(out.stderr);
        assert!(out.status.success(), "{log}\n{}", server.log());
        (log, text(out.stdout).trim().to_owned())
    };
    let (log, image) = build();
    assert!(!log.contains("hunter2-file"), "{log}");
    let sums = [TENANT, CHANGED].map(|value| sha256(value.as_bytes()));
    let seen = |log: &str| [0, 1].map(|n| log.matches(&sums[n]).count());
    assert_eq!(seen(&log), [2, 0], "{log}");

    // Another value: the same build once more has that, and nothing of the one before.
    set(&server, "tenant", CHANGED);
    let (log, _) = build();
    assert_eq!(seen(&log), [0, 2], "{log}");

    // The image has none of it: no file, no variable, no trace in its history.
    let image = Image::copy(&server, &image);
    let secrets = ["hunter2-file", TENANT, "hunter2-of-the-environment", LARGE];
    for secret in secrets {
        assert!(!image.holds(secret.as_bytes()), "{secret} is in the image");
    }
    // Nor has the server's disk, where the image's layers are found packed.
    let found = holders(&server.data(), &[&secrets[..], &[PUBLIC]].concat());
    let public = |holder: &Holder| holder.packed && holder.text == PUBLIC;
    assert!(!found.is_empty() && found.iter().all(public), "{found:?}");
    assert!(image.holds(PUBLIC.as_bytes()));
    server.stop();
}

/// As long as a secret can be, with every byte in it and no newline at its end.
fn large() -> Vec<u8> {
    let mut value: Vec<u8> =
        (0_u32..1 << 14).flat_map(|n| Sha256::digest(n.to_be_bytes()).to_vec()).collect();
    assert_eq!(value.len(), MAX_SECRET_VALUE);
    value[300_000..][..LARGE.len()].copy_from_slice(LARGE.as_bytes());
    *value.last_mut().unwrap() = 0xff;
    value
}

/// What steps print of a secret, in the forms that docs/SECRETS.md lists, and in two writes.
const PRINTS: &str = r#"FROM scratch
COPY --chmod=755 busybox /bin/busybox
SHELL ["/bin/busybox", "sh", "-c"]
RUN ["/bin/busybox", "--install", "-s", "/bin"]
RUN --mount=type=secret,id=key,env=KEY echo "raw <$KEY>"; echo "x$KEY" | base64; echo "xy$KEY" | base64; printf %s "$KEY" | od -An -tx1 | tr -d ' \n'; echo; \
    printf %s "${KEY%canary+value}"; sleep 1; echo "${KEY#hunter2/}"; printf %s "$KEY" | sed "s|/|%2F|; s|+|%2B|"; echo
RUN --mount=type=secret,id=address,env=ADDRESS printf "GET http://[%s]/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" "$ADDRESS" \
    | nc 127.0.0.1 3128 | grep -q "a private address"
RUN --mount=type=secret,id=key,env=KEY echo "last words: $KEY" >&2; exit 3
"#;
/// A host is a name or this; Kiln's proxy has it in small letters.
const ADDRESS: &str = "FD00::7F3E:9A1C:5B2D:CA9A";

#[test]
fn vm_what_a_build_prints_of_its_secrets_is_masked_everywhere() {
    let server = Server::start();
    let canary = "hunter2/canary+value";
    let busybox = std::fs::read("/bin/busybox").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let secret = |id: &str, value: &str| {
        std::fs::write(dir.path().join(id), value).unwrap();
        format!("id={id},src={}", dir.path().join(id).display())
    };
    let (key, short) = (secret("key", canary), secret("short", "1234"));
    let address = secret("address", ADDRESS);
    let id = server.submit(
        &[("Dockerfile", PRINTS.as_bytes()), ("busybox", &busybox)],
        &["--secret", &key, "--secret", &short, "--secret", &address, "--network", "open"],
    );
    let build = server.wait(&id);
    let log = text(server.run(&["logs", &id]).stdout);
    assert_eq!(build["failure"]["kind"], "step_failed", "{build}\n{log}");
    assert_eq!(build["failure"]["detail"], "last words: ***", "{build}");
    assert!(log.contains("raw <***>"), "{log}");
    assert!(server.log().contains("a step was refused"), "{}", server.log());
    assert!(log.contains("the secret short is not masked"), "{log}");
    let forms = [
        canary,
        "hunter2%2Fcanary",
        "68756e746572322f",
        "aHVudGVyMi9j",
        "h1bnRlcjIvY2Fu",
        "odW50ZXIyL2Nh",
        ADDRESS,
        &ADDRESS.to_lowercase(),
    ];
    for form in forms {
        assert!(!server.log().contains(form), "{form}:\n{}", server.log());
        assert!(!log.contains(form), "{form}:\n{log}");
    }
    // The log is there, and what it has of them is not.
    let found = holders(&server.data(), &[&forms[..], &["raw <***>"]].concat());
    assert!(
        !found.is_empty() && found.iter().all(|holder| holder.text == "raw <***>"),
        "{found:?}"
    );
    server.stop();
}

/// In a file, as it is, in base64, hex or URL-encoded; and in the image's configuration, by the build's own arguments.
#[test]
fn vm_an_image_that_holds_a_secret_is_not_published() {
    let server = Server::start();
    let busybox = std::fs::read("/bin/busybox").unwrap();
    let dir = tempfile::tempdir().unwrap();
    let value = "hunter2/canary+value";
    std::fs::write(dir.path().join("key"), value).unwrap();
    let flag = format!("id=key,src={}", dir.path().join("key").display());
    let leaks = |lines: &str, flags: &[&str], place: &str| {
        let dockerfile = format!(
            "FROM scratch\nCOPY --chmod=755 busybox /bin/busybox\nSHELL [\"/bin/busybox\", \"sh\", \"-ec\"]\n\
             RUN [\"/bin/busybox\", \"--install\", \"-s\", \"/bin\"]\n{lines}\n"
        );
        let files: &[(&str, &[u8])] =
            &[("Dockerfile", dockerfile.as_bytes()), ("busybox", &busybox)];
        let flags = [&["--secret", flag.as_str(), "-t", "leak"], flags].concat();
        let id = server.submit(files, &flags);
        let build = server.wait(&id);
        let failure = &build["failure"];
        assert_eq!(failure["kind"], "secret_leaked", "{build}");
        let message = failure["message"].as_str().unwrap();
        assert!(message.contains("\"key\"") && message.contains(place), "{message}");
        assert!(!build.to_string().contains(value), "{build}");
        assert_eq!(build["image_ref"], serde_json::Value::Null);
    };
    leaks("RUN --mount=type=secret,id=key cp /run/secrets/key /", &[], "file `key`");
    let packed =
        "RUN --mount=type=secret,id=key mkdir -p /etc; base64 </run/secrets/key >/etc/npmrc";
    leaks(packed, &[], "file `etc/npmrc`");
    let encoded = "RUN --mount=type=secret,id=key sed 's|/|%2f|; s|+|%2b|' /run/secrets/key >/url";
    leaks(encoded, &[], "file `url`");
    let digits = "RUN --mount=type=secret,id=key od -An -tx1 /run/secrets/key | tr -d ' \\n' >/hex";
    leaks(digits, &[], "file `hex`");
    // Of none is anything left on the server, staging and database included.
    let hex = hex::encode(value);
    let forms =
        [value, "aHVudGVyMi9jYW5hcnkrdmFsdW", &hex, "hunter2%2fcanary%2bvalue", "hunter2%2Fcanary"];
    let base = "PRETTY_NAME=\"Debian";
    let found = holders(&server.data(), &[&forms[..], &[base]].concat());
    // What is packed is looked through: so is the base image, a file of which is found.
    let published = |holder: &Holder| holder.packed && holder.text == base;
    assert!(!found.is_empty() && found.iter().all(published), "{found:?}");
    // The argument is the user's own, and kept with the build.
    let argument = format!("KEY={value}");
    for line in ["ENV TOKEN=$KEY", "LABEL token=$KEY"] {
        let flags = ["--build-arg", argument.as_str()];
        leaks(&format!("ARG KEY\n{line}"), &flags, "configuration");
    }
    // The registry has nothing of it.
    let creds = format!("any:{}", server.token);
    let image = format!("docker://{}/dev/leak:latest", server.address);
    let inspected = std::process::Command::new("skopeo")
        .args(["inspect", "--tls-verify=false", "--creds", &creds, &image])
        .output()
        .unwrap();
    assert!(!inspected.status.success());
    // Not even its name, where the base image has one.
    let repositories = server.data().join("registry/storage/docker/registry/v2/repositories");
    let of_tenant = |tenant: &str, name: &str| repositories.join(tenant).join(name).exists();
    assert!(of_tenant("base", "debian") && !of_tenant("dev", "leak"));
    let found = holders(&server.data().join("registry"), &forms);
    assert!(found.is_empty(), "{found:?}");
    server.stop();
}

#[test]
fn vm_a_secret_that_nobody_gave_fails_before_the_first_step() {
    let server = Server::start();
    let dockerfile = b"FROM scratch\nCOPY Dockerfile /\nRUN [\"/never\"]\n";
    let id = server.submit(&[("Dockerfile", dockerfile)], &["--secret", "id=nobodys"]);
    let build = server.wait(&id);
    assert_eq!(build["failure"]["kind"], "secret_missing", "{build}");
    let message = build["failure"]["message"].as_str().unwrap();
    assert!(message.contains("\"nobodys\"") && message.contains("kiln secret set"), "{message}");
    assert!(!text(server.run(&["logs", &id]).stdout).contains("STEP"));
    server.stop();
}

fn set(server: &Server, id: &str, value: &str) {
    let mut child = server.kiln(&["secret", "set", id]).stdin(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut child.stdin.take().unwrap(), value.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success());
    let listed = text(server.run(&["secret", "ls"]).stdout);
    assert!(listed.contains(id) && !listed.contains(value), "{listed}");
}
