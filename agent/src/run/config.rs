//! The container's `config.json` of an instance. Pure.

use kiln_protocol::run::RunJob;
use oci_spec::runtime::LinuxSeccomp;
use serde_json::{Value, json};

use super::inside::INIT_PATH;
use super::user::User;
use super::{Places, root};
use crate::runtime::tighten;

/// Where a program is looked for when the image does not say.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The container's cgroup, from the root of the hierarchy.
pub const CGROUP: &str = "/kiln/instance/container";

/// The profile that buildah 1.39.3 gives a step, which is that of Debian's golang-github-containers-common. It
/// permits by name and is made tight as a step's is.
const SECCOMP: &str = include_str!("seccomp.json");

/// Those that a step's root has. A user that is not root has none, as usual.
const CAPABILITIES: [&str; 11] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// Parts of the kernel's own file systems that a container does not see, as usual.
const MASKED: [&str; 11] = [
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/sys/devices/virtual/powercap",
    "/sys/firmware",
    "/sys/fs/selinux",
];
const READ_ONLY: [&str; 6] =
    ["/proc/asound", "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Files that one process may have open, as usual.
const OPEN_FILES: u64 = 1_048_576;

/// What the container may use up.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Processes at one time.
    pub processes: u32,
    /// Memory in bytes, so that its hunger hits it and not the agent.
    pub memory: Option<u64>,
}

/// The config of a container that runs the job.
pub fn config(
    places: &Places,
    job: &RunJob,
    user: &User,
    limits: &Limits,
) -> anyhow::Result<Value> {
    let profile: LinuxSeccomp = serde_json::from_str(SECCOMP)?;
    let profile = tighten(Some(&profile))?;
    let capabilities: &[&str] = if user.uid == 0 { &CAPABILITIES } else { &[] };
    let mut args = vec![INIT_PATH];
    args.extend(job.args.iter().map(String::as_str));
    // Devices of the image's own open nothing; the runtime adds those that every container has.
    let mut resources = json!({
        "devices": [{ "allow": false, "access": "rwm" }],
        "pids": { "limit": limits.processes },
    });
    if let Some(memory) = limits.memory {
        resources["memory"] = json!({ "limit": memory });
    }
    let path = root::place(places);
    Ok(json!({
        "ociVersion": "1.0.2",
        "hostname": job.hostname,
        "root": { "path": path, "readonly": false },
        "process": {
            "user": { "uid": user.uid, "gid": user.gid, "additionalGids": user.groups },
            "args": args,
            "env": environment(job, user),
            "cwd": job.working_dir,
            "capabilities": {
                "bounding": CAPABILITIES,
                "effective": capabilities,
                "permitted": capabilities,
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": OPEN_FILES, "soft": OPEN_FILES }],
        },
        "mounts": mounts(places),
        "linux": {
            "cgroupsPath": CGROUP,
            "resources": resources,
            "namespaces": [
                { "type": "pid" },
                { "type": "ipc" },
                { "type": "uts" },
                { "type": "mount" },
                { "type": "cgroup" },
                { "type": "network", "path": places.netns },
            ],
            "maskedPaths": MASKED,
            "readonlyPaths": READ_ONLY,
            "seccomp": profile,
        },
    }))
}

fn environment(job: &RunJob, user: &User) -> Vec<String> {
    let mut env: Vec<String> =
        job.env.iter().map(|(name, value)| format!("{name}={value}")).collect();
    for (name, value) in
        [("PATH", DEFAULT_PATH), ("HOME", user.home.as_str()), ("HOSTNAME", job.hostname.as_str())]
    {
        if !job.env.iter().any(|(given, _)| given == name) {
            env.push(format!("{name}={value}"));
        }
    }
    env
}

fn mounts(places: &Places) -> Value {
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({ "destination": destination, "type": kind, "source": kind, "options": options });
    let file = |destination: &str, source: &std::path::Path, options: &[&str]| json!({ "destination": destination, "type": "bind", "source": source, "options": options });
    json!([
        mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
        mount(
            "/dev/pts",
            "devpts",
            &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]
        ),
        mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
        mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        // Its own limits are not its own to write.
        mount("/sys/fs/cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", "ro"]),
        file("/etc/hostname", &places.files.join("hostname"), &["bind", "rprivate"]),
        file("/etc/hosts", &places.files.join("hosts"), &["bind", "rprivate"]),
        file("/etc/resolv.conf", &places.files.join("resolv.conf"), &["bind", "rprivate"]),
        // Read-only, so that nobody changes what the VM's own first process runs.
        file(INIT_PATH, &places.agent, &["bind", "rprivate", "ro", "nosuid", "nodev"]),
    ])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn job() -> RunJob {
        RunJob {
            hostname: "web".into(),
            args: vec!["serve".into(), "--port".into(), "80".into()],
            env: vec![("A".into(), "1=2".into())],
            user: "app".into(),
            working_dir: "/srv".into(),
            stop_signal: 15,
        }
    }

    fn app() -> User {
        User { uid: 1000, gid: 1001, groups: vec![29], home: "/home/app".into() }
    }

    fn made(job: &RunJob, user: &User) -> Value {
        let limits = Limits { processes: 512, memory: Some(1 << 30) };
        config(&Places::default(), job, user, &limits).unwrap()
    }

    #[test]
    fn golden() {
        let mut config = made(&job(), &app());
        // A step's, and tested with it.
        config["linux"].as_object_mut().unwrap().remove("seccomp");
        insta::assert_json_snapshot!(config);
    }

    #[test]
    fn the_profile_is_a_steps_profile() {
        let recorded = include_str!("../runtime/testdata/config.buildah-1.39.3.json");
        let recorded: Value = serde_json::from_str(recorded).unwrap();
        assert_eq!(serde_json::from_str::<Value>(SECCOMP).unwrap(), recorded["linux"]["seccomp"]);
        let tight: LinuxSeccomp =
            serde_json::from_value(recorded["linux"]["seccomp"].clone()).unwrap();
        let tight = serde_json::to_value(tighten(Some(&tight)).unwrap()).unwrap();
        assert_eq!(made(&job(), &app())["linux"]["seccomp"], tight);
    }

    #[test]
    fn the_crate_reads_the_config_as_it_was_meant() {
        let config = made(&job(), &app());
        let spec: oci_spec::runtime::Spec = serde_json::from_value(config).unwrap();
        let process = spec.process().as_ref().unwrap();
        assert_eq!((process.user().uid(), process.user().gid()), (1000, 1001));
        assert_eq!(process.terminal(), None);
    }

    #[test]
    fn only_root_has_capabilities() {
        let capabilities = |user: &User| made(&job(), user)["process"]["capabilities"].clone();
        let root = User { uid: 0, gid: 0, groups: vec![], home: "/root".into() };
        assert_eq!(capabilities(&root)["effective"], json!(CAPABILITIES));
        assert_eq!(capabilities(&app())["effective"], json!([]));
        assert_eq!(capabilities(&app())["bounding"], json!(CAPABILITIES));
        for dangerous in ["CAP_SYS_MODULE", "CAP_SYS_ADMIN", "CAP_NET_ADMIN", "CAP_MKNOD"] {
            assert!(!CAPABILITIES.contains(&dangerous));
        }
    }

    #[test]
    fn the_image_wins_over_defaults() {
        let mut own = job();
        own.env = vec![("HOME".into(), "/mine".into()), ("PATH".into(), String::new())];
        assert_eq!(environment(&own, &app()), ["HOME=/mine", "PATH=", "HOSTNAME=web"]);
        let given = environment(&job(), &app());
        let path = format!("PATH={DEFAULT_PATH}");
        assert_eq!(given, ["A=1=2", path.as_str(), "HOME=/home/app", "HOSTNAME=web"]);
    }
}
