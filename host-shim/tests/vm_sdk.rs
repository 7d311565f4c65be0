//! hypeman's official SDKs as they are published, against a real `kiln serve` with real VMs. What they do and expect is in
//! `tests/sdk/`, a program in each one's language; `scripts/test` installs them, at the versions that are pinned there.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use support::{Server, source};

/// Of every archive that they send. The image is what their instance runs.
const DOCKERFILE: &[u8] = br#"FROM scratch
COPY --chmod=755 busybox /bin/busybox
RUN ["/bin/busybox", "echo", "built by a step"]
CMD ["/bin/busybox", "sh", "-c", "echo $GREETING; exec /bin/busybox sleep 100000"]
"#;

/// What both of them get to: one line for each.
const CHECKS: usize = 7;

#[test]
fn vm_sdk_python_works_unchanged() {
    let python = installed("sdk-python/bin/python");
    works(Command::new(python).arg(client("client.py")));
}

#[test]
fn vm_sdk_node_works_unchanged() {
    // A program's packages are looked for beside it.
    let place = tempfile::tempdir().unwrap();
    let packages = installed("sdk-node/node_modules");
    std::os::unix::fs::symlink(packages, place.path().join("node_modules")).unwrap();
    let program = place.path().join("client.mjs");
    std::fs::copy(client("client.mjs"), &program).unwrap();
    works(Command::new("node").arg(program));
}

fn works(client: &mut Command) {
    // Nothing is built on a base.
    let server = Server::start_of(&support::builder());
    let busybox = std::fs::read("/bin/busybox").unwrap();
    let files = source(&[("Dockerfile", DOCKERFILE), ("busybox", &busybox)]);
    let archive = files.path().join("source.tar.gz");
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(files.path()).arg("-czf").arg(&archive).args(["Dockerfile", "busybox"]);
    assert!(tar.status().unwrap().success());
    let mut client = client
        .arg(&archive)
        .env("HYPEMAN_BASE_URL", format!("http://{}", server.address))
        .env("HYPEMAN_API_KEY", server.new_token("dev", "tenant"))
        .env("NO_PROXY", "127.0.0.1")
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut checks = 0;
    for line in BufReader::new(client.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        println!("{line}");
        checks += usize::from(line.starts_with("OK "));
    }
    assert!(client.wait().unwrap().success(), "after {checks} checks");
    assert_eq!(checks, CHECKS);
    server.stop();
}

fn client(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sdk").join(name)
}

fn installed(name: &str) -> PathBuf {
    let path = support::tools().join(name);
    assert!(path.exists(), "{} is missing: run scripts/test", path.display());
    std::path::absolute(path).unwrap()
}
