//! How a VM's processes are started: as a user of their own, in the VM's cgroup, without
//! privileges, in a root directory and namespaces of their own, with no descriptor but those handed over.
//!
//! A program may lie where the VM's user cannot go: its root has it by its path (see [`super::root`]), and without
//! a root it is executed by descriptor. VMs' processes outlive the server on purpose (no parent-death signal): the next one
//! finds them by their records and ends them.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{MemfdFlags, SealFlags};
use seccompiler::BpfProgram;

use super::limits::MAX_TASKS;
use super::process::Process;
use super::root::Root;
use super::sys;

/// Who a VM's processes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    /// User and group.
    pub uid: u32,
    /// Supplementary groups: none, but for the one that may open `/dev/kvm`.
    pub groups: Vec<u32>,
}

/// A program that is there.
#[derive(Debug)]
pub(crate) struct Program {
    /// Opened close-on-exec.
    pub file: File,
    /// Canonical.
    pub path: PathBuf,
}

/// A program to start.
pub(crate) struct Launch<'a> {
    /// What `argv[0]` is.
    pub name: &'static str,
    pub program: &'a Program,
    pub args: Vec<OsString>,
    pub dir: &'a Path,
    /// Stay open, by the same numbers.
    pub keep: &'a [RawFd],
    pub output: &'a Output,
    /// Of the VM's cgroups, opened for writing.
    pub cgroup_procs: &'a [File],
    /// As the server itself when there is none.
    pub identity: Option<&'a Identity>,
    /// The host's when there is none.
    pub root: Option<Root>,
    /// Of system calls, from its first instruction on.
    pub filters: &'a [BpfProgram],
    /// Most descriptors that it may open.
    pub max_files: u64,
}

/// Starts it. Blocks until it was executed.
pub(crate) fn launch(launch: Launch<'_>) -> io::Result<Process> {
    let Program { file, path } = launch.program;
    let by_descriptor = || PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let program = if launch.root.is_some() { path.clone() } else { by_descriptor() };
    let mut command = Command::new(program);
    command
        .arg0(launch.name)
        .args(&launch.args)
        .current_dir(launch.dir)
        .env_clear()
        .stdin(Stdio::null())
        .stdout(launch.output.stdio()?)
        .stderr(launch.output.stdio()?);
    sys::prepare(
        &mut command,
        sys::Setup {
            keep: launch.keep.to_vec(),
            cgroup_procs: launch.cgroup_procs.iter().map(AsRawFd::as_raw_fd).collect(),
            identity: launch.identity.cloned(),
            root: launch.root,
            filters: launch.filters.to_vec(),
            max_files: launch.max_files,
            max_tasks: MAX_TASKS,
        },
    );
    let mut spawned = command.spawn()?;
    Process::adopt(spawned.id()).inspect_err(|_| {
        let _ = spawned.kill();
        let _ = spawned.wait();
    })
}

/// Where a program's own messages go: memory of a fixed size. However much a guest makes it
/// say, what does not fit is refused by the kernel.
#[derive(Debug)]
pub(crate) struct Output(File);

/// Enough for what a program says as it dies.
const OUTPUT_BYTES: u64 = 64 * 1024;

impl Output {
    pub(crate) fn new(name: &str) -> io::Result<Self> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let memory = rustix::fs::memfd_create(name, flags)?;
        rustix::fs::ftruncate(&memory, OUTPUT_BYTES)?;
        rustix::fs::fcntl_add_seals(
            &memory,
            SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL,
        )?;
        Ok(Self(File::from(memory)))
    }

    /// What was written, bytes that are not plain text replaced.
    pub(crate) fn text(&self) -> String {
        use std::os::unix::fs::FileExt;
        let mut bytes = vec![0; usize::try_from(OUTPUT_BYTES).unwrap_or(0)];
        let read = self.0.read_at(&mut bytes, 0).unwrap_or(0);
        let end = bytes[..read].iter().rposition(|b| *b != 0).map_or(0, |at| at + 1);
        printable(&String::from_utf8_lossy(&bytes[..end]))
    }

    fn stdio(&self) -> io::Result<Stdio> {
        Ok(Stdio::from(self.0.try_clone()?))
    }
}

/// Text that a terminal takes as text: control characters but newline and tab become `\u{fffd}`.
pub(crate) fn printable(text: &str) -> String {
    let shown = |c: char| if c == '\n' || c == '\t' || !c.is_control() { c } else { '\u{fffd}' };
    text.replace("\r\n", "\n").chars().map(shown).collect()
}

/// A file that every user can open through `/proc/self/fd`: the file itself, or a sealed copy in
/// memory when its mode says no.
pub(crate) fn readable_by_all(mut file: File) -> io::Result<File> {
    use std::os::unix::fs::PermissionsExt;
    if file.metadata()?.permissions().mode() & 0o004 != 0 {
        return Ok(file);
    }
    let memory: OwnedFd =
        rustix::fs::memfd_create("kiln-copy", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    let mut copy = File::from(memory);
    io::copy(&mut file, &mut copy)?;
    copy.seek(SeekFrom::Start(0))?;
    rustix::fs::fcntl_add_seals(
        &copy,
        SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL,
    )?;
    Ok(copy)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeSet;
    use std::io::Write;
    use std::time::{Duration, Instant};

    use super::super::root::System;
    use super::*;

    async fn run(script: &str, identity: Option<&Identity>, keep: &[RawFd]) -> String {
        run_in(script, identity, keep, Path::new("/"), None).await
    }

    async fn run_in(
        script: &str,
        identity: Option<&Identity>,
        keep: &[RawFd],
        dir: &Path,
        root: Option<Root>,
    ) -> String {
        let output = Output::new("test").unwrap();
        let process = launch(Launch {
            name: "sh",
            program: &shell(),
            args: vec!["-c".into(), script.into()],
            dir,
            keep,
            output: &output,
            cgroup_procs: &[],
            identity,
            root,
            filters: &[],
            max_files: 64,
        })
        .unwrap();
        process.exited().await;
        assert!(process.reap(Instant::now() + Duration::from_secs(5)));
        output.text()
    }

    fn shell() -> Program {
        let path = std::fs::canonicalize("/bin/sh").unwrap();
        Program { file: File::open(&path).unwrap(), path }
    }

    /// The shell has no other program there: what it looks at, it looks at by itself.
    #[tokio::test]
    async fn a_root_of_its_own_has_nothing_of_the_host() {
        let dir = tempfile::tempdir().unwrap();
        let sock = dir.path().join("sock");
        std::fs::create_dir(&sock).unwrap();
        let who = Identity { uid: 0x7069_fffe, groups: vec![] };
        std::os::unix::fs::chown(&sock, Some(who.uid), Some(who.uid)).unwrap();
        let root = Root::new(&System::find(), dir.path(), &shell().path, &[], true).unwrap();
        let said = run_in(
            r#"echo "root" /* /usr/bin/* /etc/* /root/* /home/*; pwd; : >made && echo writes
               for place in / /usr/lib /proc /etc/ld.so.cache; do (: >$place/x) 2>/dev/null && echo "wrote $place"; done
               (read line </etc/passwd) 2>/dev/null && echo "read passwd"
               for pid in /proc/[0-9]*; do [ $pid = /proc/$$ ] || echo "sees $pid"; done
               for file in /proc/sys /proc/kcore /proc/net/unix; do [ -e $file ] && echo "sees $file"; done
               cd ..; pwd; echo "above" *
               while read line; do echo "net $line"; done </proc/self/net/dev
               while read line; do echo "unix $line"; done </proc/self/net/unix"#,
            Some(&who),
            &[],
            &sock,
            Some(root),
        )
        .await;
        let shell = shell().path;
        let lines: Vec<_> = said.lines().collect();
        assert!(lines.contains(&"/sock") && lines.contains(&"writes"), "{said}");
        let root = lines.iter().find(|line| line.starts_with("root ")).unwrap();
        let known = [
            "root",
            "/etc",
            "/lib",
            "/lib64",
            "/nix",
            "/proc",
            "/sock",
            "/usr",
            "/etc/ld.so.cache",
        ];
        for word in root.split(' ') {
            let program = Path::new(word) == shell;
            assert!(
                known.contains(&word) || program || word.ends_with('*'),
                "{word}
{said}"
            );
        }
        for unwanted in ["wrote ", "read ", "sees "] {
            assert!(
                !lines.iter().any(|line| line.starts_with(unwanted)),
                "{unwanted}
{said}"
            );
        }
        // Two lines of heading and `lo`; one heading and no socket.
        assert_eq!(lines.iter().filter(|line| line.starts_with("net ")).count(), 3, "{said}");
        assert!(said.contains("net lo:"), "{said}");
        assert_eq!(lines.iter().filter(|line| line.starts_with("unix ")).count(), 1, "{said}");
        assert!(sock.join("made").exists());
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(dir.path().to_str().unwrap()), "{mounts}");
    }

    #[tokio::test]
    async fn a_jailed_process_has_nothing() {
        let who = Identity { uid: 0x7069_ffff, groups: vec![] };
        let status =
            run("cat /proc/self/status; ulimit -n; ulimit -c; umask; env", Some(&who), &[]).await;
        let id = 0x7069_ffff;
        for line in [
            format!("Uid:\t{id}\t{id}\t{id}\t{id}"),
            format!("Gid:\t{id}\t{id}\t{id}\t{id}"),
            "Groups:\t ".to_owned(),
            "CapInh:\t0000000000000000".to_owned(),
            "CapPrm:\t0000000000000000".to_owned(),
            "CapEff:\t0000000000000000".to_owned(),
            "CapBnd:\t0000000000000000".to_owned(),
            "CapAmb:\t0000000000000000".to_owned(),
            "NoNewPrivs:\t1".to_owned(),
            "64".to_owned(),
            "0".to_owned(),
            "0077".to_owned(),
        ] {
            assert!(status.lines().any(|l| l == line), "{line:?} is missing in\n{status}");
        }
        assert!(!status.contains("PATH=/root") && !status.contains("HOME="), "{status}");
    }

    #[tokio::test]
    async fn only_what_was_handed_over_is_open() {
        let given = tempfile::tempfile().unwrap();
        let leaked = tempfile::tempfile().unwrap();
        // A descriptor without close-on-exec, as a careless library would leave it.
        rustix::io::fcntl_setfd(&leaked, rustix::io::FdFlags::empty()).unwrap();
        let listed = run("ls /proc/$$/fd", None, &[given.as_raw_fd()]).await;
        // `ls` sorts them as text.
        let open: BTreeSet<RawFd> = listed.lines().map(|l| l.parse().unwrap()).collect();
        assert_eq!(open, BTreeSet::from([0, 1, 2, given.as_raw_fd()]));
    }

    #[tokio::test]
    async fn what_it_says_is_bounded_and_plain() {
        let said = run(
            r"printf 'a\033[31mb\r\n'; head -c 200000 /dev/zero | tr '\0' x; exit 0",
            None,
            &[],
        )
        .await;
        assert!(said.starts_with("a\u{fffd}[31mb\nxxx"), "{:?}", &said[..20]);
        assert!(said.len() <= usize::try_from(OUTPUT_BYTES).unwrap() + 2);
    }

    #[test]
    fn an_unreadable_file_is_copied() {
        use std::os::unix::fs::PermissionsExt;
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(b"kernel").unwrap();
        let copy = readable_by_all(File::open(file.path()).unwrap()).unwrap();
        assert_eq!(copy.metadata().unwrap().permissions().mode() & 0o777, 0o777);
        assert_eq!(
            std::fs::read(format!("/proc/self/fd/{}", copy.as_raw_fd())).unwrap(),
            b"kernel"
        );
        file.as_file().set_permissions(PermissionsExt::from_mode(0o644)).unwrap();
        let same = readable_by_all(File::open(file.path()).unwrap()).unwrap();
        assert_eq!(same.metadata().unwrap().permissions().mode() & 0o777, 0o644);
    }
}
