//! HTTPS on the one listener: curl, skopeo and `kiln` know the server by its authority, and refuse another's.

use std::process::{Output, Stdio};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kiln::build::{BuildId, Tenant};
use kiln::gateway::{self, Authorizer, Backing, Caller, GatewayState, TokenKeys};
use kiln::serve::{Connections, Tls};
use kiln::store::{Role, Store, StoreError};
use kiln_protocol::exec::Stream;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio_util::sync::CancellationToken;

use crate::agent::Vm;
use crate::certificates::Authority;
use crate::support::{Server, form, id_of, server};

/// A server's API and a gateway, over TLS.
struct Secure {
    server: Server,
    authority: Authority,
    address: String,
    _stop: tokio_util::sync::DropGuard,
}

impl Secure {
    async fn start() -> Self {
        let authority = Authority::new();
        let tls = Tls::load(authority.issue("server")).unwrap();
        Self::over(tls, authority).await
    }

    async fn over(tls: Tls, authority: Authority) -> Self {
        let server = server().await;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let registry = crate::registry::start().await;
        let app = server.app.clone().merge(gateway::router(GatewayState {
            backing: Backing::external(&registry, None).unwrap(),
            authorizer: Arc::new(Tokens(server.store.clone())),
            keys: Arc::new(TokenKeys::load_or_create(&server.data.join("key")).unwrap()),
            public_url: format!("https://{address}").parse().unwrap(),
        }));
        let stop = CancellationToken::new();
        tokio::spawn(Connections::default().over(Some(tls)).serve(listener, app, stop.clone()));
        Self { server, authority, address, _stop: stop.drop_guard() }
    }

    fn kiln(&self, authority: &Authority, token: &str, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kiln"));
        command
            .args(args)
            .env("KILN_URL", format!("https://{}", self.address))
            .env("KILN_CA_FILE", authority.file())
            .env("KILN_TOKEN", token)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        command
    }
}

struct Tokens(Arc<dyn Store>);

#[async_trait]
impl Authorizer for Tokens {
    async fn api_token(&self, token: &str) -> Result<Option<Caller>, StoreError> {
        let caller = kiln::token::verify(self.0.as_ref(), token, 1).await.ok();
        Ok(caller.map(|caller| Caller { tenant: caller.tenant, role: caller.role }))
    }

    async fn build_owner(&self, _: &BuildId) -> Result<Option<Tenant>, StoreError> {
        Ok(None)
    }
}

async fn run(program: &str, args: &[&str]) -> Output {
    Command::new(program).args(args).stdin(Stdio::null()).output().await.unwrap()
}

async fn curl(authority: &Authority, args: &[&str]) -> Output {
    let file = authority.file();
    run("curl", &[&["-sS", "--cacert", file.to_str().unwrap()], args].concat()).await
}

fn out(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn err(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// What curl says of a certificate that it does not trust.
const NOT_TRUSTED: Option<i32> = Some(60);

#[tokio::test]
async fn curl_trusts_the_authority_and_no_other() {
    let secure = Secure::start().await;
    let url = format!("https://{}/health", secure.address);
    let told = ["-w", " %{http_version} %{ssl_verify_result}", &url];
    assert_eq!(out(&curl(&secure.authority, &told).await), "{\"status\":\"ok\"} 1.1 0");
    let by_name = url.replace("127.0.0.1", "localhost");
    assert!(curl(&secure.authority, &[&by_name]).await.status.success());
    for version in ["--tlsv1.3", "--tls-max=1.2"] {
        let args: Vec<_> = version.split('=').chain([&*url]).collect();
        assert!(curl(&secure.authority, &args).await.status.success(), "{version}");
    }
    assert_eq!(curl(&Authority::new(), &[&url]).await.status.code(), NOT_TRUSTED);
    assert_eq!(run("curl", &["-sS", &url]).await.status.code(), NOT_TRUSTED);
    // Who speaks plain HTTP to it gets nothing.
    let plain = run("curl", &["-sS", &url.replace("https", "http")]).await;
    assert!(!plain.status.success());
}

#[tokio::test]
async fn kiln_speaks_https_with_an_authority_of_its_own() {
    let secure = Secure::start().await;
    let client = secure.server.client("acme", Role::Tenant).await;
    let build = client.submit(form()).await;
    let ls = ["ls", "--format", "json"];
    let listed = secure.kiln(&secure.authority, &client.token, &ls).output().await.unwrap();
    assert!(listed.status.success(), "{}", err(&listed));
    assert!(out(&listed).contains(build["id"].as_str().unwrap()));

    let other = Authority::new();
    let refused = secure.kiln(&other, &client.token, &ls).output().await.unwrap();
    assert_eq!(refused.status.code(), Some(3), "{}", err(&refused));
    assert!(err(&refused).contains("certificate"), "{}", err(&refused));
    let mut command = secure.kiln(&other, &client.token, &ls);
    let system = command.env_remove("KILN_CA_FILE").output().await.unwrap();
    assert_eq!(system.status.code(), Some(3), "{}", err(&system));

    let key = secure.authority.dir().join("server.secret");
    for (file, why) in [("/nowhere.pem", "No such file"), (key.to_str().unwrap(), "no certificate")]
    {
        let args = [&ls[..], &["--ca-file", file]].concat();
        let refused = secure.kiln(&other, &client.token, &args).output().await.unwrap();
        assert_eq!(refused.status.code(), Some(2), "{}", err(&refused));
        let said = err(&refused);
        assert!(said.contains(&format!("--ca-file {file}: ")) && said.contains(why), "{said}");
    }
}

#[tokio::test]
async fn a_session_goes_through_tls() {
    let secure = Secure::start().await;
    let client = secure.server.client("acme", Role::Tenant).await;
    let id = id_of(&client.submit(form()).await);
    secure.server.scheduler.claim().await;
    let vm = Vm::new();
    let _open = secure.server.scheduler.door(&id).open(vm.entrance());
    let args = ["exec", "-i", id.as_str(), "--", "cat"];
    let mut command = secure.kiln(&secure.authority, &client.token, &args);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let (mut agent, _) = vm.started().await;
    let mut input = child.stdin.take().unwrap();
    input.write_all(b"through").await.unwrap();
    drop(input);
    assert_eq!(agent.input().await.unwrap(), b"through");
    agent.print(Stream::Out, b"and back").await;
    agent.exit(7).await;
    let output = child.wait_with_output().await.unwrap();
    assert_eq!(
        (out(&output).as_str(), output.status.code()),
        ("and back", Some(7)),
        "{}",
        err(&output)
    );
}

#[tokio::test]
async fn skopeo_logs_in_and_inspects_over_tls() {
    let secure = Secure::start().await;
    let client = secure.server.client("a", Role::Reader).await;
    let challenge =
        curl(&secure.authority, &["-i", &format!("https://{}/v2/", secure.address)]).await;
    let realm = format!("realm=\"https://{}/v2/token\"", secure.address);
    assert!(out(&challenge).contains(&realm), "{}", out(&challenge));

    let other = Authority::new();
    let auth = secure.server.data.join("auth.json");
    for (authority, trusted) in [(&secure.authority, true), (&other, false)] {
        let certificates = tempfile::tempdir().unwrap();
        std::fs::copy(authority.file(), certificates.path().join("ca.crt")).unwrap();
        let dir = ["--cert-dir", certificates.path().to_str().unwrap()];
        let file = ["--authfile", auth.to_str().unwrap()];
        let who = ["-u", "any", "-p", &client.token, &secure.address];
        let login = run("skopeo", &[&["login"][..], &dir, &file, &who].concat()).await;
        assert_eq!(login.status.success(), trusted, "{}", err(&login));
        let image = format!("docker://{}/a/app:latest", secure.address);
        let raw = ["--raw", &image];
        let inspected = run("skopeo", &[&["inspect"][..], &dir, &file, &raw].concat()).await;
        assert_eq!(inspected.status.success(), trusted, "{}", err(&inspected));
    }
}

#[tokio::test]
async fn a_handshake_has_a_deadline_and_a_place() {
    let authority = Authority::new();
    let deadline = Duration::from_millis(300);
    let tls = Tls::with_bounds(authority.issue("server"), 1, deadline).unwrap();
    let secure = Secure::over(tls, authority).await;
    let mut silent = TcpStream::connect(&secure.address).await.unwrap();
    let ended = silent.read(&mut [0; 16]).await;
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    // One that has begun and stops has the only place, and gives it back.
    let mut begun = TcpStream::connect(&secure.address).await.unwrap();
    begun.write_all(&[0x16, 0x03, 0x01]).await.unwrap();
    let url = format!("https://{}/health", secure.address);
    let again = curl(
        &secure.authority,
        &["--retry", "20", "--retry-all-errors", "--retry-delay", "1", &url],
    )
    .await;
    assert_eq!(out(&again), "{\"status\":\"ok\"}", "{}", err(&again));
    let ended = begun.read(&mut [0; 16]).await;
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
}

/// `kiln serve` with flags that it cannot take: what it says.
async fn refused(flags: &[&str]) -> String {
    let data = tempfile::tempdir().unwrap();
    let dir = data.path().to_str().unwrap();
    let dirs = ["serve", "--listen", "127.0.0.1:0", "--data-dir", dir, "--run-dir", dir];
    let output = run(env!("CARGO_BIN_EXE_kiln"), &[&dirs, flags].concat()).await;
    assert_eq!(output.status.code(), Some(2), "{}", err(&output));
    assert_eq!(std::fs::read_dir(dir).unwrap().count(), 0, "it has begun");
    err(&output)
}

#[tokio::test]
async fn what_cannot_be_is_refused_by_name_before_anything_is_served() {
    let authority = Authority::new();
    let (one, two) = (authority.issue("one"), authority.issue("two"));
    let text = |path: &std::path::Path| path.to_str().unwrap().to_owned();
    let (cert, key, other) = (text(&one.cert), text(&one.key), text(&two.key));
    let said = refused(&["--tls-cert", &cert]).await;
    assert!(said.contains("--tls-key is needed here: --tls-cert is given"), "{said}");
    let said = refused(&["--tls-key", &key]).await;
    assert!(said.contains("--tls-cert is needed here: --tls-key is given"), "{said}");
    let said = refused(&["--tls-cert", "/nowhere.pem", "--tls-key", &key]).await;
    assert!(said.contains("--tls-cert /nowhere.pem cannot be used: No such file"), "{said}");
    let said = refused(&["--tls-cert", &key, "--tls-key", &key]).await;
    assert!(said.contains("it holds no certificate as PEM"), "{said}");
    let said = refused(&["--tls-cert", &cert, "--tls-key", &cert]).await;
    assert!(said.contains("it holds no private key without a passphrase as PEM"), "{said}");
    let said = refused(&["--tls-cert", &cert, "--tls-key", &other]).await;
    assert!(said.contains("cannot be used together"), "{said}");
}

#[tokio::test]
async fn a_renewed_certificate_is_taken_at_sighup_and_a_broken_one_is_not() {
    let bundle = tempfile::tempdir().unwrap();
    crate::bundle::whole(bundle.path());
    let (old, new) = (Authority::new(), Authority::new());
    let (files, renewed) = (old.issue("server"), new.issue("server"));
    let flags =
        ["--tls-cert", files.cert.to_str().unwrap(), "--tls-key", files.key.to_str().unwrap()];
    let server = crate::real::Server::start_without_vms_with(bundle.path(), &flags);
    let url = format!("https://{}/ready", server.address);
    assert!(curl(&old, &["--fail", &url]).await.status.success(), "{}", server.log());
    let challenge = curl(&old, &["-i", &url.replace("/ready", "/v2/")]).await;
    assert!(out(&challenge).contains("realm=\"https://"), "{}", out(&challenge));

    let pid = Pid::from_raw(server.pid().try_into().unwrap());
    let hang_up = async |says: &str| {
        kill(pid, Signal::SIGHUP).unwrap();
        while !server.log().contains(says) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    std::fs::write(&files.cert, "half a file").unwrap();
    hang_up("certificate and key stay as they were").await;
    assert!(curl(&old, &["--fail", &url]).await.status.success());

    std::fs::copy(&renewed.cert, &files.cert).unwrap();
    std::fs::copy(&renewed.key, &files.key).unwrap();
    hang_up("read certificate and key again").await;
    assert!(curl(&new, &["--fail", &url]).await.status.success());
    assert_eq!(curl(&old, &[&url]).await.status.code(), NOT_TRUSTED);
    tokio::task::spawn_blocking(|| server.stop()).await.unwrap();
}
