//! Unmodified Dockerfiles whose images are another registry's: a real one, and real VMs.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use serde_json::{Value, json};
use support::image::Image;
use support::registry::Registry;
use support::{Server, text};

fn ready(server: &Server, id: &str) -> Value {
    let build = server.wait(id);
    assert_eq!(
        build["status"],
        "ready",
        "{build}\n{}\n{}",
        text(server.run(&["logs", id]).stdout),
        server.log()
    );
    build
}

#[test]
fn vm_an_unmodified_dockerfile_is_built_from_an_upstream_that_is_asked_once() {
    let upstream = Registry::start();
    let digest = upstream.push("some/name:1");
    let flag = format!("docker.io=http://{}", upstream.address);
    let server = Server::start_with(&["--upstream", &flag]);
    let dockerfile = "FROM some/name:1\nRUN echo made >/made\n\
                      COPY --from=docker.io/some/name:1 /from /copied\n\
                      RUN --mount=from=some/name:1,target=/other cat /other/from /copied\n";
    let first = server.submit(&[("Dockerfile", dockerfile.as_bytes())], &[]);
    let build = ready(&server, &first);
    let pulled = json!([{"reference": "docker.io/some/name:1", "digest": digest}]);
    assert_eq!(build["pulled"], pulled);
    let log = text(server.run(&["logs", &first]).stdout);
    assert_eq!(log.matches("elsewhere").count(), 2, "{log}");
    assert_eq!(upstream.blobs(), 2, "the config and the layer");
    let image =
        Image::copy(&server, build["image_ref"].as_str().unwrap_or_else(|| panic!("{build}")));
    assert!(image.layers.len() >= 2, "{:?}", image.layers);

    // The host checks that the base is the one that was asked for.
    let pinned =
        server.post("FROM some/name:1\nRUN echo again >/made\n", &[("base_image_digest", &digest)]);
    let build = ready(&server, &pinned);
    let by_digest =
        json!([{"reference": format!("docker.io/some/name@{digest}"), "digest": digest}]);
    assert_eq!(build["pulled"], by_digest);
    assert_eq!(upstream.blobs(), 2, "they are on this host");

    let asks = "could not be pulled: quay.io is not an upstream of this host: ask the operator for --upstream quay.io";
    for dockerfile in [
        "FROM quay.io/org/name:1\n",
        "FROM some/name:1\nCOPY --from=quay.io/org/name:1 /a /b\n",
        "FROM some/name:1\nRUN --mount=from=quay.io/org/name:1,target=/other true\n",
    ] {
        let unknown = server.submit(&[("Dockerfile", dockerfile.as_bytes())], &[]);
        let build = server.wait(&unknown);
        assert_eq!(build["failure"]["kind"], "pull_failed", "{build}");
        let message = build["failure"]["message"].as_str().unwrap();
        assert_eq!(message, format!("the image quay.io/org/name:1 {asks}"));
    }
    let absent = server.submit(&[("Dockerfile", b"FROM some/other\n")], &[]);
    let build = server.wait(&absent);
    assert_eq!(build["failure"]["kind"], "pull_failed", "{build}");
    let message = build["failure"]["message"].as_str().unwrap();
    assert!(message.contains("docker.io has no some/other:latest"), "{message}");
    server.stop();
}
