//! The requests of a push as skopeo, podman and buildah make them: of each blob whether it is there, else its upload, several at one
//! time; the manifest last.

use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::client::Connection;
use super::image::{Blob, Image, MANIFEST};

/// A tenant of the server's token may write below its own name.
const SPACE: &str = "dev";

/// The two ways to one registry.
pub struct Ways<'a> {
    pub registry: &'a Path,
    pub gateway: SocketAddr,
    pub token: &'a str,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Straight,
    Gateway,
}

impl Ways<'_> {
    /// A line for every pair.
    pub fn measure(&self, pairs: usize) -> anyhow::Result<()> {
        for pair in 0..pairs {
            let (straight, gateway);
            // Who goes first changes from pair to pair.
            if pair.is_multiple_of(2) {
                straight = self.run(Way::Straight, pair)?;
                gateway = self.run(Way::Gateway, pair)?;
            } else {
                gateway = self.run(Way::Gateway, pair)?;
                straight = self.run(Way::Straight, pair)?;
            }
            let ((straight, straight_again), (gateway, gateway_again)) = (straight, gateway);
            let times = [straight, gateway, straight_again, gateway_again];
            let times = times.map(|time| format!("{:.1}", time.as_secs_f64() * 1000.0));
            println!("{}", times.join(" "));
        }
        Ok(())
    }

    /// A fresh image into a repository of its own, and once more.
    fn run(&self, way: Way, pair: usize) -> anyhow::Result<(Duration, Duration)> {
        let image = Image::fresh()?;
        let name = if way == Way::Straight { "straight" } else { "gateway" };
        let repository = format!("{SPACE}/bench-push-{name}-{pair}");
        let bytes: usize = image.layers.iter().chain([&image.config]).map(|b| b.bytes.len()).sum();
        let begun = Instant::now();
        ensure!(self.push(way, &image, &repository)? == bytes, "something was there before");
        let first = begun.elapsed();
        let begun = Instant::now();
        ensure!(self.push(way, &image, &repository)? == 0, "blobs were sent twice");
        let again = begun.elapsed();
        self.remove(&image, &repository)?;
        Ok((first, again))
    }

    /// How many bytes of blobs were sent.
    fn push(&self, way: Way, image: &Image, repository: &str) -> anyhow::Result<usize> {
        let token = match way {
            Way::Straight => None,
            Way::Gateway => Some(self.login(repository)?),
        };
        let connect = || self.connect(way, token.as_deref());
        let mut sent = std::thread::scope(|scope| {
            let blob = |blob| move || upload(&mut connect()?, repository, blob);
            let layers: Vec<_> = image.layers.iter().map(|l| scope.spawn(blob(l))).collect();
            layers.into_iter().try_fold(0, |sum, layer| {
                let sent = layer.join().map_err(|_| anyhow::anyhow!("a thread broke down"))?;
                anyhow::Ok(sum + sent?)
            })
        })?;
        let mut connection = connect()?;
        sent += upload(&mut connection, repository, &image.config)?;
        let path = format!("/v2/{repository}/manifests/v1");
        connection.send("PUT", &path, MANIFEST, &image.manifest.bytes)?.expect(201)?;
        Ok(sent)
    }

    fn connect(&self, way: Way, bearer: Option<&str>) -> anyhow::Result<Connection> {
        if way == Way::Straight {
            let stream = UnixStream::connect(self.registry.join("run/registry.sock"))?;
            return Ok(Connection::new(Box::new(stream), bearer));
        }
        let stream = TcpStream::connect(self.gateway)?;
        stream.set_nodelay(true)?;
        Ok(Connection::new(Box::new(stream), bearer))
    }

    /// As a client does: it is refused, and asks for what it lacks.
    fn login(&self, repository: &str) -> anyhow::Result<String> {
        let mut connection = self.connect(Way::Gateway, None)?;
        connection.ask("GET", "/v2/", "")?.expect(401)?;
        let path = format!("/v2/token?service=kiln&scope=repository:{repository}:pull,push");
        let login = STANDARD.encode(format!("any:{}", self.token));
        let answer = connection.ask("GET", &path, &format!("Authorization: Basic {login}\r\n"))?;
        let answer: serde_json::Value = serde_json::from_slice(&answer.expect(200)?.body)?;
        Ok(answer["token"].as_str().context("no token")?.to_owned())
    }

    /// Disks are not to be full of it, nor busy with it while the next is measured.
    fn remove(&self, image: &Image, repository: &str) -> anyhow::Result<()> {
        let storage = self.registry.join("storage/docker/registry/v2");
        for blob in image.blobs() {
            let hex = blob.digest.hex();
            std::fs::remove_dir_all(storage.join("blobs/sha256").join(&hex[..2]).join(hex))?;
        }
        Ok(std::fs::remove_dir_all(storage.join("repositories").join(repository))?)
    }
}

/// How many bytes were sent.
fn upload(to: &mut Connection, repository: &str, blob: &Blob) -> anyhow::Result<usize> {
    let path = format!("/v2/{repository}/blobs/{}", blob.digest);
    let there = to.ask("HEAD", &path, "")?;
    if there.status == 200 {
        return Ok(0);
    }
    there.expect(404)?;
    let begun = to.ask("POST", &format!("/v2/{repository}/blobs/uploads/"), "")?.expect(202)?;
    let location = begun.header("location").context("no location")?;
    let sent = to.stream("PATCH", location, &blob.bytes)?.expect(202)?;
    let location = sent.header("location").context("no location")?;
    let end = format!("{location}&digest={}", blob.digest);
    to.ask("PUT", &end, "")?.expect(201)?;
    Ok(blob.bytes.len())
}
