//! TLS on the one listener, for API and gateway: rustls with aws-lc-rs, TLS 1.2 and 1.3.
//!
//! Certificate and key are read again at SIGHUP. What cannot be used then is told in the log, and what was used before goes on:
//! a renewal that went wrong half-way does not take the server away.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::config::TlsFiles;

/// A client has so long for the whole handshake, with the wait for a place: nobody is trusted with a connection for
/// longer before it has sent anything of HTTP's.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Handshakes at one time. Each is a signature, and some kilobytes.
const HANDSHAKES: usize = 512;

/// Certificates that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file is not there, or not of the form.
    #[error("--{flag} {path} cannot be used: {why}", path = path.display())]
    File {
        /// The setting, by its flag.
        flag: &'static str,
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// They do not go together, or not with this program.
    #[error("--tls-cert {cert} and --tls-key {key} cannot be used together: {source}", cert = files.cert.display(), key = files.key.display())]
    Pair {
        /// Both.
        files: TlsFiles,
        /// What rustls says.
        source: rustls::Error,
    },
}

/// Makes connections into TLS connections.
#[derive(Clone)]
pub struct Tls {
    files: TlsFiles,
    current: Arc<RwLock<Arc<ServerConfig>>>,
    places: Arc<Semaphore>,
    deadline: Duration,
}

impl Tls {
    /// With the certificate and key in these files.
    pub fn load(files: TlsFiles) -> Result<Self, TlsError> {
        Self::with_bounds(files, HANDSHAKES, HANDSHAKE)
    }

    /// With other bounds: of handshakes at one time, and of the time for one.
    pub fn with_bounds(
        files: TlsFiles,
        handshakes: usize,
        deadline: Duration,
    ) -> Result<Self, TlsError> {
        let current = Arc::new(RwLock::new(Arc::new(read(&files)?)));
        Ok(Self { files, current, places: Arc::new(Semaphore::new(handshakes)), deadline })
    }

    /// Reads the files again, for the connections from now on.
    pub fn reload(&self) -> Result<(), TlsError> {
        let fresh = Arc::new(read(&self.files)?);
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = fresh;
        Ok(())
    }

    /// A client's handshake.
    pub(super) async fn accept<S>(&self, stream: S) -> std::io::Result<TlsStream<S>>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let handshake = async {
            let place = self.places.acquire().await.map_err(std::io::Error::other)?;
            let config = Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner));
            let accepted = TlsAcceptor::from(config).accept(stream).await;
            drop(place);
            accepted
        };
        tokio::time::timeout(self.deadline, handshake).await?
    }
}

fn read(files: &TlsFiles) -> Result<ServerConfig, TlsError> {
    let certificates = CertificateDer::pem_file_iter(&files.cert)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .and_then(|all| if all.is_empty() { Err(pem::Error::NoItemsFound) } else { Ok(all) })
        .map_err(unusable("tls-cert", &files.cert, "certificate"))?;
    let key = PrivateKeyDer::from_pem_file(&files.key).map_err(unusable(
        "tls-key",
        &files.key,
        "private key without a passphrase",
    ))?;
    let mut config = ServerConfig::builder()
        .with_no_client_auth()
        .with_single_cert(certificates, key)
        .map_err(|source| TlsError::Pair { files: files.clone(), source })?;
    // The listener speaks nothing else.
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(config)
}

fn unusable<'a>(
    flag: &'static str,
    path: &'a Path,
    what: &'a str,
) -> impl FnOnce(pem::Error) -> TlsError + 'a {
    move |error| {
        let why = match error {
            pem::Error::NoItemsFound => format!("it holds no {what} as PEM"),
            pem::Error::Io(error) => error.to_string(),
            error => format!("it is not PEM: {error}"),
        };
        TlsError::File { flag, path: path.to_owned(), why }
    }
}
