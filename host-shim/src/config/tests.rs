//! Precedence, bounds, and the table in the docs.

use clap::{Args, Parser};

use super::*;

#[derive(Parser)]
struct Command {
    #[command(flatten)]
    serve: ServeArgs,
}

fn host() -> Host {
    Host { root: true, cpus: 2, ..Host::default() }
}

fn parse(args: &[&str]) -> ServeArgs {
    Command::try_parse_from(["kiln"].iter().chain(args)).unwrap_or_else(|e| panic!("{e}")).serve
}

fn resolve(args: &[&str]) -> Result<ServeConfig, String> {
    parse(args).resolve_on(&host()).map_err(|error| error.to_string())
}

fn with_file(text: &str, args: &[&str]) -> Result<ServeConfig, String> {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("kiln.toml");
    std::fs::write(&file, text).unwrap();
    let mut all = vec!["--config", file.to_str().unwrap()];
    all.extend(args);
    resolve(&all)
}

#[test]
fn defaults_need_nothing() {
    let config = resolve(&[]).unwrap();
    assert_eq!(config.listen.to_string(), "127.0.0.1:4973");
    assert_eq!(config.public_host, "127.0.0.1:4973");
    assert_eq!(config.data_dir, Path::new("/var/lib/kiln"));
    assert_eq!(config.run_dir, Path::new("/run/kiln"));
    assert_eq!(config.builder, "/var/lib/kiln/builder");
    assert_eq!((config.max_vms, config.accel, config.require_isolation), (2, Accel::Auto, false));
    assert_eq!(config.log_limit_bytes, 256 * 1024 * 1024);
    assert_eq!(config.instance_disks_bytes, 100 << 30);
    let keep = Keep {
        sessions_days: 90,
        logs_days: 90,
        logs_bytes: 20 << 30,
        builds_days: 0,
        images_bytes: 0,
    };
    assert_eq!((config.max_kept, config.keep, config.gc_disk_percent), (4, keep, 0));
    assert_eq!((config.max_queue_seconds, config.drain_seconds), (3600, 5));
    assert_eq!((config.upstream, config.upstream_cache_bytes), (vec![], 20 << 30));
    assert_eq!(config.limits, Limits::default());
    assert_eq!((config.registry, config.egress_permit), (None, vec![]));
    assert_eq!(config.log_format, LogFormat::Text);
    assert!(!config.metrics_open && config.tls.is_none());
}

#[test]
fn nobody_may_ask_for_more_memory_than_vms_have() {
    let of = |memory_mb, args: &[&str]| {
        let config = parse(args).resolve_on(&Host { memory_mb, ..host() }).unwrap();
        (config.max_vm_memory_mb, config.limits.max_memory_mb)
    };
    assert_eq!(of(Some(16_384), &[]), (13_824, 13_824));
    assert_eq!(of(Some(16_384), &["--max-memory-mb", "4096"]), (13_824, 4096));
    assert_eq!(of(Some(16_384), &["--max-vm-memory-mb", "1000"]), (1000, 1000));
    assert_eq!(of(Some(100_000), &[]), (86_988, 65_536));
    // A host with next to nothing, and one that does not say.
    assert_eq!(of(Some(600), &[]), (256, 256));
    assert_eq!(of(None, &[]), (MOST_MEMORY_MB, 65_536));
}

#[test]
fn a_user_has_directories_of_its_own() {
    let user = Host { root: false, home: Some("/home/u".into()), ..host() };
    let at = |host: &Host| parse(&[]).resolve_on(host).map(|c| (c.data_dir, c.run_dir));
    let error = at(&user).unwrap_err().to_string();
    assert!(error.contains("--run-dir") && error.contains("XDG_RUNTIME_DIR"), "{error}");
    let user = Host { runtime_dir: Some("/run/user/1".into()), ..user };
    assert_eq!(at(&user).unwrap(), ("/home/u/.local/share/kiln".into(), "/run/user/1/kiln".into()));
    let user = Host { data_home: Some("/data".into()), home: None, ..user };
    assert_eq!(at(&user).unwrap().0, Path::new("/data/kiln"));
    assert!(at(&Host { data_home: None, ..user }).unwrap_err().to_string().contains("--data-dir"));
}

#[test]
fn the_file_has_every_setting_and_flags_win_over_it() {
    let text = r#"
        listen = "0.0.0.0:80"
        tls_cert = "/c.pem"
        tls_key = "/k.pem"
        data_dir = "/d"
        run_dir = "/r"
        builder = "/b"
        max_vms = 7
        max_vm_memory_mb = 2000
        accel = "kvm"
        require_isolation = true
        network_default = "none"
        egress_permit = ["10.0.0.0/8", "fd00::/8"]
        registry = "https://registry.example"
        registry_config = "/c.json"
        upstream = ["docker.io=https://mirror.example", {host = "quay.io", tenants = ["a"]}]
        upstream_cache_gb = 3
        log_limit_mb = 1
        max_source_mb = 2
        max_timeout_seconds = 3
        max_memory_mb = 512
        max_cpus = 4
        max_disk_gb = 5
        instance_disks_gb = 9
        max_kept = 11
        keep_sessions_days = 0
        keep_logs_days = 13
        keep_logs_gb = 14
        keep_builds_days = 15
        keep_images_gb = 16
        gc_disk_percent = 17
        max_queued = 6
        max_queue_seconds = 12
        drain_seconds = 0
        max_uploads = 8
        max_requests_per_second = 9
        metrics_open = true
        log_format = "json"
        qemu = "/bin/sh"
        vhost_device_vsock = "/bin/sh"
        docker_registry = "/bin/sh"
        [tenant.web]
        max_cpus = 2
        max_memory_mb = 512
    "#;
    let config = with_file(text, &[]).unwrap();
    assert_eq!(config.public_host, "127.0.0.1:80");
    assert_eq!((config.max_vms, config.accel, config.require_isolation), (7, Accel::Kvm, true));
    assert_eq!(config.egress_permit, ["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()]);
    assert_eq!(config.registry_config.as_deref(), Some(Path::new("/c.json")));
    assert_eq!(config.instance_disks_bytes, 9 << 30);
    assert_eq!(config.upstream_cache_bytes, 3 << 30);
    let hosts: Vec<_> = config.upstream.iter().map(|spec| spec.host.as_str()).collect();
    assert_eq!(hosts, ["docker.io", "quay.io"]);
    let keep = Keep {
        sessions_days: 0,
        logs_days: 13,
        logs_bytes: 14 << 30,
        builds_days: 15,
        images_bytes: 16 << 30,
    };
    assert_eq!((config.max_kept, config.keep, config.gc_disk_percent), (11, keep, 17));
    assert!(config.metrics_open);
    assert_eq!(config.log_format, LogFormat::Json);
    let tls = TlsFiles { cert: "/c.pem".into(), key: "/k.pem".into() };
    assert_eq!(config.tls, Some(tls));
    assert_eq!((config.max_queue_seconds, config.max_vm_memory_mb), (12, 2000));
    assert_eq!(config.drain_seconds, 0);
    assert_eq!(
        config.limits,
        Limits {
            max_source_bytes: 2 * 1024 * 1024,
            max_timeout_seconds: 3,
            max_memory_mb: 512,
            max_cpus: 4,
            max_disk_gb: 5,
            max_queued: 6,
            max_uploads: 8,
            max_requests_per_second: 9,
            network_default: NetworkMode::None,
        }
    );
    let web = Maxima { max_cpus: Some(2), max_memory_mb: Some(512), ..Maxima::default() };
    assert_eq!(config.tenants, [(Tenant::new("web").unwrap(), web)].into());
    assert_eq!(config.qemu, Path::new("/bin/sh"));
    let args = [
        "--max-vms",
        "9",
        "--require-isolation=false",
        "--accel",
        "tcg",
        "--egress-permit",
        "127.0.0.1",
    ];
    let config = with_file(text, &args).unwrap();
    assert_eq!((config.max_vms, config.accel, config.require_isolation), (9, Accel::Tcg, false));
    assert_eq!(config.egress_permit, ["127.0.0.1/32".parse().unwrap()]);
    assert_eq!(config.log_limit_bytes, 1024 * 1024);
}

#[test]
fn a_tenants_maxima_are_read_by_name_and_value() {
    for (text, told) in [
        ("[tenant.Web]\nmax_cpus = 2", "not a name"),
        ("[tenant.web]\nmax_cpu = 2", "unknown field `max_cpu`"),
        ("[tenant.web]\nmax_cpus = 0", "0 is too small; it must be 1 or more"),
        ("[tenant.web]\nmax_memory_mb = 255", "it must be 256 or more"),
    ] {
        let error = with_file(text, &[]).unwrap_err();
        assert!(error.contains(told), "{error}");
    }
}

#[test]
fn a_certificate_needs_its_key_and_a_key_its_certificate() {
    let error = resolve(&["--tls-cert", "c.pem"]).unwrap_err();
    assert_eq!(error, "--tls-key is needed here: --tls-cert is given");
    let error = with_file("tls_key = \"k.pem\"", &[]).unwrap_err();
    assert_eq!(error, "--tls-cert is needed here: --tls-key is given");
    // Each may come from elsewhere.
    let tls = with_file("tls_key = \"/k.pem\"", &["--tls-cert", "/c.pem"]).unwrap().tls.unwrap();
    assert_eq!((tls.cert, tls.key), ("/c.pem".into(), "/k.pem".into()));
}

#[test]
fn the_file_is_refused_by_the_name_of_what_is_wrong() {
    for (text, named) in [
        ("max_vm = 2", "max_vm"),
        ("config = \"x\"", "config"),
        ("max-vms = 2", "max-vms"),
        ("max_vms = \"two\"", "max_vms = \"two\""),
        ("accel = \"xen\"", "xen"),
        ("egress_permit = [\"10.0.0.1/8\"]", "10.0.0.1/8"),
        ("[serve]\nlisten = \"x\"", "serve"),
    ] {
        let error = with_file(text, &[]).unwrap_err();
        assert!(error.contains("--config") && error.contains(named), "{text}: {error}");
    }
    assert!(resolve(&["--config", "/does/not/exist"]).unwrap_err().contains("/does/not/exist"));
    let large = "#".repeat(usize::try_from(MAX_FILE).unwrap());
    assert!(with_file(&large, &[]).is_ok());
    assert!(with_file(&format!("{large}#"), &[]).unwrap_err().contains("larger"));
}

#[test]
fn values_are_refused_by_flag_and_what_is_allowed() {
    for (args, needs) in [
        (["--max-vms", "0"], "--max-vms is 0; it must be a number from 1 to 1024"),
        (["--max-vms", "1025"], "1024"),
        (["--keep-sessions-days", "36501"], "36500"),
        (["--keep-logs-days", "36501"], "36500"),
        (["--gc-disk-percent", "100"], "99"),
        (["--keep-logs-gb", "1048577"], "1048576"),
        (["--keep-builds-days", "36501"], "36500"),
        (["--max-vm-memory-mb", "255"], "4194304"),
        (["--log-limit-mb", "0"], "--log-limit-mb"),
        (["--log-limit-mb", "65537"], "65536"),
        (["--max-source-mb", "1048577"], "1048576"),
        (["--max-memory-mb", "255"], "256"),
        (["--max-timeout-seconds", "2592001"], "2592000"),
        (["--max-cpus", "256"], "255"),
        (["--max-disk-gb", "16385"], "16384"),
        (["--max-queued", "0"], "--max-queued"),
        (["--max-queue-seconds", "0"], "2592000"),
        (["--max-uploads", "0"], "--max-uploads"),
        (["--drain-seconds", "2592001"], "2592000"),
        (["--upstream-cache-gb", "1048577"], "1048576"),
        (["--builder", ""], "--builder"),
        (["--registry", "ftp://x"], "http(s)"),
        (["--registry", "https://user:hunter2@x"], "--registry-config"),
        (["--public-host", "kiln"], "HOST:PORT"),
        (["--public-host", "http://kiln.example"], "HOST:PORT"),
        (["--public-host", "kiln.example/x"], "HOST:PORT"),
        (["--qemu", "/etc/passwd"], "--qemu"),
    ] {
        let error = resolve(&args).unwrap_err();
        assert!(error.contains(needs) && error.contains(args[0]), "{args:?}: {error}");
        assert!(!error.contains("hunter2"));
    }
    for args in [
        ["--max-vms", "1024"],
        ["--log-limit-mb", "65536"],
        ["--max-memory-mb", "256"],
        ["--public-host", "kiln.example"],
        ["--public-host", "kiln:4973"],
        ["--public-host", "kiln.example:80"],
        ["--public-host", "[::1]:4973"],
    ] {
        assert!(resolve(&args).is_ok(), "{args:?}: {:?}", resolve(&args));
    }
    let error = resolve(&["--require-isolation", "--accel", "tcg"]).unwrap_err();
    assert!(error.contains("--accel") && error.contains("isolates nothing"), "{error}");
    let strict = resolve(&["--require-isolation"]).unwrap();
    assert!(strict.require_isolation && strict.accel == Accel::Auto);
    for bad in [["--accel", "xen"], ["--data-dir", ""], ["--listen", "4973"]] {
        assert!(Command::try_parse_from(["kiln"].iter().chain(&bad)).is_err(), "{bad:?}");
    }
    assert!(with_file("data_dir = \"\"", &[]).unwrap_err().contains("--data-dir"));
}

#[test]
fn lists_come_repeated_or_with_commas() {
    let one = resolve(&["--egress-permit", "10.0.0.0/8", "--egress-permit", "::1"]).unwrap();
    let other = resolve(&["--egress-permit", "10.0.0.0/8,::1"]).unwrap();
    assert_eq!(one.egress_permit, other.egress_permit);
    assert_eq!(one.egress_permit.len(), 2);
    let one = resolve(&["--upstream", "docker.io=https://m.example", "--upstream", "quay.io"]);
    let other = resolve(&["--upstream", "docker.io=https://m.example,quay.io"]);
    assert_eq!(one.unwrap().upstream, other.unwrap().upstream);
    let twice = resolve(&["--upstream", "quay.io,quay.io=https://m.example"]).unwrap_err();
    assert!(twice.contains("quay.io") && twice.contains("once"), "{twice}");
    let many = |n: usize| (0..n).map(|n| format!("r{n}.example")).collect::<Vec<_>>().join(",");
    assert!(resolve(&["--upstream", &many(MAX_UPSTREAMS)]).is_ok());
    assert!(resolve(&["--upstream", &many(MAX_UPSTREAMS + 1)]).unwrap_err().contains("at most"));
}

#[test]
fn programs_are_looked_for() {
    let dir = tempfile::tempdir().unwrap();
    let bin = dir.path().join(".cargo/bin");
    std::fs::create_dir_all(&bin).unwrap();
    let program = bin.join("vhost-device-vsock");
    let host = Host { home: Some(dir.path().into()), path: Some("relative:".into()), ..host() };
    let look = || host.program("f", None, "vhost-device-vsock").unwrap();
    std::fs::write(&program, "").unwrap();
    assert_ne!(look(), program, "what cannot be executed is no program");
    std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755))
        .unwrap();
    if !USUALLY_INSTALLED.iter().any(|place| Path::new(place).join("vhost-device-vsock").exists()) {
        assert_eq!(look(), program);
    }
    let first = Host { path: Some(bin.clone().into()), ..host.clone() };
    assert_eq!(first.program("f", None, "vhost-device-vsock").unwrap(), program);
    assert_eq!(host.program("f", None, "no-such-program").unwrap(), Path::new("no-such-program"));
}

const USUALLY_INSTALLED: [&str; 5] =
    ["/usr/libexec/kiln", "/usr/local/bin", "/usr/bin", "/usr/sbin", "/bin"];

#[test]
fn the_docs_have_every_setting() {
    let docs = include_str!("../../../docs/CONFIG.md");
    let command = ServeArgs::augment_args(clap::Command::new("serve"));
    for arg in command.get_arguments() {
        let flag = arg.get_long().unwrap();
        let (key, variable) =
            (flag.replace('-', "_"), format!("KILN_{}", flag.replace('-', "_").to_uppercase()));
        assert_eq!(arg.get_env().unwrap(), variable.as_str());
        let key = if flag == "config" { "–".to_owned() } else { format!("`{key}`") };
        let row = format!("| `--{flag}` | `{variable}` | {key} |");
        assert!(docs.contains(&row), "docs/CONFIG.md has no row {row}");
    }
}
