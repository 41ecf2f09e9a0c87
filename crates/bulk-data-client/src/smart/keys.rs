//! The key of a backend service (SMART App Launch 2.2, "Client Authentication: Asymmetric"): read as JWK, JWKS or PEM,
//! and made.

use aws_lc_rs::encoding::{AsBigEndian, AsDer, EcPrivateKeyBin, Pkcs8V1Der};
use aws_lc_rs::signature::{ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, KeyPair};
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use serde_json::{Map, Value, json};

use foundation::error::{Error, ErrorKind, Result};

/// Lifetime of an assertion, in seconds; T7 allows five minutes at most.
const ASSERTION_SECONDS: i64 = 240;

/// Object identifiers of keys and curves, in DER.
const OID_EC: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01];
const OID_P256: &[u8] = &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
const OID_P384: &[u8] = &[0x2b, 0x81, 0x04, 0x00, 0x22];

/// A private key that signs assertions.
pub(crate) struct SigningKey {
    key: EncodingKey,
    algorithm: Algorithm,
    kid: Option<String>,
}

fn bad(why: impl std::fmt::Display) -> Error {
    Error::new(ErrorKind::Auth, format!("auth.private_key: {why}"))
}

impl SigningKey {
    /// Reads a JWK, a JWKS or a PEM. Of several keys the one with `key_id` is taken, else the first private one;
    /// `key_id` is also the `kid` of a key that has none.
    pub(crate) fn read(text: &str, key_id: Option<&str>) -> Result<Self> {
        let text = text.trim();
        if text.is_empty() {
            return Err(bad("it is empty"));
        }
        let mut key = if text.starts_with('{') { Self::from_json(text, key_id)? } else { Self::from_pem(text)? };
        key.kid = key.kid.or_else(|| key_id.map(str::to_owned));
        Ok(key)
    }

    /// Its algorithm's name.
    pub(crate) fn algorithm(&self) -> String {
        format!("{:?}", self.algorithm)
    }

    /// Its id, where it has one.
    pub(crate) fn kid(&self) -> Option<&str> {
        self.kid.as_deref()
    }

    fn from_json(text: &str, key_id: Option<&str>) -> Result<Self> {
        let json: Value = serde_json::from_str(text).map_err(|_| bad("it is not JSON"))?;
        let Some(keys) = json.get("keys").and_then(Value::as_array) else { return Self::from_jwk(&json) };
        let mut private = keys.iter().filter(|key| key.get("d").is_some());
        let found = match key_id {
            Some(id) => private.find(|key| key.get("kid").and_then(Value::as_str) == Some(id)),
            None => private.next(),
        };
        Self::from_jwk(found.ok_or_else(|| match key_id {
            Some(id) => bad(format!("no private key with the kid {id} in the JWKS")),
            None => bad("no private key in the JWKS"),
        })?)
    }

    fn from_jwk(jwk: &Value) -> Result<Self> {
        let text = |name: &str| jwk.get(name).and_then(Value::as_str);
        let number = |name: &str| {
            let bytes = text(name).and_then(|text| URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).ok());
            bytes.ok_or_else(|| bad(format!("the JWK has no usable `{name}`")))
        };
        let kid = text("kid").map(str::to_owned);
        match (text("kty"), text("crv")) {
            (Some("RSA"), _) => {
                let mut der = der_integer(&[0]);
                for name in RSA_PARTS {
                    der.extend(der_integer(&number(name)?));
                }
                let algorithm = if text("alg") == Some("RS256") { Algorithm::RS256 } else { Algorithm::RS384 };
                Ok(Self { key: EncodingKey::from_rsa_der(&der_tagged(0x30, &der)), algorithm, kid })
            }
            (Some("EC"), Some(curve @ ("P-384" | "P-256"))) => {
                let (oid, length) = if curve == "P-384" { (OID_P384, 48) } else { (OID_P256, 32) };
                let d = number("d")?;
                if d.len() > length {
                    return Err(bad("the JWK's `d` is too long for its curve"));
                }
                // SEC 1 ECPrivateKey inside PKCS #8, the public point included.
                let mut point = vec![0, 4];
                for name in ["x", "y"] {
                    let part = number(name)?;
                    point.extend(std::iter::repeat_n(0, length.saturating_sub(part.len())));
                    point.extend(part);
                }
                let mut sec1 = der_integer(&[1]);
                let mut scalar = vec![0; length - d.len()];
                scalar.extend(d);
                sec1.extend(der_tagged(0x04, &scalar));
                sec1.extend(der_tagged(0xa1, &der_tagged(0x03, &point)));
                Self::from_ec(oid, &der_tagged(0x30, &sec1), kid)
            }
            _ => Err(bad("the JWK is neither an RSA key nor one of curve P-384 or P-256")),
        }
    }

    fn from_ec(oid: &[u8], sec1: &[u8], kid: Option<String>) -> Result<Self> {
        let algorithm = if oid == OID_P384 { Algorithm::ES384 } else { Algorithm::ES256 };
        let mut algorithm_id = der_tagged(0x06, OID_EC);
        algorithm_id.extend(der_tagged(0x06, oid));
        let mut pkcs8 = der_integer(&[0]);
        pkcs8.extend(der_tagged(0x30, &algorithm_id));
        pkcs8.extend(der_tagged(0x04, sec1));
        Ok(Self { key: EncodingKey::from_ec_der(&der_tagged(0x30, &pkcs8)), algorithm, kid })
    }

    fn from_pem(text: &str) -> Result<Self> {
        let (label, der) = pem(text)?;
        let curve = [OID_P384, OID_P256].into_iter().find(|oid| der.windows(oid.len()).any(|bytes| bytes == *oid));
        match label.as_str() {
            "RSA PRIVATE KEY" => {
                Ok(Self { key: EncodingKey::from_rsa_der(&der), algorithm: Algorithm::RS384, kid: None })
            }
            "EC PRIVATE KEY" => {
                Self::from_ec(curve.ok_or_else(|| bad("a curve that is neither P-384 nor P-256"))?, &der, None)
            }
            "PRIVATE KEY" if der.windows(OID_EC.len()).any(|bytes| bytes == OID_EC) => {
                let algorithm = match curve {
                    Some(oid) if oid == OID_P384 => Algorithm::ES384,
                    Some(_) => Algorithm::ES256,
                    None => return Err(bad("a curve that is neither P-384 nor P-256")),
                };
                Ok(Self { key: EncodingKey::from_ec_der(&der), algorithm, kid: None })
            }
            "PRIVATE KEY" => {
                // What PKCS #8 wraps: version, algorithm, and the key itself as an octet string.
                let inner =
                    der_parts(&der).and_then(|outer| der_parts(outer.first()?)).and_then(|parts| parts.get(2).copied());
                let inner = inner.ok_or_else(|| bad("the PEM holds no private key"))?;
                Ok(Self { key: EncodingKey::from_rsa_der(inner), algorithm: Algorithm::RS384, kid: None })
            }
            "ENCRYPTED PRIVATE KEY" => {
                Err(bad("the PEM is encrypted; decrypt it, for example by `openssl pkey -in key.pem`"))
            }
            other => Err(bad(format!("the PEM holds a {}, not a private key", other.to_lowercase()))),
        }
    }

    /// T6 to T8: a new assertion, with a new `jti`, for each request. `skew` is how many seconds the server's clock is
    /// ahead of ours.
    pub(crate) fn assertion(&self, client_id: &str, endpoint: &str, skew: i64) -> Result<String> {
        let mut header = Header::new(self.algorithm);
        header.kid.clone_from(&self.kid);
        let now = chrono::Utc::now().timestamp() + skew;
        let claims = json!({
            "iss": client_id,
            "sub": client_id,
            "aud": endpoint,
            "iat": now,
            "exp": now + ASSERTION_SECONDS,
            "jti": uuid::Uuid::new_v4().to_string(),
        });
        jsonwebtoken::encode(&header, &claims, &self.key)
            .map_err(|error| bad(format!("no assertion can be signed with it: {error}")))
    }
}

const RSA_PARTS: [&str; 8] = ["n", "e", "d", "p", "q", "dp", "dq", "qi"];

/// The label and the bytes of the first private key, or whatever is there, in a PEM.
fn pem(text: &str) -> Result<(String, Vec<u8>)> {
    let mut first = None;
    let mut rest = text;
    while let Some((label, more)) = rest.split_once("-----BEGIN ").and_then(|(_, more)| more.split_once("-----")) {
        let Some((body, more)) = more.split_once("-----END ") else { break };
        rest = more;
        let lines = body.lines().map(str::trim).filter(|line| !line.contains(':'));
        let body: String = lines.collect();
        let der = STANDARD.decode(body).map_err(|_| bad("the PEM is not whole"))?;
        if label.ends_with("PRIVATE KEY") {
            return Ok((label.to_owned(), der));
        }
        first = first.or(Some((label.to_owned(), der)));
    }
    first.ok_or_else(|| bad("it is neither a JWK, nor a JWKS, nor a PEM"))
}

/// Returns the content of a DER value that is made of others.
fn der_parts(der: &[u8]) -> Option<Vec<&[u8]>> {
    let mut parts = Vec::new();
    let mut rest = der;
    while !rest.is_empty() {
        let (length, header) = match *rest.get(1)? {
            short @ 0..0x80 => (usize::from(short), 2),
            long => {
                let bytes = rest.get(2..2 + usize::from(long & 0x7f))?;
                let length = bytes
                    .iter()
                    .try_fold(0usize, |length, byte| length.checked_mul(256)?.checked_add((*byte).into()))?;
                (length, 2 + bytes.len())
            }
        };
        parts.push(rest.get(header..header.checked_add(length)?)?);
        rest = rest.get(header + length..)?;
    }
    Some(parts)
}

fn der_tagged(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut der = vec![tag];
    match content.len() {
        short @ 0..0x80 => der.push(short as u8),
        long => {
            let bytes = long.to_be_bytes();
            let bytes: Vec<u8> = bytes.into_iter().skip_while(|byte| *byte == 0).collect();
            der.push(0x80 | bytes.len() as u8);
            der.extend(bytes);
        }
    }
    der.extend(content);
    der
}

fn der_integer(big_endian: &[u8]) -> Vec<u8> {
    let mut digits: Vec<u8> = big_endian.iter().copied().skip_while(|byte| *byte == 0).collect();
    if digits.first().is_none_or(|first| *first >= 0x80) {
        digits.insert(0, 0);
    }
    der_tagged(0x02, &digits)
}

/// The algorithms of SMART's clients (T5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyAlgorithm {
    /// RSA of 3072 bits.
    Rs384,
    /// Elliptic curve P-384.
    Es384,
}

/// A new key pair: the private JWK, which is a secret, and the JWKS with its public half, to be registered. The `kid`
/// is the public key's thumbprint (RFC 7638).
pub fn generate_key(algorithm: KeyAlgorithm) -> Result<(Value, Value)> {
    let failed = |_| Error::new(ErrorKind::Internal, "a key cannot be made");
    let text = |bytes: &[u8]| Value::from(URL_SAFE_NO_PAD.encode(bytes));
    let mut public = Map::new();
    let mut secrets = Map::new();
    match algorithm {
        KeyAlgorithm::Es384 => {
            let pair = EcdsaKeyPair::generate(&ECDSA_P384_SHA384_FIXED_SIGNING).map_err(failed)?;
            let secret: EcPrivateKeyBin<'_> = pair.private_key().as_be_bytes().map_err(failed)?;
            // Uncompressed: a 4, x, y.
            let point = pair.public_key().as_ref();
            let (x, y) = point.get(1..).unwrap_or_default().split_at(48);
            public.extend([("crv".into(), "P-384".into()), ("kty".into(), "EC".into())]);
            public.extend([("x".into(), text(x)), ("y".into(), text(y))]);
            secrets.insert("d".into(), text(secret.as_ref()));
        }
        KeyAlgorithm::Rs384 => {
            let pair = aws_lc_rs::rsa::KeyPair::generate(aws_lc_rs::rsa::KeySize::Rsa3072).map_err(failed)?;
            let der: Pkcs8V1Der<'_> = pair.as_der().map_err(failed)?;
            let inner = der_parts(der.as_ref()).and_then(|outer| der_parts(outer.first()?)?.get(2).copied());
            let numbers = inner.and_then(|key| der_parts(der_parts(key)?.first()?));
            let numbers = numbers.ok_or_else(|| Error::new(ErrorKind::Internal, "a key cannot be read back"))?;
            for (name, number) in RSA_PARTS.into_iter().zip(numbers.into_iter().skip(1)) {
                let digits: Vec<u8> = number.iter().copied().skip_while(|byte| *byte == 0).collect();
                let part = if matches!(name, "n" | "e") { &mut public } else { &mut secrets };
                part.insert(name.into(), text(&digits));
            }
            public.insert("kty".into(), "RSA".into());
        }
    }
    // RFC 7638: the required members, in the order of their names.
    let mut members: Vec<(&String, &Value)> = public.iter().collect();
    members.sort_by_key(|(name, _)| name.as_str());
    let canonical: Map<String, Value> =
        members.into_iter().map(|(name, value)| (name.clone(), value.clone())).collect();
    let canonical = Value::Object(canonical).to_string();
    let kid = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, canonical.as_bytes());
    let name = if algorithm == KeyAlgorithm::Es384 { "ES384" } else { "RS384" };
    public.extend([("kid".into(), text(kid.as_ref())), ("alg".into(), name.into()), ("use".into(), "sig".into())]);
    let mut private = public.clone();
    private.extend(secrets);
    private.insert("key_ops".into(), json!(["sign"]));
    public.insert("key_ops".into(), json!(["verify"]));
    Ok((Value::Object(private), json!({ "keys": [public] })))
}

#[cfg(test)]
mod tests {
    use super::*;

    // The key pair of RFC 7517's own style, made for this test and registered nowhere.
    const EC_JWK: &str = r#"{"kty":"EC","crv":"P-256","kid":"k1","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0","d":"jpsQnnGQmL-YBIffH1136cspYG6-0iY7X1fCE9-E9LI"}"#;

    fn verified(token: &str, public: &Value, algorithm: Algorithm) -> jsonwebtoken::TokenData<Value> {
        let public: jsonwebtoken::jwk::Jwk = serde_json::from_value(public.clone()).unwrap();
        let mut checks = jsonwebtoken::Validation::new(algorithm);
        checks.set_audience(&["https://h.example/token"]);
        jsonwebtoken::decode::<Value>(token, &jsonwebtoken::DecodingKey::from_jwk(&public).unwrap(), &checks).unwrap()
    }

    // T6, T7: header and claims, and a signature that the public half accepts.
    #[test]
    fn t6_t7_t8_an_assertion_from_a_jwk() {
        let key = SigningKey::read(EC_JWK, None).unwrap();
        let token = key.assertion("client", "https://h.example/token", 0).unwrap();
        let decoded = verified(&token, &serde_json::from_str(EC_JWK).unwrap(), Algorithm::ES256);
        assert_eq!(decoded.header.kid.as_deref(), Some("k1"));
        assert_eq!(decoded.header.typ.as_deref(), Some("JWT"));
        let claims = &decoded.claims;
        assert_eq!((claims["iss"].as_str(), claims["sub"].as_str()), (Some("client"), Some("client")));
        let life = claims["exp"].as_i64().unwrap() - chrono::Utc::now().timestamp();
        assert!((200..=300).contains(&life), "{life} seconds");
        let again = key.assertion("client", "https://h.example/token", 0).unwrap();
        assert_ne!(token, again, "T8: a new jti each time");
        let ahead = verified(
            &key.assertion("client", "https://h.example/token", 3600).unwrap(),
            &serde_json::from_str(EC_JWK).unwrap(),
            Algorithm::ES256,
        );
        assert!(ahead.claims["iat"].as_i64().unwrap() > chrono::Utc::now().timestamp() + 3500, "by the server's clock");
    }

    // T5: both algorithms, from keys of our own making, each as JWK, JWKS and PEM.
    #[test]
    fn t5_rs384_and_es384_from_keys_in_every_form() {
        for (algorithm, jwt) in [(KeyAlgorithm::Rs384, Algorithm::RS384), (KeyAlgorithm::Es384, Algorithm::ES384)] {
            let (private, public) = generate_key(algorithm).unwrap();
            let public = &public["keys"][0];
            assert!(public.get("d").is_none() && public.get("p").is_none(), "the public half has no secret");
            let other = generate_key(KeyAlgorithm::Es384).unwrap().0;
            let set = json!({ "keys": [public.clone(), other, private.clone()] });
            let kid = private["kid"].as_str().unwrap();
            for (text, id) in [(private.to_string(), None), (set.to_string(), Some(kid))] {
                let key = SigningKey::read(&text, id).unwrap();
                let token = key.assertion("client", "https://h.example/token", 0).unwrap();
                assert_eq!(verified(&token, public, jwt).header.kid.as_deref(), Some(kid));
            }
        }
    }

    // Keys as openssl writes them.
    #[test]
    fn pems_of_every_label() {
        let cases = [
            (include_str!("../../../../tests/keys/ec384-pkcs8.pem"), "ES384"),
            (include_str!("../../../../tests/keys/ec384-sec1.pem"), "ES384"),
            (include_str!("../../../../tests/keys/ec256-pkcs8.pem"), "ES256"),
            (include_str!("../../../../tests/keys/rsa-pkcs8.pem"), "RS384"),
            (include_str!("../../../../tests/keys/rsa-pkcs1.pem"), "RS384"),
        ];
        for (text, algorithm) in cases {
            let key = SigningKey::read(text, Some("mine")).unwrap();
            assert_eq!((key.algorithm().as_str(), key.kid()), (algorithm, Some("mine")));
            key.assertion("client", "https://h.example/token", 0).unwrap();
        }
        let error = SigningKey::read(include_str!("../../../../tests/keys/encrypted.pem"), None).map(drop).unwrap_err();
        assert!(error.to_string().contains("encrypted"), "{error}");
    }

    #[test]
    fn a_key_that_is_none_is_an_error_that_does_not_repeat_it() {
        for text in ["", "secret-text", "{\"kty\":\"oct\",\"k\":\"secret-text\"}"] {
            let error = SigningKey::read(text, None).map(drop).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Auth);
            assert!(!error.to_string().contains("secret-text"));
        }
    }
}
