//! TLS: a certificate and its key, read again when they have changed.

use rustls::ServerConfig;
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};
use tokio_rustls::TlsAcceptor;

/// What a server shows to its clients, TLS 1.2 and 1.3. A clone is another handle on the same.
#[derive(Clone)]
pub struct Tls {
    files: [PathBuf; 2],
    config: Arc<RwLock<Arc<ServerConfig>>>,
}

impl Tls {
    /// From files in PEM: the certificate with those that vouch for it behind it, and its private key.
    ///
    /// # Errors
    /// When a file cannot be read, has none, or they don't belong together.
    pub fn open(certificate: &Path, key: &Path) -> Result<Tls, String> {
        let config = Arc::new(read(certificate, key)?);
        Ok(Tls { files: [certificate.into(), key.into()], config: Arc::new(RwLock::new(config)) })
    }

    /// Reads the files again, for connections from now on.
    ///
    /// # Errors
    /// As in [`Tls::open`]; what was read before stays.
    pub fn reload(&self) -> Result<(), String> {
        let config = Arc::new(read(&self.files[0], &self.files[1])?);
        *self.config.write().unwrap_or_else(|e| e.into_inner()) = config;
        Ok(())
    }

    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        self.config.read().unwrap_or_else(|e| e.into_inner()).clone().into()
    }
}

fn read(certificate: &Path, key: &Path) -> Result<ServerConfig, String> {
    let of = |path: &Path, e: &dyn std::fmt::Display| format!("{}: {e}", path.display());
    let chain: Vec<_> =
        CertificateDer::pem_file_iter(certificate).and_then(Iterator::collect).map_err(|e| of(certificate, &e))?;
    if chain.is_empty() {
        return Err(of(certificate, &"it has no certificate (BEGIN CERTIFICATE)"));
    }
    let secret = PrivateKeyDer::from_pem_file(key).map_err(|e| of(key, &e))?;
    let config =
        ServerConfig::builder_with_provider(Arc::new(ring::default_provider())).with_safe_default_protocol_versions();
    let config = config.map_err(|e| e.to_string())?.with_no_client_auth().with_single_cert(chain, secret);
    config.map_err(|e| format!("{} and {}: {e}", certificate.display(), key.display()))
}
