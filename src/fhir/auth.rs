//! Who we are to the server: nobody, the bearer of a token, or a SMART backend service
//! (SMART App Launch 2.2, "Backend Services" and "Client Authentication: Asymmetric").

use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use reqwest::header::HeaderValue;
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use tokio::sync::Mutex;
use url::Url;

use super::http::server_words;
use crate::error::{Context, Error, ErrorKind, Result};

/// A text that is never printed.
pub type Secret = SecretString;

/// How long an assertion lives; T7 allows five minutes at most.
const ASSERTION_LIFE: Duration = Duration::from_secs(240);
/// A token's life where the server does not say (T10 recommends it as the longest).
const DEFAULT_TOKEN_LIFE: u64 = 300;

/// How to authenticate, as resolved from the pipeline file.
#[derive(Clone)]
pub enum AuthSettings {
    /// Not at all.
    None,
    /// With a token that never changes.
    Bearer(Secret),
    /// With a key of our own.
    BackendServices {
        /// The registered client id.
        client_id: Secret,
        /// The private key: a PEM, a JWK or a JWKS.
        private_key: Secret,
        /// The scopes to ask for.
        scope: String,
        /// The token endpoint, where the server does not tell.
        token_url: Option<Url>,
    },
}

/// Hands out the `Authorization` header. Clones share one token.
#[derive(Clone)]
pub struct Auth {
    method: Arc<Method>,
}

enum Method {
    None,
    Bearer(HeaderValue),
    Backend(Box<Backend>),
}

struct Backend {
    client_id: Secret,
    key: SigningKey,
    scope: String,
    token_url: Option<Url>,
    /// One renewal for all who wait: they queue here.
    token: Mutex<Option<Token>>,
}

struct Token {
    header: HeaderValue,
    renew_at: Instant,
    got_at: Instant,
}

struct SigningKey {
    key: EncodingKey,
    algorithm: Algorithm,
    kid: Option<String>,
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match &*self.method {
            Method::None => "Auth::None",
            Method::Bearer(_) => "Auth::Bearer(***)",
            Method::Backend(_) => "Auth::BackendServices(***)",
        })
    }
}

fn auth_error(why: impl Into<String>) -> Error {
    Error::new(ErrorKind::Auth, why)
}

impl Auth {
    /// Reads the key; a key that cannot be used is an error here, before any request.
    pub fn new(settings: AuthSettings) -> Result<Self> {
        let method = match settings {
            AuthSettings::None => Method::None,
            AuthSettings::Bearer(token) => Method::Bearer(bearer(token.expose_secret())?),
            AuthSettings::BackendServices { client_id, private_key, scope, token_url } => {
                let key = SigningKey::read(private_key.expose_secret())?;
                Method::Backend(Box::new(Backend { client_id, key, scope, token_url, token: Mutex::default() }))
            }
        };
        Ok(Self { method: Arc::new(method) })
    }

    /// Whether a refused token can be renewed.
    pub(super) fn renews(&self) -> bool {
        matches!(*self.method, Method::Backend(_))
    }

    /// The header for a request; `fresh` after the server refused the last one.
    pub(super) async fn header(&self, http: &reqwest::Client, base: &Url, fresh: bool) -> Result<Option<HeaderValue>> {
        match &*self.method {
            Method::None => Ok(None),
            Method::Bearer(header) => Ok(Some(header.clone())),
            Method::Backend(backend) => backend.header(http, base, fresh).await.map(Some),
        }
    }
}

fn bearer(token: &str) -> Result<HeaderValue> {
    let mut header = HeaderValue::from_str(&format!("Bearer {token}"))
        .map_err(|_| auth_error("the token has characters that no header may have"))?;
    header.set_sensitive(true);
    Ok(header)
}

impl Backend {
    async fn header(&self, http: &reqwest::Client, base: &Url, fresh: bool) -> Result<HeaderValue> {
        let mut token = self.token.lock().await;
        let now = Instant::now();
        if let Some(known) = &*token {
            // Another waiter may have renewed it while we queued: a token this young was not the refused one.
            let young = now.duration_since(known.got_at) < Duration::from_secs(1);
            if now < known.renew_at && (!fresh || young) {
                return Ok(known.header.clone());
            }
        }
        let renewed = self.fetch(http, base).await?;
        let header = renewed.header.clone();
        *token = Some(renewed);
        Ok(header)
    }

    async fn fetch(&self, http: &reqwest::Client, base: &Url) -> Result<Token> {
        let endpoint = match &self.token_url {
            Some(url) => url.clone(),
            None => discover(http, base).await?,
        };
        let assertion = self.key.assertion(self.client_id.expose_secret(), &endpoint)?;
        let form = [
            ("grant_type", "client_credentials"),
            ("scope", self.scope.as_str()),
            ("client_assertion_type", "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"),
            ("client_assertion", assertion.as_str()),
        ];
        let response = http.post(endpoint).form(&form).send().await.map_err(|error| {
            Error::new(ErrorKind::Network, format!("the token endpoint cannot be reached: {}", error.without_url()))
        })?;
        let status = response.status();
        let body = response.bytes().await.map_err(reqwest::Error::without_url);
        let body = body.context(ErrorKind::Network, "the token endpoint's answer broke off")?;
        if status.is_server_error() || status.as_u16() == 429 {
            return Err(Error::new(ErrorKind::Network, format!("the token endpoint answered {status}")));
        }
        let json: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
        let Some(access) = json.get("access_token").and_then(Value::as_str).filter(|_| status.is_success()) else {
            let words = json.get("error_description").or_else(|| json.get("error")).and_then(Value::as_str);
            let words = words.map_or_else(|| server_words(&body), |text| text.chars().take(300).collect());
            return Err(auth_error(format!("the token endpoint answered {status}: {words}")));
        };
        let life = json.get("expires_in").and_then(Value::as_u64).unwrap_or(DEFAULT_TOKEN_LIFE);
        let life = Duration::from_secs(life);
        let now = Instant::now();
        // Ahead of its end by 30 s, or by a tenth of a short life.
        let ahead = Duration::from_secs(30).min(life / 10);
        Ok(Token { header: bearer(access)?, renew_at: now + (life - ahead), got_at: now })
    }
}

/// T4: discovery under the FHIR base.
async fn discover(http: &reqwest::Client, base: &Url) -> Result<Url> {
    let url = base.join(".well-known/smart-configuration").context(ErrorKind::Config, "source.url")?;
    let unreachable =
        |error: reqwest::Error| Error::new(ErrorKind::Network, format!("SMART discovery failed: {}", error.without_url()));
    let response = http.get(url).header("accept", "application/json").send().await.map_err(unreachable)?;
    let status = response.status();
    let body = response.bytes().await.map_err(unreachable)?;
    let json: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
    let endpoint = json.get("token_endpoint").and_then(Value::as_str);
    let endpoint = endpoint.and_then(|text| base.join(text).ok());
    endpoint.ok_or_else(|| {
        auth_error(format!("the server's .well-known/smart-configuration ({status}) names no token_endpoint; set auth.token_url"))
    })
}

impl SigningKey {
    fn read(text: &str) -> Result<Self> {
        let text = text.trim();
        if text.is_empty() {
            return Err(auth_error("auth.private_key is empty"));
        }
        if text.starts_with('{') {
            let json: Value = serde_json::from_str(text).map_err(|_| auth_error("auth.private_key is not JSON"))?;
            return match json.get("keys").and_then(Value::as_array) {
                Some(keys) => {
                    let private = keys.iter().find(|key| key.get("d").is_some());
                    Self::from_jwk(private.ok_or_else(|| auth_error("auth.private_key: no private key in the JWKS"))?)
                }
                None => Self::from_jwk(&json),
            };
        }
        let pem = text.as_bytes();
        // The PEM's label does not tell a PKCS#8 key's kind; only one of them can be read.
        if let Ok(key) = EncodingKey::from_rsa_pem(pem) {
            return Ok(Self { key, algorithm: Algorithm::RS384, kid: None });
        }
        let key = EncodingKey::from_ec_pem(pem)
            .map_err(|_| auth_error("auth.private_key is neither a JWK nor the PEM of an RSA or EC key"))?;
        Ok(Self { key, algorithm: Algorithm::ES384, kid: None })
    }

    fn from_jwk(jwk: &Value) -> Result<Self> {
        let text = |name: &str| jwk.get(name).and_then(Value::as_str);
        let number = |name: &str| {
            let bytes = text(name).and_then(|text| URL_SAFE_NO_PAD.decode(text.trim_end_matches('=')).ok());
            bytes.ok_or_else(|| auth_error(format!("auth.private_key: the JWK has no usable `{name}`")))
        };
        let kid = text("kid").map(str::to_owned);
        match (text("kty"), text("crv")) {
            (Some("RSA"), _) => {
                let mut der = der_integer(&[0]);
                for name in ["n", "e", "d", "p", "q", "dp", "dq", "qi"] {
                    der.extend(der_integer(&number(name)?));
                }
                let algorithm = if text("alg") == Some("RS256") { Algorithm::RS256 } else { Algorithm::RS384 };
                Ok(Self { key: EncodingKey::from_rsa_der(&der_tagged(0x30, &der)), algorithm, kid })
            }
            (Some("EC"), Some(curve @ ("P-384" | "P-256"))) => {
                let (oid, length, algorithm): (&[u8], usize, _) = match curve {
                    "P-384" => (&[0x2b, 0x81, 0x04, 0x00, 0x22], 48, Algorithm::ES384),
                    _ => (&[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07], 32, Algorithm::ES256),
                };
                let d = number("d")?;
                if d.len() > length {
                    return Err(auth_error("auth.private_key: the JWK's `d` is too long for its curve"));
                }
                let mut scalar = vec![0; length - d.len()];
                scalar.extend(d);
                // SEC 1 ECPrivateKey inside PKCS #8, the public point included.
                let mut point = vec![0, 4];
                for name in ["x", "y"] {
                    let part = number(name)?;
                    point.extend(std::iter::repeat_n(0, length.saturating_sub(part.len())));
                    point.extend(part);
                }
                let mut sec1 = der_integer(&[1]);
                sec1.extend(der_tagged(0x04, &scalar));
                sec1.extend(der_tagged(0xa1, &der_tagged(0x03, &point)));
                let mut algorithm_id = der_tagged(0x06, &[0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01]);
                algorithm_id.extend(der_tagged(0x06, oid));
                let mut pkcs8 = der_integer(&[0]);
                pkcs8.extend(der_tagged(0x30, &algorithm_id));
                pkcs8.extend(der_tagged(0x04, &der_tagged(0x30, &sec1)));
                Ok(Self { key: EncodingKey::from_ec_der(&der_tagged(0x30, &pkcs8)), algorithm, kid })
            }
            _ => Err(auth_error("auth.private_key: the JWK is neither an RSA key nor one of curve P-384 or P-256")),
        }
    }

    /// T6 to T8: a new assertion, with a new `jti`, for each request.
    fn assertion(&self, client_id: &str, endpoint: &Url) -> Result<String> {
        let mut header = Header::new(self.algorithm);
        header.kid.clone_from(&self.kid);
        let now = chrono::Utc::now().timestamp();
        let claims = json!({
            "iss": client_id,
            "sub": client_id,
            "aud": endpoint.as_str(),
            "iat": now,
            "exp": now + ASSERTION_LIFE.as_secs() as i64,
            "jti": uuid::Uuid::new_v4().to_string(),
        });
        jsonwebtoken::encode(&header, &claims, &self.key)
            .map_err(|error| auth_error(format!("the assertion cannot be signed: {error}")))
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    // The key pair of RFC 7517's own style, made for this test and registered nowhere.
    const EC_JWK: &str = r#"{"kty":"EC","crv":"P-256","kid":"k1","x":"f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU","y":"x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0","d":"jpsQnnGQmL-YBIffH1136cspYG6-0iY7X1fCE9-E9LI"}"#;

    // T6, T7: header and claims, and a signature that the public half accepts.
    #[test]
    fn an_assertion_from_a_jwk() {
        let key = SigningKey::read(EC_JWK).unwrap();
        let endpoint = Url::parse("https://h.example/token").unwrap();
        let token = key.assertion("client", &endpoint).unwrap();
        let public: jsonwebtoken::jwk::Jwk = serde_json::from_str(EC_JWK).unwrap();
        let mut checks = jsonwebtoken::Validation::new(Algorithm::ES256);
        checks.set_audience(&["https://h.example/token"]);
        let decoded =
            jsonwebtoken::decode::<Value>(&token, &jsonwebtoken::DecodingKey::from_jwk(&public).unwrap(), &checks).unwrap();
        assert_eq!(decoded.header.kid.as_deref(), Some("k1"));
        assert_eq!((decoded.claims["iss"].as_str(), decoded.claims["sub"].as_str()), (Some("client"), Some("client")));
        let again = key.assertion("client", &endpoint).unwrap();
        assert_ne!(token, again, "T8: a new jti each time");
    }

    #[test]
    fn a_key_that_is_none_is_an_error_that_does_not_repeat_it() {
        for text in ["", "secret-text", "{\"kty\":\"oct\",\"k\":\"secret-text\"}"] {
            let error = SigningKey::read(text).map(|_| ()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Auth);
            assert!(!error.to_string().contains("secret-text"));
        }
    }
}
