//! What broke other builders, tried in real VMs: whatever a step or a Dockerfile does, nothing outside of its own root file system
//! differs afterwards, neither in the VM nor on the host.
//!
//! Each build waits first, so that it can be looked at from outside, then attacks, then waits again.

#![allow(clippy::unwrap_used, missing_docs)]

#[path = "support/archive.rs"]
mod archive;
mod support;

use std::collections::BTreeSet;
use std::path::Path;

use archive::Tar;
use serde_json::{Value, json};
use support::{BASE, Server, text};

/// What an attack leaves where it comes to.
const MARK: &str = "pwned-by-a-step";

/// Waits for a file that `kiln exec` makes: the first step and the last.
fn waits(name: &str) -> String {
    format!("RUN echo \"waits for {name}\"; until [ -e /{name} ]; do sleep 0.1; done\n")
}

/// All that is outside of the step, seen from the VM itself: every file of its root and of the agent's places with its kind, owner, mode,
/// size, changes and target, what the kernel can be told to run, and every process. The engine's storage is where steps are.
const SURVEY: &str = "
    find / -xdev -path /var/lib/containers -prune -o -path /proc -prune -o -printf '%p %y %m %U:%G %s %T@ %C@ %l\\n'
    find /run/kiln /dev -xdev ! -path '/dev/pts/*' -printf '%p %y %m %U:%G %l\\n' | sed 's/buildah-buildah[0-9]*/STEP/'
    head -n 1 /proc/sys/kernel/core_pattern /proc/sys/kernel/modprobe /proc/sys/kernel/hostname /proc/sys/vm/overcommit_memory
    cat /etc/passwd /etc/shadow /etc/ld.so.preload 2>/dev/null | sha256sum";

/// An attack: a Dockerfile between the two waits.
struct Attack {
    name: &'static str,
    steps: String,
    /// Whether its step cannot even start, which ends the build and its VM; otherwise it does to the step's own root what it wanted to do to another.
    refused: bool,
}

fn attacks() -> [Attack; 2] {
    let contained = [
        // runc's CVE-2025-31133, 52565 and 52881: devices and masked files that are links, and the kernel's own files.
        "RUN rm -f /dev/null; ln -sf /proc/sys/kernel/core_pattern /dev/null; ln -sf /proc/sysrq-trigger /dev/console; true\n".into(),
        format!("RUN for file in /proc/sys/kernel/core_pattern /proc/sys/kernel/modprobe /proc/sys/kernel/hostname \
                 /sys/kernel/uevent_helper /proc/sysrq-trigger /dev/kmsg /dev/vda /dev/vdb /dev/mem; do \
                 if [ -e $file ] && echo '|/{MARK}' 2>/dev/null >$file; then echo \"WROTE $file\"; fi; done; true\n"),
        // A source, a destination and a mount that a link leads out (buildah's CVE-2024-1753 and CVE-2024-11218, kaniko's CVE-2026-28406,
        // moby's CVE-2026-17106, umoci's CVE-2021-29136).
        format!("RUN --mount=type=bind,from=evil,source=/out,target=/mnt,rw touch /mnt/{MARK} /mnt/etc/{MARK} /mnt/run/{MARK}\n"),
        "RUN mkdir /to && ln -s / /to/out && ln -s ../../../../../.. /to/up\n".into(),
        format!("COPY Dockerfile /to/out/run/kiln/{MARK}\nCOPY Dockerfile /to/up/etc/{MARK}\n"),
        // It came to the step's own root.
        format!("RUN test -e /etc/{MARK}\nADD evil.tar /to/\n"),
        "COPY --from=evil /out/etc/hostname /copied\n".into(),
        // BuildKit's CVE-2024-23652: the place of a mount is removed after the step, through a link.
        "RUN --mount=type=tmpfs,target=/victim/etc/kept mv /victim /moved && ln -s / /victim && mkdir -p /etc/kept\n".into(),
        // BuildKit's CVE-2024-23651: a cache whose content is a link where the next step mounts a part of it.
        "RUN --mount=type=cache,id=race,target=/c rm -rf /c/part; ln -s / /c/part\n".into(),
        format!("RUN --mount=type=cache,id=race,source=part,target=/c touch /c/{MARK} || true\n"),
        // buildah's CVE-2024-9675: a cache's name that is a path.
        format!(
            "RUN --mount=type=cache,id=../../../../../../../../etc,target=/c touch /c/{MARK}\n"
        ),
    ];
    // runc's CVE-2024-21626: a working directory by a descriptor that the runtime left open.
    let workdir = format!(
        "WORKDIR /proc/self/fd/7\nRUN touch ../../../../{MARK} ../../../../run/kiln/{MARK}\n"
    );
    [
        Attack { name: "contained", steps: contained.concat(), refused: false },
        Attack { name: "a descriptor", steps: workdir, refused: true },
    ]
}

/// Names that lead out of where they are unpacked.
fn evil_tar() -> Vec<u8> {
    let tar = Tar::default().dir("in/").symlink("in/out", "/").symlink("in/up", "../../../../..");
    let tar =
        tar.file(format!("in/out/run/kiln/{MARK}"), b"x").file(format!("in/up/etc/{MARK}"), b"x");
    tar.end()
}

#[test]
fn vm_what_broke_other_builders_changes_nothing_outside_of_the_step() {
    let server = Server::start();
    let host = |server: &Server| {
        let outside = ["/etc", "/run", "/usr/bin", "/root"].map(Path::new);
        let mut found: BTreeSet<String> = outside.iter().flat_map(|dir| names(dir, 2)).collect();
        found.extend(names(Path::new("/"), 1));
        found.extend(names(&server.data(), 1));
        found
    };
    let before = host(&server);
    for attack in attacks() {
        run(&server, &attack);
    }
    let appeared: Vec<_> = host(&server).difference(&before).cloned().collect();
    assert!(!appeared.iter().any(|name| name.contains(MARK)), "{appeared:?}");
    server.stop();
}

/// Files below a directory, so many levels deep.
fn names(dir: &Path, depth: u32) -> Vec<String> {
    let Ok(entries) = std::fs::read_dir(dir) else { return vec![] };
    let paths = entries.flatten().map(|entry| entry.path());
    paths
        .flat_map(|path| {
            let below = if depth > 1 && path.is_dir() && !path.is_symlink() {
                names(&path, depth - 1)
            } else {
                vec![]
            };
            [vec![path.display().to_string()], below].concat()
        })
        .collect()
}

/// Builds it, and compares what is around the step before and after the attack.
fn run(server: &Server, attack: &Attack) {
    let dockerfile = format!(
        "FROM {BASE} AS evil\nRUN ln -s / /out\nFROM {BASE}\n{}{}{}",
        waits("begin"),
        attack.steps,
        waits("end")
    );
    let files: &[(&str, &[u8])] =
        &[("Dockerfile", dockerfile.as_bytes()), ("evil.tar", &evil_tar())];
    let id = server.submit(files, &[]);
    let mut follow = server.follow(&id);
    assert!(follow.until("waits for begin\n"), "{}: {}", attack.name, follow.seen);
    let survey = || {
        let out = server.run(&["exec", "--vm", &id, "--", "sh", "-c", SURVEY]);
        let lines = text(out.stdout);
        assert!(
            out.status.success() && lines.lines().count() > 1000,
            "{lines}{}",
            text(out.stderr)
        );
        lines.lines().map(str::to_owned).collect::<BTreeSet<_>>()
    };
    // What looking itself changes, and being in the step, has changed then.
    assert!(server.run(&["exec", &id, "--", "true"]).status.success());
    survey();
    let before = survey();
    let go = |name: &str| {
        let out = server.run(&["exec", &id, "--", "touch", name]);
        assert!(out.status.success(), "{}: {}", attack.name, text(out.stderr));
    };
    go("/begin");
    let reached_the_end = follow.until("waits for end\n");
    let wrote = follow.seen.lines().any(|line| line.starts_with("WROTE "));
    assert!(!wrote, "{}: {}", attack.name, follow.seen);
    assert_eq!(reached_the_end, !attack.refused, "{}: {}", attack.name, follow.seen);
    if reached_the_end {
        let after = survey();
        let changed: Vec<_> = before.symmetric_difference(&after).collect();
        assert!(changed.is_empty(), "{}: {changed:#?}\n{}", attack.name, follow.seen);
        go("/end");
    }
    follow.drain();
    let build = server.show(&id);
    let kind = if attack.refused { json!("step_failed") } else { Value::Null };
    assert_eq!(build["failure"]["kind"], kind, "{}: {build}\n{}", attack.name, follow.seen);
}
