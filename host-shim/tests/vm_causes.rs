//! Causes of failure that are not in what a user sends: a registry that takes nothing, a builder image whose agent is
//! of another Kiln. The other causes are where they come about: `corpus`, `vm_builds`, `vm_logs`, `vm_secrets`, `vm_sources`.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

use kiln_image::bundle::{self, Bundle, FileInfo};
use kiln_image::initrd;
use kiln_protocol::frame;
use kiln_protocol::hello::{Hello, MAGIC};
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
    refused(&hello(MAGIC, later), &message);
    refused(&hello(*b"NLIK", SUPPORTED), "the VM's agent broke the protocol: ");
}

/// A builder image that says it fits, and whose agent says this.
fn refused(hello: &Hello, says: &str) {
    let dir = tempfile::tempdir().unwrap();
    bundle_of(dir.path(), &init(&frame::encode(hello).unwrap()));
    let server = Server::start_of(dir.path());
    let build = server.wait(&server.submit(&[("Dockerfile", DOCKERFILE)], &[]));
    let failure = &build["failure"];
    assert_eq!(failure["kind"], "protocol_mismatch", "{build}\n{}", server.log());
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

/// Loads the modules, says its Hello until one arrives, and waits for whatever becomes of it.
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
            && write(line, hello, sizeof hello) == sizeof hello)
            while (read(line, &answer, 1) > 0) {}
        close(line);
        usleep(10000);
    }
}
"#;

fn init(hello: &[u8]) -> Vec<u8> {
    let dir = tempfile::tempdir().unwrap();
    let (source, program) = (dir.path().join("init.c"), dir.path().join("init"));
    let bytes: Vec<_> = hello.iter().map(u8::to_string).collect();
    let text = INIT
        .replace("HELLO", &bytes.join(","))
        .replace("CONTROL", &kiln_protocol::port::CONTROL.to_string());
    std::fs::write(&source, text).unwrap();
    let mut gcc = Command::new("gcc");
    gcc.args(["-static", "-O1", "-Wall", "-o"]).arg(&program).arg(&source);
    assert!(gcc.status().unwrap().success());
    std::fs::read(&program).unwrap()
}
