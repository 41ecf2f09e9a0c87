//! TLS with a server: the certificates that it is believed by, ours where it asks for one, and what is wrong with
//! either.

use std::error::Error as StdError;

use reqwest::{Certificate, ClientBuilder, Identity};
use rustls::{AlertDescription, CertificateError, InvalidMessage};

use foundation::error::{Error, ErrorKind, Result};

pub(crate) const WANTS_CERTIFICATE: &str =
    "set source.tls.client_certificate and source.tls.client_key to those that the server knows, or renew them";

const SELF_SIGNED_CA: &str = "the server needs a certificate that is not a CA's: signed by one, or self-signed with \
    `basicConstraints=CA:FALSE` (openssl req -x509 -addext basicConstraints=critical,CA:FALSE …); source.tls.ca_file \
    then names its PEM";

/// Certificates beside those of the system.
#[derive(Clone, Default)]
pub struct TlsSettings {
    authorities: Vec<Certificate>,
    identity: Option<Identity>,
}

impl std::fmt::Debug for TlsSettings {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (authorities, has_identity) = (self.authorities.len(), self.identity.is_some());
        write!(formatter, "TlsSettings {{ {authorities} authorities, client certificate: {has_identity} }}")
    }
}

impl TlsSettings {
    /// Trusts the certificates of a PEM beside the system's. `Err` says what is wrong with it.
    pub fn trust(&mut self, pem: &str) -> Result<(), String> {
        let found =
            Certificate::from_pem_bundle(pem.as_bytes()).map_err(|error| format!("not a PEM: {}", root(&error)))?;
        if found.is_empty() {
            return Err("no certificate in it (`-----BEGIN CERTIFICATE-----`)".to_owned());
        }
        self.authorities.extend(found);
        // What is no certificate shows when it is used.
        self.check("the certificate cannot be used")
    }

    /// Shows a server that asks for it the certificate (its chain after it) and the key of a PEM, PKCS #8, PKCS #1 or
    /// SEC 1. `Err` says what is wrong with them.
    pub fn identify(&mut self, pem: &str) -> Result<(), String> {
        if pem.contains("ENCRYPTED") {
            return Err(
                "the key is encrypted, and there is nobody who could type its password: `openssl pkey -in KEY \
                -out PLAIN`, readable for fhirlake's user only"
                    .to_owned(),
            );
        }
        if !pem.contains("-----BEGIN CERTIFICATE-----") {
            return Err("no certificate in it (`-----BEGIN CERTIFICATE-----`)".to_owned());
        }
        if !pem.contains("PRIVATE KEY-----") {
            return Err("no private key in it (`-----BEGIN PRIVATE KEY-----`)".to_owned());
        }
        let identity = Identity::from_pem(pem.as_bytes());
        self.identity = Some(identity.map_err(|error| format!("not a certificate and its key: {}", root(&error)))?);
        self.check("the certificate and the key do not belong together, or cannot be used")
    }

    fn check(&self, what: &str) -> Result<(), String> {
        let built = self.set_up(reqwest::Client::builder()).build();
        built.map(drop).map_err(|error| format!("{what}: {}", root(&error)))
    }

    /// A client's builder that has them.
    pub(crate) fn set_up(&self, mut builder: ClientBuilder) -> ClientBuilder {
        if !self.authorities.is_empty() {
            builder = builder.tls_certs_merge(self.authorities.iter().cloned());
        }
        match &self.identity {
            Some(identity) => builder.identity(identity.clone()),
            None => builder,
        }
    }
}

/// The cause that all others come from: their own texts repeat URLs, query string and all.
pub(crate) fn root<'a>(error: &'a (dyn StdError + 'static)) -> &'a (dyn StdError + 'static) {
    let mut cause = error;
    while let Some(inner) = inner(cause) {
        cause = inner;
    }
    cause
}

/// Returns the subject of an error. An I/O error passes over the one that it was made of.
fn inner<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a (dyn StdError + 'static)> {
    match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
        Some(inner) => Some(inner),
        None => error.source(),
    }
}

/// Returns the reason for which TLS failed, where it will again until somebody changes a certificate or a setting.
pub(crate) fn fault(error: &reqwest::Error, what: &str) -> Option<Error> {
    let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(at) = cause {
        if let Some(tls) = at.downcast_ref::<rustls::Error>() {
            let (why, hint) = explained(tls, error.is_connect())?;
            return Some(Error::new(ErrorKind::Network, format!("{what}: {why}")).with_hint(hint).permanent());
        }
        cause = inner(at);
    }
    None
}

/// Returns its meaning, and what to do; `None` for what may pass.
fn explained(error: &rustls::Error, connecting: bool) -> Option<(String, &'static str)> {
    use CertificateError as Bad;
    Some(match error {
        rustls::Error::InvalidCertificate(bad) => {
            let said = bad.to_string();
            let (why, hint) = match bad {
                Bad::UnknownIssuer => (
                    "its CA is not trusted (unknown issuer)",
                    "set source.tls.ca_file to a PEM of the CA that the server's certificate is of (SSL_CERT_FILE \
                        replaces the system's)",
                ),
                Bad::BadSignature => (
                    "its signature is not that of the CA that it names (bad signature)",
                    "a CA of that name is known, and another key signed the certificate: set source.tls.ca_file to \
                        the CA's certificate of now",
                ),
                Bad::Expired | Bad::ExpiredContext { .. } => {
                    (&*said, "the server's administrator has to renew its certificate; check this machine's clock too")
                }
                Bad::NotValidYet | Bad::NotValidYetContext { .. } => {
                    (&*said, "check this machine's clock, and the server's certificate")
                }
                Bad::NotValidForName | Bad::NotValidForNameContext { .. } => (
                    &*said,
                    "write source.url with a name that the server's certificate is for, or let its administrator add \
                        this one",
                ),
                _ if said.contains("CaUsedAsEndEntity") => {
                    ("it is a CA's own, as self-signed ones often are (CaUsedAsEndEntity)", SELF_SIGNED_CA)
                }
                _ => (
                    &*said,
                    "the server's administrator has to replace its certificate; source.tls.ca_file names a CA that \
                        signed it",
                ),
            };
            (format!("the server's certificate is not accepted: {why}"), hint)
        }
        rustls::Error::AlertReceived(alert) => match alert {
            AlertDescription::CertificateRequired
            | AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateUnknown
            | AlertDescription::UnknownCA
            | AlertDescription::AccessDenied
            | AlertDescription::HandshakeFailure => (
                format!("the server wants a client certificate that it accepts (TLS alert {alert:?})"),
                WANTS_CERTIFICATE,
            ),
            AlertDescription::ProtocolVersion | AlertDescription::InsufficientSecurity => (
                format!("the server refuses how we encrypt (TLS alert {alert:?})"),
                "the server has to offer TLS 1.2 or 1.3 with a usual cipher",
            ),
            AlertDescription::UnrecognisedName => (
                "the server does not know the host of the URL (TLS alert UnrecognisedName)".to_owned(),
                "write source.url with a name that the server's certificate is for",
            ),
            _ => return None,
        },
        rustls::Error::PeerIncompatible(why) => (
            format!("the server and fhirlake have no way of encrypting in common: {why:?}"),
            "the server has to offer TLS 1.2 or 1.3 with a usual cipher",
        ),
        rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) if connecting => (
            "what answers there does not speak TLS".to_owned(),
            "check the port of source.url and whether it is https; a proxy that is in between may answer, too",
        ),
        _ => return None,
    })
}
