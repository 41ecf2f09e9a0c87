//! The embedded server's authorization: SMART Backend Services with registered keys, and clients with a secret.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{Algorithm, DecodingKey, Validation};
use serde_json::{Value, json};

use crate::faults::Faults;

/// A client that the server knows.
#[derive(Debug, Clone, Default)]
pub struct Registration {
    /// Its id.
    pub client_id: String,
    /// Its public keys (a JWKS), where it has some.
    pub jwks: Option<Value>,
    /// Its secret, where it has one.
    pub secret: Option<String>,
}

/// Tokens that were given out.
#[derive(Debug, Default)]
pub(crate) struct Tokens {
    pub registered: Option<Registration>,
    valid: HashMap<String, Instant>,
    /// Assertions' `jti` that were seen: each may be used once (T8).
    seen: HashSet<String>,
    /// Tokens that were given out so far.
    pub issued: usize,
    /// The scope of the last request.
    pub scope: String,
}

fn oauth(code: &str, why: &str) -> Response {
    let body = json!({ "error": code, "error_description": why });
    (StatusCode::BAD_REQUEST, [("content-type", "application/json")], body.to_string()).into_response()
}

impl Tokens {
    /// Returns true if a request may be answered.
    pub(crate) fn allow(&self, headers: &HeaderMap) -> bool {
        if self.registered.is_none() {
            return true;
        }
        let token = headers.get("authorization").and_then(|header| header.to_str().ok()?.strip_prefix("Bearer "));
        token.and_then(|token| self.valid.get(token)).is_some_and(|until| Instant::now() < *until)
    }

    /// Answers a request for a token at `endpoint`.
    pub(crate) fn issue(
        &mut self,
        endpoint: &str,
        headers: &HeaderMap,
        form: &HashMap<String, String>,
        faults: &Faults,
    ) -> Response {
        let Some(registered) = self.registered.clone() else { return oauth("invalid_client", "nobody is registered") };
        if form.get("grant_type").map(String::as_str) != Some("client_credentials") {
            return oauth("unsupported_grant_type", "client_credentials only");
        }
        if let Err(why) = self.prove(&registered, endpoint, headers, form, faults) {
            return oauth("invalid_client", &why);
        }
        self.scope = form.get("scope").cloned().unwrap_or_default();
        if self.scope.is_empty() {
            return oauth("invalid_scope", "no scope");
        }
        let life = faults.token_life.unwrap_or(300);
        let token = uuid::Uuid::new_v4().to_string();
        self.valid.insert(token.clone(), Instant::now() + Duration::from_secs(life));
        self.issued += 1;
        let body = json!({ "access_token": token, "token_type": "bearer", "expires_in": life, "scope": self.scope });
        ([("content-type", "application/json")], body.to_string()).into_response()
    }

    fn prove(
        &mut self,
        registered: &Registration,
        endpoint: &str,
        headers: &HeaderMap,
        form: &HashMap<String, String>,
        faults: &Faults,
    ) -> Result<(), String> {
        if let Some(secret) = &registered.secret {
            let basic = headers.get("authorization").and_then(|header| header.to_str().ok()?.strip_prefix("Basic "));
            let basic = basic.and_then(|text| String::from_utf8(STANDARD.decode(text).ok()?).ok());
            let in_form =
                form.get("client_id") == Some(&registered.client_id) && form.get("client_secret") == Some(secret);
            let in_header = basic == Some(format!("{}:{secret}", registered.client_id));
            return if in_form != in_header { Ok(()) } else { Err("the secret is not the client's".into()) };
        }
        let assertion = form.get("client_assertion").ok_or("no client_assertion")?;
        if form.get("client_assertion_type").map(String::as_str)
            != Some("urn:ietf:params:oauth:client-assertion-type:jwt-bearer")
        {
            return Err("client_assertion_type".into());
        }
        let header = jsonwebtoken::decode_header(assertion).map_err(|error| error.to_string())?;
        let kid = header.kid.ok_or("an assertion without kid")?;
        let keys: JwkSet =
            serde_json::from_value(registered.jwks.clone().unwrap_or_default()).map_err(|error| error.to_string())?;
        let key = keys.find(&kid).ok_or("no such key is registered")?;
        if !matches!(header.alg, Algorithm::RS384 | Algorithm::ES384) {
            return Err("neither RS384 nor ES384".into());
        }
        let mut checks = Validation::new(header.alg);
        checks.set_audience(&[endpoint]);
        // By the server's own clock, which may be off; checked here.
        checks.validate_exp = false;
        let key = DecodingKey::from_jwk(key).map_err(|error| error.to_string())?;
        let claims = jsonwebtoken::decode::<Value>(assertion, &key, &checks).map_err(|error| error.to_string())?.claims;
        let text = |name: &str| claims.get(name).and_then(Value::as_str);
        if text("iss") != Some(&registered.client_id) || text("sub") != Some(&registered.client_id) {
            return Err("iss and sub must be the client's id".into());
        }
        let left = claims.get("exp").and_then(Value::as_i64).unwrap_or(0)
            - (chrono::Utc::now().timestamp() + faults.clock_ahead);
        if !(1..=300).contains(&left) {
            return Err(format!("exp is {left} s ahead"));
        }
        let jti = text("jti").ok_or("no jti")?;
        if !self.seen.insert(jti.to_owned()) {
            return Err("the jti was used before".into());
        }
        Ok(())
    }
}
