//! A disk that is full: nothing new is taken, what runs ends with a cause, and when there is room again all works again.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{oneshot, watch};
use tokio_util::sync::CancellationToken;

use super::agent::{Agent, Place};
use super::server::Home;
use super::{Client, PATIENCE, boot, source};

/// Of the disk. VMs start where there is a GiB free.
const MIB: u64 = 1200;

/// A file system of its own, in memory, for as long as this lives.
pub struct Small(pub PathBuf);

impl Small {
    pub fn mount(at: &Path) -> Self {
        std::fs::create_dir(at).unwrap();
        let size = format!("size={MIB}m,mode=700");
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("none"), at, Some("tmpfs"), flags, Some(&*size)).unwrap();
        Self(at.to_owned())
    }

    /// Takes all of it.
    fn fill(&self) -> PathBuf {
        let path = self.0.join("filler");
        let mut file = File::create(&path).unwrap();
        let chunk = vec![1; 1 << 20];
        let full = loop {
            if let Err(error) = file.write_all(&chunk) {
                break error;
            }
        };
        assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
        path
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

/// The directory of the one VM, once it is there.
pub async fn place(home: &Home) -> (Arc<Place>, String) {
    let begun = tokio::time::Instant::now();
    loop {
        let vms = home.run_dir().and_then(|dir| std::fs::read_dir(dir).ok());
        for vm in vms.into_iter().flatten().flatten() {
            if let Some(place) = Place::of(&vm.path()) {
                return (Arc::new(place), vm.file_name().to_string_lossy().into_owned());
            }
        }
        assert!(begun.elapsed() < PATIENCE, "no VM starts");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// The status and the code of what a submit is answered.
pub async fn submit(client: &Client) -> (u16, Value) {
    let form =
        reqwest::multipart::Form::new().part("source", reqwest::multipart::Part::bytes(source()));
    let url = format!("http://{}/builds", *client.address.borrow());
    let asked = client.http.post(url).bearer_auth(&client.token).multipart(form);
    let answer = asked.send().await.unwrap();
    let status = answer.status().as_u16();
    (status, answer.json::<Value>().await.unwrap())
}

#[test]
fn a_full_disk_takes_nothing_new_and_what_runs_ends_with_a_cause() {
    let home = Arc::new(Home::new());
    let small = Small::mount(&home.data());
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let server = home.serve(None);
    let (_told, address) = watch::channel(server.address.clone().expect("it starts"));
    let client = Client { http: reqwest::Client::new(), address, token: home.token() };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let id = client.submit("before").await;
        let (place, name) = place(&home).await;
        let (print, may_print) = oneshot::channel();
        // More than the database has room for where it is.
        let agent = Agent::new(place, name).printing(1024, 16 * 1024, may_print);
        let agent = tokio::spawn(agent.run());

        let filler = small.fill();
        let (status, refused) = submit(&client).await;
        assert_eq!((status, &refused["code"]), (507, &"disk_full".into()), "{refused}");
        assert!(refused["detail"].as_str().unwrap().contains("disk is full"), "{refused}");
        assert_eq!(client.build(&id).await["status"], "building");

        print.send(()).unwrap();
        let build = client.end(&id).await;
        let failure = &build["failure"];
        assert_eq!(failure["kind"], "internal", "{build}");
        assert!(failure["message"].as_str().unwrap().contains("disk is full"), "{build}");
        agent.await.unwrap();

        std::fs::remove_file(filler).unwrap();
        let down = CancellationToken::new();
        let agents = tokio::spawn(boot(Arc::clone(&home), down.clone()));
        let id = client.submit("after").await;
        let build = client.end(&id).await;
        assert_eq!(build["status"], "ready", "{build}");
        down.cancel();
        agents.await.unwrap();
    });
    server.stop();
    assert_eq!(home.processes(), Vec::<PathBuf>::new());
}
