//! Canary secrets: builds use and print them, the server is killed and stopped, and then the whole disk that it had is
//! searched, block by block, with what was deleted.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::io::Write as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use support::image::Image;
use support::{Server, text};

const OWN: &str = "canary/own+7f3e9a1c5b2d";
const TENANTS: &str = "canary/tenant+4c8b1e6f0d3a";
/// No secret: a step writes it to a file and removes that; the Dockerfile has it in capitals.
const SCRATCH: &str = "written to a scratch disk only";

/// Every form of both in one write, and in two with a pause between.
const USES_THEM: &str = r#"FROM scratch
COPY --chmod=755 busybox /bin/busybox
SHELL ["/bin/busybox", "sh", "-ec"]
RUN ["/bin/busybox", "--install", "-s", "/bin"]
RUN --mount=type=secret,id=own,env=OWN --mount=type=secret,id=tenants for value in "$OWN" "$(cat /run/secrets/tenants)"; do \
    echo "<$value>"; printf "%s" "$value" | head -c 9; sleep 1; echo "${value#canary/??}"; \
    for before in "" x xy; do echo "$before$value" | base64; done; \
    printf %s "$value" | od -An -tx1 | tr -d " \n"; echo; printf %s "$value" | od -An -tx1 | tr -d " \n" | tr a-f A-F; echo; \
    printf %s "$value" | sed "s|/|%2F|; s|+|%2B|"; echo; done; \
    cat /run/secrets/tenants | sha256sum >/sum; echo "@SCRATCH@" | tr A-Z a-z >/gone; sync; sleep 1; rm /gone
LABEL used=yes
"#;
const PRINTS_ITS_LAST: &str = r#"FROM scratch
COPY --chmod=755 busybox /bin/busybox
SHELL ["/bin/busybox", "sh", "-ec"]
RUN --mount=type=secret,id=own /bin/busybox cat /run/secrets/own >&2; exit 3
"#;
const SLEEPS: &str = r#"FROM scratch
COPY --chmod=755 busybox /bin/busybox
RUN --mount=type=secret,id=own ["/bin/busybox", "sleep", "600"]
"#;

#[test]
fn vm_no_block_of_the_disk_holds_a_canary() {
    let disk = Disk::new();
    let server = Server::start_in(&disk.mounted, &["--max-vms", "1"]);
    let busybox = std::fs::read("/bin/busybox").unwrap();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("own"), OWN).unwrap();
    let own = format!("id=own,src={}", dir.path().join("own").display());
    keep(&server, "tenants", TENANTS);
    let submit = |server: &Server, dockerfile: &str, flags: &[&str]| {
        let files: &[(&str, &[u8])] =
            &[("Dockerfile", dockerfile.as_bytes()), ("busybox", &busybox)];
        server.submit(files, &[&["--secret", &own], flags].concat())
    };

    let syncing = disk.keep_synced();
    // A server is killed while one build has its secret in a step and another one's waits.
    let sleeping = submit(&server, SLEEPS, &[]);
    let uses_them = USES_THEM.replace("@SCRATCH@", &SCRATCH.to_uppercase());
    let queued = submit(&server, &uses_them, &["--secret", "id=tenants", "-t", "canary"]);
    assert!(server.follow(&sleeping).until("sleep"), "{}", server.log());
    let server = server.kill_and_restart();
    let _ = server.run(&["cancel", &sleeping]);
    let built = server.wait(&queued);
    let log = text(server.run(&["logs", &queued]).stdout);
    assert_eq!(built["status"], "ready", "{built}\n{log}");
    assert!(log.contains("<***>"), "{log}");
    let failed = server.wait(&submit(&server, PRINTS_ITS_LAST, &[]));
    assert_eq!(failed["failure"]["detail"], "***", "{failed}");

    // What users see of it.
    let image = Image::copy(&server, built["image_ref"].as_str().unwrap());
    let shown = [built.to_string(), failed.to_string(), log, server.log()].concat();
    for form in forms() {
        assert!(!image.holds(form.as_bytes()), "{form} is in the image");
        assert!(!shown.contains(&form), "{form} in:\n{shown}");
    }

    server.stop();
    drop(syncing);
    let blocks = disk.unmount();
    assert!(blocks.hold(&queued), "the search finds nothing at all");
    assert!(blocks.hold(SCRATCH), "what was on a scratch disk never came to the host's");
    for form in forms() {
        assert!(!blocks.hold(&form), "{form} is on the disk");
    }
}

/// As docs/SECRETS.md lists them, made by other means than Kiln's.
fn forms() -> Vec<String> {
    let encode = |value: &str| {
        let hex: String = value.bytes().map(|byte| format!("{byte:02x}")).collect();
        let mut forms = vec![
            value.to_owned(),
            // Most of the value, as halves would leave it.
            value[9..].to_owned(),
            hex.to_uppercase(),
            hex,
            value.replace('/', "%2F").replace('+', "%2B"),
        ];
        // What neither the bytes before it nor those behind it have a part in.
        forms.extend(["", "x", "xy"].map(|before| {
            let digits = STANDARD.encode(format!("{before}{value}"));
            digits[4..digits.len() - 4].to_owned()
        }));
        forms
    };
    [OWN, TENANTS].into_iter().flat_map(encode).collect()
}

fn keep(server: &Server, id: &str, value: &str) {
    let mut set = server.kiln(&["secret", "set", id]).stdin(Stdio::piped()).spawn().unwrap();
    set.stdin.take().unwrap().write_all(value.as_bytes()).unwrap();
    assert!(set.wait().unwrap().success());
}

/// A file system in a file.
struct Disk {
    dir: tempfile::TempDir,
    mounted: PathBuf,
}

impl Disk {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (file, mounted) = (dir.path().join("disk"), dir.path().join("mounted"));
        std::fs::File::create(&file).unwrap().set_len(8 << 30).unwrap();
        std::fs::create_dir(&mounted).unwrap();
        run(Command::new("mkfs.ext4").arg("-q").arg(&file));
        run(Command::new("mount").args(["-o", "loop"]).arg(&file).arg(&mounted));
        Self { dir, mounted }
    }

    /// What is deleted soon would never come to the disk by itself. Until the value is dropped.
    fn keep_synced(&self) -> Syncing {
        let mounted = std::fs::File::open(&self.mounted).unwrap();
        let (stop, stopped) = mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            while stopped.recv_timeout(Duration::from_millis(100)) == Err(RecvTimeoutError::Timeout)
            {
                nix::unistd::syncfs(&mounted).unwrap();
            }
        });
        Syncing { stop: Some(stop), thread: Some(thread) }
    }

    fn unmount(self) -> Blocks {
        run(Command::new("umount").arg(&self.mounted));
        Blocks(self)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // After a failure; otherwise it is no longer mounted.
        let mut umount = Command::new("umount");
        let _ = umount.arg("--lazy").arg(&self.mounted).stderr(Stdio::null()).status();
    }
}

struct Syncing {
    stop: Option<mpsc::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Syncing {
    fn drop(&mut self) {
        self.stop = None;
        self.thread.take().unwrap().join().unwrap();
    }
}

struct Blocks(Disk);

impl Blocks {
    /// Whether a text is anywhere. Zeros end what `grep` takes for a line.
    fn hold(&self, text: &str) -> bool {
        let mut grep = Command::new("grep");
        grep.args(["-q", "-a", "-z", "-F", "-e", text]).env("LC_ALL", "C");
        let status = grep.arg(self.0.dir.path().join("disk")).status().unwrap();
        assert!(matches!(status.code(), Some(0 | 1)), "{status}");
        status.success()
    }
}

fn run(command: &mut Command) {
    assert!(command.status().unwrap().success(), "{command:?}");
}
