//! Builds in real VMs, as a user sees them: the program `kiln`, a server, QEMU, a registry.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::{BASE, CPUS, Server, sha256, source, text};

/// Prints "up"; with an argument it then waits for ever. Static, so that a build FROM scratch can run
/// it: under emulation a build that pulls no base takes a fifth of the time.
const UP: &str = "
.globl _start
_start:
  movl $1, %eax           # write
  movl $1, %edi
  leaq up(%rip), %rsi
  movl $3, %edx
  syscall
  cmpq $1, (%rsp)
  jle end
wait:
  movl $34, %eax          # pause
  syscall
  jmp wait
end:
  movl $60, %eax          # exit
  xorl %edi, %edi
  syscall
.data
up: .ascii \"up\\n\"
";

/// A source whose one step prints "up" and ends, or waits.
fn up(server: &Server, wait: bool) -> String {
    up_as(server, wait, &[])
}

fn up_as(server: &Server, wait: bool, flags: &[&str]) -> String {
    let step = if wait { r#"["/up", "wait"]"# } else { r#"["/up"]"# };
    let dockerfile = format!("FROM scratch\nCOPY --chmod=755 up /up\nRUN {step}\n");
    let files: &[(&str, &[u8])] =
        &[("Dockerfile", dockerfile.as_bytes()), ("up", &assemble(UP, "--64", "elf_x86_64"))];
    server.submit(files, flags)
}

fn dockerfile(lines: &str) -> Vec<u8> {
    format!("FROM {BASE}\n{lines}\n").into_bytes()
}

#[test]
fn vm_a_multi_stage_build_is_published_under_its_digest() {
    let server = Server::start();
    let dockerfile = format!(
        "FROM {BASE} AS made\nARG WHO=nobody\nCOPY greeting.txt /in/\n\
         RUN sed s/WHO/$WHO/ /in/greeting.txt > /out.txt && echo made for $WHO\n\
         FROM scratch\nCOPY --from=made /out.txt /greeting.txt\nENV A=1\n"
    );
    let files: &[(&str, &[u8])] = &[
        ("Dockerfile", dockerfile.as_bytes()),
        ("greeting.txt", b"hello WHO\n"),
        ("web/yarn.lock", b"lock\n"),
    ];
    // As an archive: its digest is known here, too.
    let archive = archive(files);
    let args = ["build", "-", "--progress", "plain", "--cpus", CPUS, "-t", "team/hello:1"];
    let mut command = server.kiln(&args);
    command.args(["--build-arg", "WHO=world"]).stdin(archive.reopen().unwrap());
    let out = command.output().unwrap();
    let (stdout, stderr) = (text(out.stdout), text(out.stderr));
    assert!(out.status.success(), "{stderr}\n{}", server.log());
    assert!(stderr.contains("made for world"), "{stderr}");
    let image = stdout.strip_suffix('\n').unwrap();
    let (name, digest) = image.split_once('@').unwrap();
    assert_eq!(name, format!("{}/dev/team/hello", server.address));

    // The gateway confirms the digest, for the tag too.
    let creds = format!("any:{}", server.token);
    let inspected = skopeo(
        &["inspect", "--tls-verify=false", "--creds", &creds],
        &format!("docker://{name}:1"),
    );
    let inspected: serde_json::Value = serde_json::from_str(&inspected).unwrap();
    assert_eq!(inspected["Digest"], digest);
    assert!(inspected["Env"].as_array().unwrap().iter().any(|v| v == "A=1"), "{inspected}");
    // What the runtime's wrapper gives to steps is not in the image.
    assert!(!inspected.to_string().to_lowercase().contains("proxy"), "{inspected}");

    // The image holds what the first stage made.
    let copy = tempfile::tempdir().unwrap();
    let to = format!("dir:{}", copy.path().display());
    let from = format!("docker://{image}");
    skopeo(&["copy", "--src-tls-verify=false", "--src-creds", &creds, &from], &to);
    let layer = inspected["Layers"][0].as_str().unwrap().strip_prefix("sha256:").unwrap();
    let listed = Command::new("tar")
        .arg("-xzOf")
        .arg(copy.path().join(layer))
        .arg("greeting.txt")
        .output()
        .unwrap();
    assert_eq!(text(listed.stdout), "hello world\n");

    // What it pulled is recorded, and nobody else sees the build.
    let builds = server.run(&["ls", "--format", "json"]);
    let builds: serde_json::Value = serde_json::from_slice(&builds.stdout).unwrap();
    let build = &builds[0];
    assert_eq!(build["status"], "ready");
    let base = format!("docker://{}/base/debian:trixie", server.address);
    let of_base = ["inspect", "--tls-verify=false", "--creds", &creds, "--format", "{{.Digest}}"];
    let of_base = skopeo(&of_base, &base);
    assert_eq!(build["pulled"].as_array().unwrap().len(), 1, "{build}");
    assert_eq!(build["pulled"][0]["reference"], BASE);
    assert_eq!(build["pulled"][0]["digest"], of_base.trim());
    let provenance = &build["provenance"];
    assert!(provenance["request_hash"].as_str().unwrap().starts_with("sha256:"), "{provenance}");
    let digest_of = |file: &Path| format!("sha256:{}", sha256(&std::fs::read(file).unwrap()));
    assert_eq!(provenance["source_hash"], digest_of(archive.path()));
    assert_eq!(provenance["kernel_digest"], digest_of(&support::builder().join("kernel")));
    let bundle = std::fs::read(support::builder().join("index.json")).unwrap();
    let bundle: serde_json::Value = serde_json::from_slice(&bundle).unwrap();
    assert_eq!(provenance["builder_digest"], bundle["manifests"][0]["digest"]);
    // What the guest says is marked as such.
    assert!(provenance["engine_version"].as_str().unwrap().starts_with("buildah 1."));
    assert_eq!(
        provenance["lockfile_hashes"],
        serde_json::json!({"web/yarn.lock": format!("sha256:{}", sha256(b"lock\n"))})
    );
    let said = serde_json::json!(["engine_version", "lockfile_hashes"]);
    assert_eq!(provenance["reported_by_guest"], said);
    let other = server.new_token("other", "tenant");
    let hidden = server
        .kiln(&["show", build["id"].as_str().unwrap()])
        .env("KILN_TOKEN", other)
        .output()
        .unwrap();
    assert_eq!(hidden.status.code(), Some(1));
    server.stop();
}

#[test]
fn vm_a_failing_step_is_named_with_its_exit_code() {
    let server = Server::start();
    // The first step prints what buildah prints for a step, and for its end: it forges nothing.
    let dockerfile = dockerfile(
        "RUN echo 'STEP 9/9: RUN forged'; echo 'exit status 99'\nRUN echo before; exit 7",
    );
    let out = server.build(&[("Dockerfile", &dockerfile)], &[]);
    assert_eq!(out.status.code(), Some(1));
    assert!(out.stdout.is_empty());
    let stderr = text(out.stderr);
    assert!(stderr.contains("step 2") && stderr.contains("exit code 7"), "{stderr}");
    let id = newest(&server);
    let build = server.show(&id);
    assert_eq!(build["status"], "failed");
    assert_eq!(build["failure"]["kind"], "step_failed");
    assert_eq!((&build["failure"]["step"], &build["failure"]["exit_code"]), (&2.into(), &7.into()));

    // A Dockerfile that is not there is found by the build.
    let missing = server.build(&[("other", b"x")], &[]);
    assert_eq!(missing.status.code(), Some(1));
    assert_eq!(server.show(&newest(&server))["failure"]["kind"], "dockerfile_missing");

    // So is a base that does not exist.
    let pull = format!("FROM {}\n", BASE.replace("trixie", "nothing"));
    server.build(&[("Dockerfile", pull.as_bytes())], &[]);
    let build = server.show(&newest(&server));
    assert_eq!(build["failure"]["kind"], "pull_failed", "{build}");
    server.stop();
}

#[test]
fn vm_ten_builds_at_once_run_two_at_a_time() {
    let server = Server::start();
    let ids: Vec<_> = (0..10).map(|_| up(&server, false)).collect();
    for id in &ids {
        let mut follow = server.follow(id);
        assert!(follow.until("up"), "{}", follow.seen);
        let vms = server.processes("qemu-system-x86_64").len();
        assert!(vms <= 2, "{vms} VMs at one time");
        follow.drain();
        let build = server.show(id);
        assert_eq!(build["status"], "ready", "{build}\n{}", server.log());
    }
    // By the times of the builds themselves, never more than two overlapped.
    let mut edges = Vec::new();
    for id in &ids {
        let build = server.show(id);
        edges.push((build["started_at"].as_str().unwrap().to_owned(), 1));
        edges.push((build["completed_at"].as_str().unwrap().to_owned(), -1));
    }
    edges.sort();
    let mut running = 0;
    for (_, edge) in edges {
        running += edge;
        assert!(running <= 2, "{running} builds at one time");
    }
    server.stop();
}

#[test]
fn vm_a_running_build_shows_its_log_and_is_cancelled_in_time() {
    let server = Server::start();
    let id = up(&server, true);
    let mut follow = server.follow(&id);
    assert!(follow.until("up"), "{}", follow.seen);
    assert_eq!(server.show(&id)["status"], "building");
    let begun = Instant::now();
    let cancelled = server.run(&["cancel", &id]);
    let took = begun.elapsed();
    assert!(cancelled.status.success(), "{}", text(cancelled.stderr));
    assert!(took < Duration::from_secs(2), "the cancel took {took:?}");
    assert_eq!(server.show(&id)["status"], "cancelled");
    assert!(server.processes("qemu-system-x86_64").is_empty());
    assert!(server.processes("vhost-device-vsock").is_empty());
    follow.drain();
    // A finished build stays as it is.
    assert_eq!(server.run(&["cancel", &id]).status.code(), Some(1));
    assert_eq!(server.show(&id)["status"], "cancelled");
    server.stop();
}

#[test]
fn vm_a_build_whose_vm_is_killed_fails_as_vm_lost() {
    let server = Server::start();
    let id = up(&server, true);
    let mut follow = server.follow(&id);
    assert!(follow.until("up"), "{}", follow.seen);
    let qemu = server.processes("qemu-system-x86_64");
    assert_eq!(qemu.len(), 1);
    let begun = Instant::now();
    kill(Pid::from_raw(qemu[0]), Signal::SIGKILL).unwrap();
    follow.drain();
    let took = begun.elapsed();
    let build = server.show(&id);
    assert_eq!(build["failure"]["kind"], "vm_lost", "{build}");
    assert!(took < Duration::from_secs(5), "noticed after {took:?}");
    server.stop();
}

/// Tries to open AF_VSOCK by every way that a step has: natively, with a family whose upper half
/// the kernel ignores, and from 32-bit code by `socketcall` and by `socket`.
const PROBE: &str = r#"
use Socket; use strict;
sub try { my ($what, $got) = @_; print "$what: ", ($got ? "OPEN" : "refused"), "\n"; }
try("vsock", socket(my $v, 40, 1, 0));
try("vsock-wide", syscall(41, 0x100000028, 1, 0) >= 0);
try("vsock-32", system("/probe32") == 0);
my $params = pack("x120");
try("io_uring", syscall(425, 1, $params) >= 0);
for my $port (5000, 5001, 22) {
  socket(my $s, PF_INET, SOCK_STREAM, 0) or die "no inet: $!";
  try("port-$port", connect($s, sockaddr_in($port, inet_aton("127.0.0.1"))));
}
socket(my $p, PF_INET, SOCK_STREAM, 0);
try("proxy-port", connect($p, sockaddr_in(3128, inet_aton("127.0.0.1"))));
print "capsys: ", (grep { /^CapEff/ } do { open my $f, "<", "/proc/self/status"; <$f> })[0];
"#;

/// Exits 0 when a 32-bit program gets an AF_VSOCK socket, by `int 0x80`.
const PROBE_32: &str = "
.globl _start
_start:
  movl $359, %eax        # socket
  movl $40, %ebx
  movl $1, %ecx
  xorl %edx, %edx
  int $0x80
  testl %eax, %eax
  jns open
  movl $102, %eax        # socketcall(SYS_SOCKET, args)
  movl $1, %ebx
  movl $args, %ecx
  int $0x80
  testl %eax, %eax
  jns open
  movl $1, %ebx
  jmp end
open:
  xorl %ebx, %ebx
end:
  movl $1, %eax          # exit
  int $0x80
.data
args: .long 40, 1, 0
";

#[test]
fn vm_a_step_reaches_neither_vsock_nor_the_registry_nor_the_host() {
    let server = Server::start();
    let probe32 = assemble(PROBE_32, "--32", "elf_i386");
    let dockerfile = dockerfile(
        "COPY probe.pl /\nCOPY --chmod=755 probe32 /\nRUN perl /probe.pl\nRUN env | sort\n\
         RUN apt-get -o Acquire::Retries=0 -o Acquire::http::Timeout=5 update 2>&1 | head -5; \
         perl -MIO::Socket::INET -e '$s = IO::Socket::INET->new(PeerAddr => \"127.0.0.1:3128\") or die; \
         print $s \"CONNECT 127.0.0.1:4973 HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n\"; print \"proxy says \", scalar <$s>'",
    );
    let files: &[(&str, &[u8])] =
        &[("Dockerfile", &dockerfile), ("probe.pl", PROBE.as_bytes()), ("probe32", &probe32)];
    let out = server.build(files, &["--network", "open"]);
    let log = text(out.stderr);
    assert!(out.status.success(), "{log}");
    for refused in ["vsock", "vsock-wide", "vsock-32", "io_uring", "port-5000", "port-5001"] {
        assert!(log.contains(&format!("{refused}: refused")), "{refused}:\n{log}");
    }
    assert!(log.contains("proxy-port: OPEN"), "{log}");
    assert!(log.contains("http_proxy=http://127.0.0.1:3128"), "{log}");
    assert!(log.contains("proxy says HTTP/1.1 403"), "{log}");

    let out = server.build(files, &["--network", "none"]);
    let log = text(out.stderr);
    assert!(log.contains("proxy-port: refused"), "{log}");
    assert!(!log.contains("http_proxy="), "{log}");
    server.stop();
}

#[test]
fn vm_the_server_ends_its_builds_when_it_is_stopped() {
    let server = Server::start();
    let id = up(&server, true);
    let mut follow = server.follow(&id);
    assert!(follow.until("up"), "{}", follow.seen);
    let vm = server.processes("qemu-system-x86_64");
    assert_eq!(vm.len(), 1);
    server.stop();
    assert!(support::name_of(vm[0]).is_none());
}

#[test]
fn vm_a_publication_that_was_cut_off_is_finished_by_the_next_server() {
    let server = Server::start();
    let registry = server.processes("docker-registry");
    assert_eq!(registry.len(), 1);
    let id = up_as(&server, false, &["-t", "cut:off"]);
    assert!(server.follow(&id).until("up"));
    // It takes the image's bytes and answers nothing: the publication is recorded and cannot end.
    kill(Pid::from_raw(registry[0]), Signal::SIGSTOP).unwrap();
    until("the publication begins", || server.log().contains("publishing digest="));
    let cancelled = server.run(&["cancel", &id]);
    assert_eq!(cancelled.status.code(), Some(1), "{}", text(cancelled.stderr));
    assert_eq!(server.show(&id)["status"], "pushing", "a publication is not taken back");

    let server = server.kill_and_restart();
    let build = server.wait(&id);
    assert_eq!(build["status"], "ready", "{build}\n{}", server.log());
    let creds = format!("any:{}", server.token);
    let inspected = skopeo(
        &["inspect", "--tls-verify=false", "--creds", &creds],
        &format!("docker://{}/dev/cut:off", server.address),
    );
    let inspected: serde_json::Value = serde_json::from_str(&inspected).unwrap();
    let image = build["image_ref"].as_str().unwrap();
    assert!(image.ends_with(inspected["Digest"].as_str().unwrap()), "{image} {inspected}");
    server.stop();
}

#[test]
fn vm_a_machine_that_hangs_before_it_begins_is_replaced() {
    let server = Server::start();
    let id = up(&server, false);
    until("the VM's process runs", || !server.processes("qemu-system-x86_64").is_empty());
    let hung = server.processes("qemu-system-x86_64")[0];
    kill(Pid::from_raw(hung), Signal::SIGSTOP).unwrap();
    let build = server.wait(&id);
    assert_eq!(build["status"], "ready", "{build}\n{}", server.log());
    assert!(server.log().contains("a VM did not begin; trying another"), "{}", server.log());
    assert!(support::name_of(hung).is_none(), "the VM that hung is still there");
    server.stop();
}

/// Waits for what nobody announces.
fn until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < Duration::from_mins(2), "{what}: not within two minutes");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn vm_a_base_is_what_its_pin_says() {
    let server = Server::start();
    let creds = format!("any:{}", server.token);
    let base = format!("docker://{}/base/debian:trixie", server.address);
    let inspect = ["inspect", "--tls-verify=false", "--creds", &creds, "--format", "{{.Digest}}"];
    let digest = skopeo(&inspect, &base).trim().to_owned();
    let dockerfile = format!("FROM scratch AS unused\nFROM {BASE} AS one\nFROM one\nENV A=1\n");
    let pinned = |digest: &str| server.post(&dockerfile, &[("base_image_digest", digest)]);

    let other = format!("sha256:{}", "0".repeat(64));
    let (good, bad) = (pinned(&digest), pinned(&other));
    let build = server.wait(&good);
    assert_eq!(build["status"], "ready", "{build}");
    assert_eq!(build["provenance"]["base_image_digest"], digest.as_str());
    let pulled = build["pulled"].as_array().unwrap();
    assert!(pulled.iter().any(|pulled| pulled["digest"] == digest.as_str()), "{build}");

    let build = server.wait(&bad);
    assert_eq!(build["failure"]["kind"], "base_digest_mismatch", "{build}");
    assert!(build["error"].as_str().unwrap().contains(&other), "{build}");
    server.stop();
}

/// An archive of 130 KB whose decompression needs a GiB: no step's limit holds for it, for the engine unpacks it
/// itself. With 512 MiB it is refused the memory, with 1,100 the kernel kills it.
#[test]
fn vm_an_engine_without_memory_is_named() {
    let server = Server::start();
    let dir = tempfile::tempdir().unwrap();
    let made = Command::new("sh")
        .args(["-ec", "truncate -s 900M zeros; tar -c zeros | xz -T1 --lzma2=preset=0,dict=1GiB"])
        .current_dir(dir.path())
        .output()
        .unwrap();
    assert!(made.status.success(), "{}", text(made.stderr));
    let files: &[(&str, &[u8])] =
        &[("Dockerfile", b"FROM scratch\nADD zeros.tar.xz /\n"), ("zeros.tar.xz", &made.stdout)];
    let submit = |memory| server.submit(files, &["--memory", memory]);
    for id in ["512", "1100"].map(submit) {
        let build = server.wait(&id);
        let failure = &build["failure"];
        assert_eq!(failure["kind"], "out_of_memory", "{failure}\n{}", logs(&server, &id));
        let message =
            "the build engine ran out of memory at ADD zeros.tar.xz /: ask for more with memory_mb";
        assert_eq!(failure["message"], message, "{}", logs(&server, &id));
    }
    server.stop();
}

/// A base's own instructions are not looked at before they run, and buildah breaks down on this one.
#[test]
fn vm_an_engine_that_crashes_is_named() {
    let server = Server::start();
    let base = b"FROM scratch\nCOPY Dockerfile /\nONBUILD COPY --from=9 /Dockerfile /\n";
    let out = server.build(&[("Dockerfile", base)], &["-t", "trap"]);
    assert!(out.status.success(), "{}", text(out.stderr));
    let id = server.submit(&[("Dockerfile", b"FROM registry.kiln/dev/trap\n")], &[]);
    let build = server.wait(&id);
    let failure = &build["failure"];
    assert_eq!(failure["kind"], "engine_crashed", "{failure}\n{}", logs(&server, &id));
    let message = failure["message"].as_str().unwrap();
    assert!(message.starts_with("the build engine crashed: panic: "), "{message}");
    assert!(!logs(&server, &id).contains("goroutine"), "{}", logs(&server, &id));
    server.stop();
}

/// A source of these files, packed.
fn archive(files: &[(&str, &[u8])]) -> tempfile::NamedTempFile {
    let (source, archive) = (source(files), tempfile::NamedTempFile::new().unwrap());
    let mut tar = Command::new("tar");
    tar.arg("-C").arg(source.path()).arg("-cf").arg(archive.path()).arg(".");
    assert!(tar.status().unwrap().success());
    archive
}

fn logs(server: &Server, id: &str) -> String {
    text(server.run(&["logs", id]).stdout)
}

fn newest(server: &Server) -> String {
    let out = server.run(&["ls", "--limit", "1", "--format", "json"]);
    let builds: serde_json::Value = serde_json::from_slice(&out.stdout).unwrap();
    builds[0]["id"].as_str().unwrap().to_owned()
}

fn skopeo(args: &[&str], last: &str) -> String {
    let out = Command::new("skopeo").args(args).arg(last).stdin(Stdio::null()).output().unwrap();
    assert!(out.status.success(), "{}", text(out.stderr));
    text(out.stdout)
}

/// A static program.
fn assemble(source_text: &str, bits: &str, emulation: &str) -> Vec<u8> {
    let dir = source(&[("probe.s", source_text.as_bytes())]);
    let (object, program) = (dir.path().join("probe.o"), dir.path().join("probe"));
    let assembled = Command::new("as")
        .arg(bits)
        .arg(dir.path().join("probe.s"))
        .arg("-o")
        .arg(&object)
        .status();
    assert!(assembled.unwrap().success());
    let linked =
        Command::new("ld").args(["-m", emulation]).arg(&object).arg("-o").arg(&program).status();
    assert!(linked.unwrap().success());
    std::fs::read(program).unwrap()
}
