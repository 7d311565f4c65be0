//! What steps of real VMs reach through the host.

#![allow(clippy::unwrap_used, missing_docs)]

mod support;

use std::io::{Read as _, Write as _};
use std::net::TcpListener;

use support::{BASE, Server, text};

/// More than all buffers on the way hold together, by far.
const BYTES: usize = 96 << 20;

/// A step sends back whatever comes, and takes no more than it sends back: all buffers on the way fill, both ways.
#[test]
fn vm_a_connection_that_is_full_both_ways_goes_on() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let far_end = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut output = stream.try_clone().unwrap();
        let writing = std::thread::spawn(move || {
            for index in 0..BYTES / CHUNK {
                output.write_all(&chunk(index)).unwrap();
            }
        });
        let mut read = vec![0; CHUNK];
        for index in 0..BYTES / CHUNK {
            stream.read_exact(&mut read).unwrap();
            assert!(read == chunk(index), "chunk {index} came back as another one");
        }
        writing.join().unwrap();
    });
    let server = Server::start_with(&["--egress-permit", "127.0.0.0/8"]);
    let step = format!(
        "exec 3<>/dev/tcp/127.0.0.1/3128; printf 'CONNECT 127.0.0.1:{port} HTTP/1.1\\r\\nHost: 127.0.0.1:{port}\\r\\n\\r\\n' >&3; \
         while read -r line <&3 && [[ $line != $'\\r' ]]; do echo \"$line\"; done; cat <&3 >&3"
    );
    let dockerfile = format!("FROM {BASE}\nSHELL [\"bash\", \"-c\"]\nRUN {step}\n");
    let built = server.build(&[("Dockerfile", dockerfile.as_bytes())], &["--network", "open"]);
    assert!(built.status.success(), "{}", text(built.stderr));
    far_end.join().unwrap();
    server.stop();
}

const CHUNK: usize = 64 * 1024;

/// No two are alike.
fn chunk(index: usize) -> Vec<u8> {
    let number = u32::try_from(index).unwrap().to_le_bytes();
    number.iter().copied().cycle().take(CHUNK).collect()
}
