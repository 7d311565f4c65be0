//! Causes of failure that are not in what a user sends: a registry that takes nothing, a builder image whose agent is
//! of another Kiln, or of none. The other causes are where they come about: `corpus`, `vm_builds`, `vm_logs`, `vm_secrets`, `vm_sources`.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use kiln_image::bundle::{self, Bundle, FileInfo};
use kiln_image::initrd;
use kiln_protocol::event::{Failure, FailureKind, Outcome};
use kiln_protocol::frame;
use kiln_protocol::hello::{Hello, MAGIC};
use kiln_protocol::message::AgentToHost;
use kiln_protocol::version::{Features, SUPPORTED, Version, VersionRange};
use support::{Server, text};

const DOCKERFILE: &[u8] = b"FROM scratch\nCOPY Dockerfile /\n";

#[test]
fn vm_an_image_that_the_registry_does_not_take_is_not_published() {
    let server = Server::start();
    // It makes the tenant's directory at the first push.
    let place = server.data().join("registry/storage/docker/registry/v2/repositories/dev");
    std::fs::write(&place, "in the way").unwrap();
    let submit = || server.submit(&[("Dockerfile", DOCKERFILE)], &["-t", "app:1"]);
    let build = server.wait(&submit());
    let failure = &build["failure"];
    assert_eq!(
        (&build["status"], &failure["kind"]),
        (&"failed".into(), &"push_failed".into()),
        "{build}"
    );
    let message = failure["message"].as_str().unwrap();
    assert!(message.contains("the registry"), "{message}");
    assert!(build["image_ref"].is_null() && build["image_digest"].is_null(), "{build}");
    let left: Vec<_> = std::fs::read_dir(server.data().join("builds")).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");

    // Once the registry can, nothing of it has come there late; and the same is published.
    std::fs::remove_file(&place).unwrap();
    assert!(!is_published(&server));
    let build = server.wait(&submit());
    assert_eq!(build["status"], "ready", "{build}\n{}", server.log());
    assert!(is_published(&server));
    server.stop();
}

fn is_published(server: &Server) -> bool {
    let out = Command::new("skopeo")
        .args(["inspect", "--tls-verify=false", "--creds", &format!("any:{}", server.token)])
        .arg(format!("docker://{}/dev/app:1", server.address))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let why = text(out.stderr);
    assert!(out.status.success() || why.contains("unknown"), "{why}");
    out.status.success()
}

#[test]
fn vm_an_agent_of_another_kiln_is_a_protocol_mismatch() {
    let hello = |magic, versions| Hello {
        magic,
        versions,
        features: Features::NONE,
        agent: "kiln-agent 99.0.0".into(),
        image: String::new(),
        resume: None,
    };
    let later = VersionRange { min: Version(98), max: Version(99) };
    let message = format!(
        "the agent (kiln-agent 99.0.0) speaks v98 to v99 and this host speaks {SUPPORTED}: rebuild the builder image \
         with this release's kiln-image"
    );
    failed(&hello(MAGIC, later), None, "protocol_mismatch", &message);
    let broke = "the VM's agent broke the protocol: ";
    failed(&hello(*b"NLIK", SUPPORTED), None, "protocol_mismatch", broke);
}

/// What only the host can know is not believed of a guest, and blames nobody else.
#[test]
fn vm_a_cause_that_a_guest_cannot_know_is_internal() {
    let hello = Hello {
        magic: MAGIC,
        versions: SUPPORTED,
        features: Features::NONE,
        agent: "kiln-agent of a liar".into(),
        image: String::new(),
        resume: None,
    };
    let outcome = AgentToHost::Outcome(Outcome::Failed(Failure {
        kind: FailureKind::VmLost,
        message: "the host lost me".into(),
        step: None,
        exit_code: None,
        detail: None,
    }));
    failed(&hello, Some(&outcome), "internal", "the host lost me");
}

/// What becomes of a build whose builder image says that it fits, and whose agent says this, and once it is answered
/// that.
fn failed(hello: &Hello, then: Option<&AgentToHost>, kind: &str, says: &str) {
    let dir = tempfile::tempdir().unwrap();
    let then = then.map_or_else(Vec::new, |then| frame::encode(then).unwrap());
    bundle_of(dir.path(), &init(&frame::encode(hello).unwrap(), &then));
    let server = Server::start_of(dir.path());
    let build = server.wait(&server.submit(&[("Dockerfile", DOCKERFILE)], &[]));
    let failure = &build["failure"];
    assert_eq!(failure["kind"], kind, "{build}\n{}", server.log());
    let message = failure["message"].as_str().unwrap();
    assert!(message.starts_with(says), "{message}");
    server.stop();
}

/// The builder image with another program as its agent.
fn bundle_of(dir: &Path, init: &[u8]) {
    let real = Bundle::open(&support::builder()).unwrap();
    for (file, name) in [(&real.kernel, "kernel"), (&real.root, "root.erofs")] {
        std::fs::copy(file, dir.join(name)).unwrap();
    }
    let modules = initrd::read_modules(&real.initrd).unwrap();
    let file = dir.join("initrd");
    initrd::write(File::create(&file).unwrap(), init, &modules, &real.manifest.identity).unwrap();
    let mut manifest = real.manifest;
    manifest.files.initrd = FileInfo::of(&file).unwrap();
    bundle::write(dir, &manifest).unwrap();
}

/// Loads the modules, says its Hello until one arrives, and then the rest; waits for whatever becomes of it.
const INIT: &str = r#"
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>
#include <linux/vm_sockets.h>

static const unsigned char hello[] = { HELLO };
static const unsigned char then[] = { THEN };

int main(void) {
    struct dirent **modules;
    int count = scandir("/lib/kiln/modules", &modules, NULL, alphasort);
    int dir = open("/lib/kiln/modules", O_DIRECTORY);
    for (int i = 0; i < count; i++)
        syscall(SYS_finit_module, openat(dir, modules[i]->d_name, O_RDONLY), "", 0);
    for (;;) {
        struct sockaddr_vm host = { .svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = CONTROL };
        int line = socket(AF_VSOCK, SOCK_STREAM, 0);
        char answer;
        if (connect(line, (struct sockaddr *)&host, sizeof host) == 0
            && write(line, hello, sizeof hello) == sizeof hello
            && read(line, &answer, 1) == 1
            && write(line, then, sizeof then) == sizeof then)
            while (read(line, &answer, 1) > 0) {}
        close(line);
        usleep(10000);
    }
}
"#;

fn init(hello: &[u8], then: &[u8]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let (source, program) = (dir.path().join("init.c"), dir.path().join("init"));
    let list = |bytes: &[u8]| bytes.iter().map(u8::to_string).collect::<Vec<_>>().join(",");
    let text = INIT
        .replace("HELLO", &list(hello))
        .replace("THEN", &list(then))
        .replace("CONTROL", &kiln_protocol::port::CONTROL.to_string());
    std::fs::write(&source, text).unwrap();
    let mut gcc = Command::new("gcc");
    gcc.args(["-static", "-O1", "-Wall", "-o"]).arg(&program).arg(&source);
    assert!(gcc.status().unwrap().success());
    std::fs::read(&program).unwrap()
}
