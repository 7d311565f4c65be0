//! buildah's command lines. Pure; the reason of every flag is here.

use std::ffi::OsString;
use std::path::Path;

use super::Work;
use super::buildah::Buildah;
use super::files::Files;

/// The variables that every buildah process gets; no others.
pub fn environment(buildah: &Buildah, files: &Files) -> Vec<(&'static str, OsString)> {
    vec![
        ("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".into()),
        ("HOME", "/root".into()),
        ("LANG", "C.UTF-8".into()),
        // Blobs on their way to the storage, and the steps' bundles: on the scratch disk itself.
        ("TMPDIR", buildah.tmp.clone().into()),
        ("CONTAINERS_CONF", files.containers().into()),
        ("CONTAINERS_STORAGE_CONF", files.storage().into()),
        ("CONTAINERS_REGISTRIES_CONF", files.registries().into()),
        // A crash is one line of why. Where in buildah it was helps no user, and is a screen or two.
        ("GOTRACEBACK", "none".into()),
        (crate::runtime::SOCKET_VARIABLE, buildah.socket.clone().into()),
        (crate::runtime::PROGRAM_VARIABLE, buildah.runtime.clone().into()),
    ]
}

/// `buildah build`.
pub fn build(buildah: &Buildah, files: &Files, work: &Work) -> Vec<OsString> {
    let mut args = words(&[
        "build",
        // crun in namespaces, through our wrapper.
        "--isolation=oci",
        // The docker format: in the OCI one HEALTHCHECK, ONBUILD and SHELL would be lost, and the
        // user with them. Registries and runtimes take both.
        "--format=docker",
        // One layer for what the Dockerfile adds. Nothing of this VM is used again, so an
        // intermediate image for each step would only cost time.
        "--layers=false",
        // The VM is fresh; a base that two stages name must be the same one.
        "--pull=missing",
        // The host retries what is worth it; a base that is not there should be said at once.
        "--retry=1",
        "--retry-delay=1s",
        // The gateway speaks plain HTTP over this VM's loopback.
        "--tls-verify=false",
        "--http-proxy=false",
        // The image is what the Dockerfile says and no more.
        "--identity-label=false",
    ]);
    args.push(flag("--signature-policy=", &files.policy()));
    args.push(flag("--runtime=", &buildah.wrapper));
    args.push(flag("--network=ns:", &buildah.netns));
    args.push(flag("--file=", &work.dockerfile));
    if let Some(path) = &work.ignore_file {
        args.push(flag("--ignorefile=", path));
    }
    args.push(format!("--tag={}", buildah.image).into());
    if let Some(target) = &work.target {
        args.push(format!("--target={target}").into());
    }
    for (key, value) in &work.build_args {
        args.push(format!("--build-arg={key}={value}").into());
    }
    // The runtime's wrapper puts the value in its place: buildah would copy it to the scratch disk.
    for secret in &work.secrets {
        let prefix = format!("--secret=id={},type=file,src=", secret.id);
        args.push(flag(&prefix, &secret.placeholder));
    }
    // A source that was unpacked somewhere beginning with a dash is still no flag.
    args.push("--".into());
    args.push(work.context.clone().into());
    args
}

/// `buildah push`.
pub fn push(buildah: &Buildah, files: &Files, digest_file: &Path) -> Vec<OsString> {
    let mut args = words(&[
        "push",
        "--tls-verify=false",
        "--retry=1",
        "--retry-delay=1s",
        // The way to the host is short and the processor is what a VM has least of.
        "--compression-level=1",
    ]);
    args.push(flag("--signature-policy=", &files.policy()));
    args.push(flag("--digestfile=", digest_file));
    args.push("--".into());
    args.push(buildah.image.clone().into());
    args.push(buildah.destination.clone().into());
    args
}

fn words(list: &[&str]) -> Vec<OsString> {
    list.iter().map(OsString::from).collect()
}

fn flag(name: &str, path: &Path) -> OsString {
    let mut flag = OsString::from(name);
    flag.push(path);
    flag
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::secrets::Secret;
    use kiln_protocol::job::StepNetwork;
    use kiln_protocol::secret::SecretId;

    #[test]
    fn golden() {
        let buildah = Buildah::default();
        let directory = tempfile::tempdir().unwrap();
        let files = Files::new(directory.path());
        let work = Work {
            context: "/build/source".into(),
            dockerfile: "/build/source/Dockerfile".into(),
            certificates: None,
            ignore_file: Some("/build/source/Dockerfile.dockerignore".into()),
            target: Some("final".into()),
            keep_failed: false,
            end_step: tokio_util::sync::CancellationToken::new(),
            build_args: vec![("A".into(), "1 2".into()), ("B".into(), String::new())],
            network: StepNetwork::Proxy,
            processes: 512,
            upstreams: vec![],
            secrets: vec![Secret {
                id: SecretId::new("npm.token").unwrap(),
                file: "/s/values/npm.token".into(),
                placeholder: "/s/placeholders/npm.token".into(),
                marker: "m".into(),
                variable: None,
            }],
        };
        let mut text = String::new();
        for (key, value) in environment(&buildah, &files) {
            text.push_str(&format!("{key}={}\n", value.display()));
        }
        for args in
            [build(&buildah, &files, &work), push(&buildah, &files, Path::new("/run/digest"))]
        {
            text.push('\n');
            for arg in args {
                text.push_str(&format!("{}\n", arg.display()));
            }
        }
        let text = text.replace(&directory.path().display().to_string(), "FILES");
        insta::assert_snapshot!(text);
    }
}
