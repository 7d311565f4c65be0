//! Certificates of a test's own authority, made by openssl.

use std::path::{Path, PathBuf};
use std::process::Command;

use kiln::config::TlsFiles;

/// An authority that nobody knows.
pub struct Authority {
    dir: tempfile::TempDir,
}

const KEY: [&str; 5] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"];

impl Authority {
    pub fn new() -> Self {
        let authority = Self { dir: tempfile::tempdir().unwrap() };
        let subject = ["-days", "2", "-subj", "/CN=an authority"];
        let files = ["-keyout", "ca.key", "-out", "ca.crt"];
        authority.openssl(&[&["req", "-x509"][..], &KEY, &subject, &files].concat());
        authority
    }

    /// Its own certificate, in a directory that has nothing else that skopeo would take.
    pub fn file(&self) -> PathBuf {
        self.dir.path().join("ca.crt")
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A certificate for this host, and its key.
    pub fn issue(&self, name: &str) -> TlsFiles {
        let file = |end: &str| format!("{name}.{end}");
        let (key, request, cert) = (file("secret"), file("request"), file("pem"));
        let extensions =
            "subjectAltName=IP:127.0.0.1,DNS:localhost\nbasicConstraints=critical,CA:FALSE\n";
        std::fs::write(self.dir.path().join("extensions"), extensions).unwrap();
        let files = ["-subj", "/CN=a server", "-keyout", &key, "-out", &request];
        self.openssl(&[&["req", "-new"][..], &KEY, &files].concat());
        let signed = ["-CA", "ca.crt", "-CAkey", "ca.key", "-days", "2", "-extfile", "extensions"];
        self.openssl(&[&["x509", "-req", "-in", &request][..], &signed, &["-out", &cert]].concat());
        TlsFiles { cert: self.dir.path().join(cert), key: self.dir.path().join(key) }
    }

    fn openssl(&self, args: &[&str]) {
        let made =
            Command::new("openssl").args(args).current_dir(self.dir.path()).output().unwrap();
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    }
}
