//! What signs certificates in tests.

use std::time::{Duration, SystemTime};

use k8s_openapi::ByteString;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, PublicKeyData, SignatureAlgorithm,
};
use serde_json::{Value, json};
use x509_cert::der::DecodePem as _;
use x509_cert::request::CertReq;

/// A refusal for want of a right.
pub(crate) fn refused() -> (u16, Value) {
    let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": "no", "reason": "Forbidden", "code": 403});
    (403, status)
}

/// Answers a CertificateSigningRequest with a certificate that holds for so many seconds.
pub(crate) fn signing(seconds: u64) -> impl Fn(&str, &str, &str) -> (u16, Value) + Send + Sync {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
    move |method, _, body| {
        assert_eq!(method, "POST");
        let mut request: Value = serde_json::from_str(body).unwrap();
        let pem: ByteString = serde_json::from_value(request["spec"]["request"].clone()).unwrap();
        let asked = CertReq::from_pem(&pem.0).unwrap();
        let key = Key(asked.info.public_key.subject_public_key.raw_bytes().to_vec());
        let mut params = CertificateParams::default();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        let epoch = rcgen::date_time_ymd(1970, 1, 1);
        (params.not_before, params.not_after) = (epoch + now, epoch + (now + Duration::from_secs(seconds)));
        let signed = params.signed_by(&key, &issuer).unwrap().pem();
        request["metadata"] = json!({"name": "csr-1"});
        request["status"] = json!({"certificate": ByteString(signed.into_bytes())});
        (201, request)
    }
}

struct Key(Vec<u8>);

impl PublicKeyData for Key {
    fn der_bytes(&self) -> &[u8] {
        &self.0
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}
