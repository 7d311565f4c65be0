//! What Kiln changes in a container's `config.json` before crun sees it. Pure.
//!
//! Nothing here enters the image: the engine commits the files that a step left, not its config.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use kiln_protocol::job::StepNetwork;
use oci_spec::runtime::{
    Capability, Linux, LinuxMemory, LinuxNamespace, LinuxNamespaceType, LinuxPids, Mount, Process,
    Spec,
};
use serde::{Deserialize, Serialize};

use super::seccomp::{self, ProfileError};
use super::secrets::StepSecret;

/// Where a step's proxy listens, in the steps' network namespace.
const PROXY_URL: &str = "http://127.0.0.1:3128";
/// What a step reaches without the proxy: itself.
const NO_PROXY: &str = "localhost,127.0.0.1";
const PROXY_VARIABLES: [(&str, &str); 3] =
    [("HTTP_PROXY", PROXY_URL), ("HTTPS_PROXY", PROXY_URL), ("NO_PROXY", NO_PROXY)];

/// Where programs look for a name server, and what a step finds there: one that tells who asks for what.
const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Its content. No search list, so that a name is asked for as it is.
pub const NAME_SERVER: &str = "nameserver 127.0.0.1\n";

/// Where a step finds certificates. /dev is never part of an image.
const CERTIFICATES: &str = "/dev/kiln-certificates.pem";
/// The variables by which programs find them: OpenSSL and Go, curl, Python, pip, Node, Git, cargo.
const CERTIFICATE_VARIABLES: [&str; 7] = [
    "SSL_CERT_FILE",
    "CURL_CA_BUNDLE",
    "REQUESTS_CA_BUNDLE",
    "PIP_CERT",
    "NODE_EXTRA_CA_CERTS",
    "GIT_SSL_CAINFO",
    "CARGO_HTTP_CAINFO",
];

/// What holds for one step, as the agent decides it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StepPolicy {
    /// What the step may reach.
    pub network: StepNetwork,
    /// Certificates that it trusts, where they are not its image's own: a file of the VM.
    pub certificates: Option<PathBuf>,
    /// What it may mount, or has as a variable.
    pub secrets: Vec<StepSecret>,
    /// Where copies of what it mounts go: memory.
    pub mounted_secrets: PathBuf,
    /// The network namespace that it runs in, whatever the Dockerfile says.
    pub netns: PathBuf,
    /// Its cgroup, from the root of the hierarchy.
    pub cgroup: PathBuf,
    /// The most processes at one time.
    pub processes: u32,
    /// The most memory in bytes, so that a step's hunger hits the step and not the engine.
    pub memory: Option<u64>,
}

/// A config that Kiln does not run.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A part is missing that every Linux container has.
    #[error("the engine's container config has no {0} section")]
    Missing(&'static str),
    /// Its output would not come through the pipes.
    #[error("the engine asked for a terminal for a step")]
    Terminal,
    /// It would see the VM's processes, and so their network namespaces.
    #[error("the engine put a step into the VM's process namespace")]
    SharedProcesses,
    /// Its seccomp profile cannot be made safe.
    #[error(transparent)]
    Profile(#[from] ProfileError),
}

/// Applies the policy of a step to its config.
pub fn rewrite(mut spec: Spec, policy: &StepPolicy) -> Result<Spec, ConfigError> {
    let linux = spec.linux_mut().as_mut().ok_or(ConfigError::Missing("linux"))?;
    let profile = seccomp::tighten(linux.seccomp().as_ref())?;
    linux.set_seccomp(Some(profile));
    let own_network = confine_namespaces(linux, policy)?;
    confine_resources(linux, policy);

    let process = spec.process_mut().as_mut().ok_or(ConfigError::Missing("process"))?;
    if process.terminal() == Some(true) {
        return Err(ConfigError::Terminal);
    }
    drop_capabilities(process);
    if policy.network == StepNetwork::Proxy && !own_network {
        add_proxy_variables(process.env_mut().get_or_insert_default());
    }
    if let Some(file) = &policy.certificates {
        for name in CERTIFICATE_VARIABLES {
            add_variable(process.env_mut().get_or_insert_default(), name, CERTIFICATES);
        }
        spec.mounts_mut().get_or_insert_default().push(certificates(file));
    }

    for mount in spec.mounts_mut().iter_mut().flatten() {
        // In its own cgroup namespace a step could write its own limits.
        if matches!(mount.typ().as_deref(), Some("cgroup" | "cgroup2")) {
            let options = mount.options_mut().get_or_insert_default();
            options.retain(|option| option != "rw" && option != "ro");
            options.push("ro".to_owned());
        }
    }
    Ok(spec)
}

/// The engine's own file of the bundle that it mounts as a step's `/etc/resolv.conf`, where [`NAME_SERVER`] is to
/// stand in it: the engine makes one for each step, with what it takes for public name servers, and what a step writes
/// there enters no image. Another mount there is the Dockerfile's own.
pub fn name_server_file(spec: &Spec, policy: &StepPolicy, bundle: &Path) -> Option<PathBuf> {
    let file = bundle.join("resolv.conf");
    let is_in_steps_network = spec.linux().as_ref()?.namespaces().iter().flatten().any(|own| {
        own.typ() == LinuxNamespaceType::Network && own.path().as_ref() == Some(&policy.netns)
    });
    let is_mounted = spec.mounts().iter().flatten().any(|mount| {
        mount.destination() == Path::new(RESOLV_CONF) && mount.source().as_ref() == Some(&file)
    });
    (policy.network == StepNetwork::Proxy && is_in_steps_network && is_mounted).then_some(file)
}

/// Sees to it that the step is in the steps' network namespace, or in a new and empty one of its
/// own (`RUN --network=none`): then gives true. `RUN --network=host` would be the VM's, where the
/// registry listens.
fn confine_namespaces(linux: &mut Linux, policy: &StepPolicy) -> Result<bool, ConfigError> {
    let namespaces = linux.namespaces_mut().get_or_insert_default();
    let own =
        |namespace: &LinuxNamespace, typ| namespace.typ() == typ && namespace.path().is_none();
    if !namespaces.iter().any(|namespace| own(namespace, LinuxNamespaceType::Pid)) {
        return Err(ConfigError::SharedProcesses);
    }
    if namespaces.iter().any(|namespace| own(namespace, LinuxNamespaceType::Network)) {
        return Ok(true);
    }
    namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Network);
    let mut network = LinuxNamespace::default();
    network.set_typ(LinuxNamespaceType::Network).set_path(Some(policy.netns.clone()));
    namespaces.push(network);
    Ok(false)
}

fn confine_resources(linux: &mut Linux, policy: &StepPolicy) {
    linux.set_cgroups_path(Some(policy.cgroup.clone()));
    let resources = linux.resources_mut().get_or_insert_default();
    let mut pids = LinuxPids::default();
    pids.set_limit(i64::from(policy.processes));
    resources.set_pids(Some(pids));
    if let Some(limit) = policy.memory {
        let mut memory = LinuxMemory::default();
        memory.set_limit(Some(i64::try_from(limit).unwrap_or(i64::MAX)));
        resources.set_memory(Some(memory));
    }
}

/// The capabilities that a container's root usually has. The engine gives these or fewer; anything
/// more would be a way out of the namespaces.
const CAPABILITIES: [Capability; 14] = [
    Capability::AuditWrite,
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Mknod,
    Capability::NetBindService,
    Capability::NetRaw,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysChroot,
];

fn drop_capabilities(process: &mut Process) {
    let Some(mut capabilities) = process.capabilities().clone() else { return };
    let kept = |set: &Option<HashSet<Capability>>| {
        set.as_ref().map(|set| {
            set.iter().copied().filter(|capability| CAPABILITIES.contains(capability)).collect()
        })
    };
    let (bounding, effective) = (kept(capabilities.bounding()), kept(capabilities.effective()));
    let (inheritable, permitted) =
        (kept(capabilities.inheritable()), kept(capabilities.permitted()));
    let ambient = kept(capabilities.ambient());
    capabilities
        .set_bounding(bounding)
        .set_effective(effective)
        .set_inheritable(inheritable)
        .set_permitted(permitted)
        .set_ambient(ambient);
    process.set_capabilities(Some(capabilities));
}

/// Adds each variable in both spellings, unless the Dockerfile set it in either: programs differ
/// in which of the two they prefer.
fn add_proxy_variables(env: &mut Vec<String>) {
    for (name, value) in PROXY_VARIABLES {
        let is_set = env.iter().any(|entry| {
            entry.split_once('=').is_some_and(|(key, _)| key.eq_ignore_ascii_case(name))
        });
        if !is_set {
            env.push(format!("{name}={value}"));
            env.push(format!("{}={value}", name.to_ascii_lowercase()));
        }
    }
}

/// Adds a variable that the image does not set.
fn add_variable(env: &mut Vec<String>, name: &str, value: &str) {
    let is_set = |entry: &String| entry.split_once('=').is_some_and(|(key, _)| key == name);
    if !env.iter().any(is_set) {
        env.push(format!("{name}={value}"));
    }
}

fn certificates(file: &Path) -> Mount {
    let mut mount = Mount::default();
    let options = ["bind", "ro", "nosuid", "nodev", "noexec"].map(str::to_owned).to_vec();
    mount
        .set_destination(CERTIFICATES.into())
        .set_typ(Some("bind".to_owned()))
        .set_source(Some(file.to_owned()))
        .set_options(Some(options));
    mount
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::Value;

    /// What buildah 1.39.3 of Debian trixie handed to `--runtime` for `RUN echo one && echo two`.
    const RECORDED: &str = include_str!("testdata/config.buildah-1.39.3.json");

    fn policy() -> StepPolicy {
        StepPolicy {
            certificates: None,
            secrets: vec![],
            mounted_secrets: "/run/kiln/secrets/mounted".into(),
            network: StepNetwork::Proxy,
            netns: "/run/netns/steps".into(),
            cgroup: "/kiln/steps/1".into(),
            processes: 512,
            memory: Some(1 << 30),
        }
    }

    fn recorded() -> Value {
        serde_json::from_str(RECORDED).unwrap()
    }

    fn rewritten(config: Value, policy: &StepPolicy) -> Result<Value, ConfigError> {
        let spec = serde_json::from_value(config).unwrap();
        rewrite(spec, policy).map(|spec| serde_json::to_value(spec).unwrap())
    }

    fn sort_sets(config: &mut Value) {
        for set in config["process"]["capabilities"].as_object_mut().unwrap().values_mut() {
            set.as_array_mut().unwrap().sort_by_key(ToString::to_string);
        }
    }

    #[test]
    fn reading_and_writing_alone_loses_nothing() {
        let spec: Spec = serde_json::from_str(RECORDED).unwrap();
        let mut again = serde_json::to_value(spec).unwrap();
        let mut config = recorded();
        sort_sets(&mut config);
        sort_sets(&mut again);
        assert_eq!(again, config);
    }

    #[test]
    fn golden() {
        let mut config = rewritten(recorded(), &policy()).unwrap();
        sort_sets(&mut config);
        insta::assert_json_snapshot!(config);
    }

    fn env_of(config: &Value) -> Vec<String> {
        serde_json::from_value(config["process"]["env"].clone()).unwrap()
    }

    #[test]
    fn the_dockerfile_wins_over_the_proxy_variables() {
        let mut config = recorded();
        config["process"]["env"] = serde_json::json!(["https_proxy=http://mine", "NO_PROXY="]);
        let env = env_of(&rewritten(config, &policy()).unwrap());
        assert_eq!(
            env,
            [
                "https_proxy=http://mine",
                "NO_PROXY=",
                "HTTP_PROXY=http://127.0.0.1:3128",
                "http_proxy=http://127.0.0.1:3128",
            ]
        );
    }

    #[test]
    fn without_a_network_there_are_no_proxy_variables() {
        let none = StepPolicy { network: StepNetwork::None, ..policy() };
        let env = env_of(&rewritten(recorded(), &none).unwrap());
        assert_eq!(env, env_of(&recorded()));
    }

    #[test]
    fn a_step_is_in_the_steps_namespace_or_in_an_empty_one() {
        let network = |given: &[Value]| {
            let mut config = recorded();
            let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|namespace| namespace["type"] != "network");
            namespaces.extend_from_slice(given);
            let config = rewritten(config, &policy()).unwrap();
            let found = config["linux"]["namespaces"].as_array().unwrap().iter();
            let found: Vec<_> = found.filter(|n| n["type"] == "network").cloned().collect();
            (found, env_of(&config).iter().any(|entry| entry.starts_with("HTTP_PROXY=")))
        };
        let steps = serde_json::json!({"type": "network", "path": "/run/netns/steps"});
        let other = serde_json::json!({"type": "network", "path": "/proc/1/ns/net"});
        let empty = serde_json::json!({"type": "network"});
        // `RUN --network=host`: buildah names no network namespace at all.
        assert_eq!(network(&[]), (vec![steps.clone()], true));
        assert_eq!(network(&[other]), (vec![steps], true));
        assert_eq!(network(std::slice::from_ref(&empty)), (vec![empty], false));
    }

    #[test]
    fn the_engines_own_file_names_the_name_server_and_no_other() {
        let bundle = Path::new("/var/tmp/buildah3738046122");
        let file = |change: fn(&mut Value), policy: &StepPolicy| {
            let mut config = recorded();
            change(&mut config);
            let spec = rewrite(serde_json::from_value(config).unwrap(), policy).unwrap();
            name_server_file(&spec, policy, bundle)
        };
        assert_eq!(file(|_| {}, &policy()), Some(bundle.join("resolv.conf")));
        let none = StepPolicy { network: StepNetwork::None, ..policy() };
        assert_eq!(file(|_| {}, &none), None);
        // `RUN --network=none`.
        let own_network = |config: &mut Value| {
            let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
            namespaces.retain(|namespace| namespace["type"] != "network");
            namespaces.push(serde_json::json!({"type": "network"}));
        };
        assert_eq!(file(own_network, &policy()), None);
        // `RUN --mount=type=bind,target=/etc/resolv.conf,…`.
        let own_mount = |config: &mut Value| {
            for mount in config["mounts"].as_array_mut().unwrap() {
                if mount["destination"] == "/etc/resolv.conf" {
                    mount["source"] = "/etc/passwd".into();
                }
            }
        };
        assert_eq!(file(own_mount, &policy()), None);
    }

    #[test]
    fn more_capabilities_than_usual_are_dropped() {
        let mut config = recorded();
        for set in ["bounding", "effective", "permitted", "ambient"] {
            config["process"]["capabilities"][set] =
                serde_json::json!(["CAP_SYS_ADMIN", "CAP_CHOWN", "CAP_BPF"]);
        }
        let config = rewritten(config, &policy()).unwrap();
        for set in ["bounding", "effective", "permitted", "ambient"] {
            assert_eq!(config["process"]["capabilities"][set], serde_json::json!(["CAP_CHOWN"]));
        }
    }

    #[test]
    fn what_cannot_be_confined_is_refused() {
        let refuse = |change: fn(&mut Value)| {
            let mut config = recorded();
            change(&mut config);
            rewritten(config, &policy()).unwrap_err()
        };
        assert_eq!(
            refuse(|c| drop(c["linux"].as_object_mut().unwrap().remove("seccomp"))),
            ConfigError::Profile(ProfileError::Missing)
        );
        assert_eq!(
            refuse(|c| drop(c.as_object_mut().unwrap().remove("linux"))),
            ConfigError::Missing("linux")
        );
        assert_eq!(
            refuse(|c| drop(c.as_object_mut().unwrap().remove("process"))),
            ConfigError::Missing("process")
        );
        assert_eq!(refuse(|c| c["process"]["terminal"] = true.into()), ConfigError::Terminal);
        assert_eq!(
            refuse(|c| c["linux"]["namespaces"][0]["path"] = "/proc/1/ns/pid".into()),
            ConfigError::SharedProcesses
        );
        assert_eq!(
            refuse(|c| drop(c["linux"]["namespaces"].as_array_mut().unwrap().remove(0))),
            ConfigError::SharedProcesses
        );
    }

    #[test]
    fn certificates_are_mounted_and_named_but_for_what_the_image_sets() {
        let policy = StepPolicy { certificates: Some("/run/kiln/ca.pem".into()), ..policy() };
        let mut spec: Spec = serde_json::from_str(RECORDED).unwrap();
        let process = spec.process_mut().as_mut().unwrap();
        process.env_mut().get_or_insert_default().push("PIP_CERT=/own.pem".to_owned());
        let spec = rewrite(spec, &policy).unwrap();
        let env = spec.process().as_ref().unwrap().env().clone().unwrap();
        assert!(env.contains(&format!("SSL_CERT_FILE={CERTIFICATES}")), "{env:?}");
        assert_eq!(env.iter().filter(|entry| entry.starts_with("PIP_CERT=")).count(), 1);
        let mount = spec.mounts().as_ref().unwrap().last().unwrap();
        assert_eq!(mount.destination(), Path::new(CERTIFICATES));
        assert!(mount.options().as_ref().unwrap().contains(&"ro".to_owned()));
    }
}
