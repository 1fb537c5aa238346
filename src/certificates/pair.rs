//! A certificate with its key: made here and signed by itself, or read from PEM.
//!
//! [`self_signed`] is what serves until somebody signs a better one; [`from_pem`] takes what is given.

use std::fs::File;
use std::io::{self, Read as _};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::string::Ia5String;
use rcgen::{
    CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::crypto::ring;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::sign::CertifiedKey;
use x509_cert::der::Decode as _;

/// How long before now a certificate of our own begins to hold: what client-go gives its self-signed ones for clocks
/// that differ (`util/cert/cert.go`, GenerateSelfSignedCertKey).
const BACKDATED: Duration = Duration::from_secs(3600);

/// How long a certificate of our own holds where no end is known: client-go's year (as above).
pub const A_YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// Longest life of a certificate of our own, so that no sum of times leaves the calendar: walltimes are days.
const LONGEST: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// A certificate's chain is some kilobytes, and so is a key.
const PEM_BYTES: u64 = 1 << 20;

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum CertificateError {
    /// A file cannot be read, or holds something else.
    #[error("{path}: {problem}; a readable PEM file with {wanted} is wanted", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
        /// What the file should hold.
        wanted: &'static str,
    },
    /// Certificate and key cannot be used together.
    #[error(
        "certificate {certificate} cannot be used with key {key}: {source}; give a certificate and the key that it was made for"
    )]
    Pair {
        /// Where the certificate was read.
        certificate: String,
        /// Where the key was read.
        key: String,
        /// What the TLS library says.
        #[source]
        source: rustls::Error,
    },
    /// A key, a certificate or a request for one could not be made.
    #[error(
        "no certificate can be made for {names}: {source}; host names of letters, digits, '-' and '.' are wanted"
    )]
    Made {
        /// The names that it should be for.
        names: String,
        /// What the library says.
        #[source]
        source: rcgen::Error,
    },
}

/// A new ECDSA key (P-256) and a certificate for it that it signs itself, for a server of these names and addresses. It
/// holds for `lifetime` from now, and is kept nowhere.
///
/// # Errors
/// When a name cannot stand in a certificate.
pub fn self_signed(
    names: &[String],
    ips: &[IpAddr],
    lifetime: Duration,
) -> Result<CertifiedKey, CertificateError> {
    let made = |source| CertificateError::Made { names: names.join(", "), source };
    let key = KeyPair::generate().map_err(made)?;
    let mut params = CertificateParams::default();
    params.subject_alt_names = alternative_names(names, ips).map_err(made)?;
    params.distinguished_name = subject(None, names.first().map_or("jiriaf-pilot", String::as_str));
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    (params.not_before, params.not_after) = {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let epoch = rcgen::date_time_ymd(1970, 1, 1);
        (epoch + now.saturating_sub(BACKDATED), epoch + (now + lifetime.min(LONGEST)))
    };
    let certificate = params.self_signed(&key).map_err(made)?;
    let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    CertifiedKey::from_der(vec![certificate.der().clone()], der, &ring::default_provider()).map_err(
        |source| CertificateError::Pair {
            certificate: "self-signed".to_owned(),
            key: "new".to_owned(),
            source,
        },
    )
}

/// A certificate's subject: an organization, as which Kubernetes takes a group, and a common name, a user.
pub(super) fn subject(organization: Option<&str>, common_name: &str) -> DistinguishedName {
    let mut subject = DistinguishedName::new();
    if let Some(organization) = organization {
        subject.push(DnType::OrganizationName, organization);
    }
    subject.push(DnType::CommonName, common_name);
    subject
}

/// The names and addresses that a server is called by.
pub(super) fn alternative_names(names: &[String], ips: &[IpAddr]) -> Result<Vec<SanType>, rcgen::Error> {
    let names = names.iter().map(|name| Ok(SanType::DnsName(Ia5String::try_from(name.as_str())?)));
    names.chain(ips.iter().map(|ip| Ok(SanType::IpAddress(*ip)))).collect()
}

/// The certificate chain and the key in two PEM files.
///
/// # Errors
/// When a file cannot be read, holds something else, or they do not belong together.
pub fn from_files(certificate: &Path, key: &Path) -> Result<CertifiedKey, CertificateError> {
    let read = |path: &Path, wanted| {
        read_pem(path).map_err(|error| CertificateError::File {
            path: path.to_owned(),
            problem: error.to_string(),
            wanted,
        })
    };
    let chain = read(certificate, "a certificate")?;
    let secret = read(key, "a private key")?;
    from_pem((&certificate.display().to_string(), &chain), (&key.display().to_string(), &secret))
}

fn read_pem(path: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(PEM_BYTES + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > PEM_BYTES {
        return Err(io::Error::other(format!("it is larger than {PEM_BYTES} bytes")));
    }
    Ok(bytes)
}

/// The certificate chain and the key in PEM, each with the name of where it came from.
///
/// # Errors
/// When one of them holds something else, or they do not belong together.
pub fn from_pem(certificate: (&str, &[u8]), key: (&str, &[u8])) -> Result<CertifiedKey, CertificateError> {
    let wrong = |name: &str, problem: String, wanted| CertificateError::File {
        path: PathBuf::from(name),
        problem,
        wanted,
    };
    let chain = CertificateDer::pem_slice_iter(certificate.1).collect::<Result<Vec<_>, _>>();
    let chain = chain.map_err(|error| wrong(certificate.0, error.to_string(), "a certificate"))?;
    if chain.is_empty() {
        return Err(wrong(certificate.0, "no certificate in it".to_owned(), "a certificate"));
    }
    let secret = PrivateKeyDer::from_pem_slice(key.1)
        .map_err(|error| wrong(key.0, error.to_string(), "a private key"))?;
    CertifiedKey::from_der(chain, secret, &ring::default_provider()).map_err(|source| {
        CertificateError::Pair { certificate: certificate.0.to_owned(), key: key.0.to_owned(), source }
    })
}

/// From when to when a certificate holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// The first moment.
    pub from: SystemTime,
    /// The last moment.
    pub until: SystemTime,
}

/// From when to when a certificate holds; `None` for what is no certificate.
#[must_use]
pub fn validity(der: &[u8]) -> Option<Validity> {
    let validity = x509_cert::Certificate::from_der(der).ok()?.tbs_certificate.validity;
    Some(Validity { from: validity.not_before.to_system_time(), until: validity.not_after.to_system_time() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hosts() -> (Vec<String>, Vec<IpAddr>) {
        (
            vec!["node-1".to_owned(), "node-1.site".to_owned()],
            vec!["10.1.2.3".parse().unwrap(), "::1".parse().unwrap()],
        )
    }

    #[test]
    fn a_self_signed_certificate_holds_for_the_time_asked_for() {
        let (names, ips) = hosts();
        let hour = Duration::from_secs(3600);
        let made = self_signed(&names, &ips, hour).unwrap();
        let validity = validity(&made.cert[0]).unwrap();
        let now = SystemTime::now();
        let near = |at: SystemTime, wanted: SystemTime| {
            at.duration_since(wanted).unwrap_or_else(|e| e.duration()) < Duration::from_secs(5)
        };
        assert!(near(validity.from, now - hour) && near(validity.until, now + hour), "{validity:?}");
        assert!(self_signed(&names, &ips, Duration::MAX).is_ok());
    }

    #[test]
    fn a_name_that_cannot_stand_in_a_certificate_is_named() {
        let error = self_signed(&["nöde".to_owned()], &[], A_YEAR).unwrap_err();
        assert!(error.to_string().contains("nöde"), "{error}");
    }

    #[test]
    fn a_certificate_and_its_key_are_read_from_files() {
        let dir = tempfile::tempdir().unwrap();
        let (cert, key) = (dir.path().join("tls.crt"), dir.path().join("tls.key"));
        let made = rcgen::generate_simple_self_signed(["node-1".to_owned()]).unwrap();
        std::fs::write(&cert, made.cert.pem()).unwrap();
        std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
        let read = from_files(&cert, &key).unwrap();
        assert_eq!(read.cert[0], *made.cert.der());
    }

    #[test]
    fn what_is_wrong_with_the_files_is_said_with_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let (cert, key) = (dir.path().join("tls.crt"), dir.path().join("tls.key"));
        let says = |wanted: &[&str]| {
            let error = from_files(&cert, &key).unwrap_err().to_string();
            assert!(wanted.iter().all(|w| error.contains(w)), "{error} lacks {wanted:?}");
        };
        says(&["tls.crt", "PEM"]);
        let made = rcgen::generate_simple_self_signed(["node-1".to_owned()]).unwrap();
        std::fs::write(&cert, made.signing_key.serialize_pem()).unwrap();
        std::fs::write(&key, made.cert.pem()).unwrap();
        says(&["tls.crt", "no certificate"]);
        std::fs::write(&cert, made.cert.pem()).unwrap();
        says(&["tls.key", "private key"]);
        std::fs::write(&key, KeyPair::generate().unwrap().serialize_pem()).unwrap();
        says(&["tls.crt", "tls.key", "made for"]);
        std::fs::write(&cert, vec![b'x'; PEM_BYTES as usize + 1]).unwrap();
        says(&["tls.crt", "larger"]);
    }
}
