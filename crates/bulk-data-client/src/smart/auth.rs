//! Authentication: nobody, the bearer of a token, a client with a secret, or a SMART backend service
//! (SMART App Launch 2.2, "Backend Services").

use std::sync::Arc;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::{AUTHORIZATION, HeaderValue};
use secrecy::{ExposeSecret, SecretString};
use serde_json::Value;
use tokio::sync::Mutex;
use url::Url;

use crate::export::response::{one_line, server_words};
use crate::http::read_to_limit::{SMALL, whole};
use crate::http::{Web, shown};
use crate::smart::keys::SigningKey;
use crate::smart::{Access, SmartConfiguration, clock_skew, not_granted};
use foundation::error::{Error, ErrorKind, Result};

/// A text that is never printed.
pub type Secret = SecretString;

/// A token's life where the server does not say (T10 recommends it as the longest).
const DEFAULT_TOKEN_LIFE: u64 = 300;
/// Number of requests where an answer is not an OAuth error: some servers refuse without a reason, and then do not.
const TRIES: usize = 4;

/// Authentication, as resolved from the pipeline file.
#[derive(Clone)]
pub enum AuthSettings {
    /// Not at all.
    None,
    /// With a token that never changes.
    Bearer(Secret),
    /// With an access token from the server's token endpoint.
    Client(Box<ClientSettings>),
}

/// A client that the server knows.
#[derive(Clone)]
pub struct ClientSettings {
    /// The registered client id.
    pub client_id: Secret,
    /// Its credentials.
    pub proof: Proof,
    /// The scopes to ask for; `None` for those that the server supports.
    pub scope: Option<String>,
    /// The token endpoint, where the server does not tell.
    pub token_url: Option<Url>,
    /// The assertion's audience, where the server wants another than the token endpoint.
    pub audience: Option<String>,
    /// True if it may be without encryption.
    pub plain_http: bool,
    /// Types and level that are going to be read.
    pub access: Access,
}

/// Credentials of a client.
#[derive(Clone)]
pub enum Proof {
    /// A private key: a PEM, a JWK or a JWKS, and which of its keys.
    Key(Secret, Option<String>),
    /// A secret in the header `Authorization` (RFC 6749, section 2.3.1).
    SecretInHeader(Secret),
    /// A secret in the form.
    SecretInForm(Secret),
}

/// Hands out the `Authorization` header. Clones share one token.
#[derive(Clone)]
pub struct Auth {
    method: Arc<Method>,
}

enum Method {
    None,
    Bearer(HeaderValue),
    Client(Box<TokenClient>),
}

struct TokenClient {
    settings: ClientSettings,
    key: Option<SigningKey>,
    /// One renewal for all who wait: they queue here.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    token: Option<Token>,
    /// Asked for once.
    server: Option<SmartConfiguration>,
    /// True if a scope that is less than was asked for has been told.
    told: bool,
}

struct Token {
    header: HeaderValue,
    renew_at: Instant,
    life: Duration,
    granted: Option<String>,
}

/// Result of a check of the authentication, without the token.
#[derive(Debug, Clone)]
pub struct Granted {
    /// Token endpoint; `None` where none is asked for.
    pub endpoint: Option<Url>,
    /// The server's SMART configuration.
    pub server: Option<SmartConfiguration>,
    /// The algorithm and the id of the key.
    pub key: Option<(String, Option<String>)>,
    /// The scopes that were asked for.
    pub requested: String,
    /// Those that were granted, where the server says.
    pub granted: Option<String>,
    /// Types that were asked for and cannot be read.
    pub missing: Vec<String>,
    /// Lifetime of the token.
    pub life: Duration,
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match &*self.method {
            Method::None => "Auth::None",
            Method::Bearer(_) => "Auth::Bearer(***)",
            Method::Client(_) => "Auth::Client(***)",
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
            AuthSettings::Client(settings) => {
                let key = match &settings.proof {
                    Proof::Key(key, id) => Some(SigningKey::read(key.expose_secret(), id.as_deref())?),
                    Proof::SecretInHeader(secret) | Proof::SecretInForm(secret)
                        if secret.expose_secret().trim().is_empty() =>
                    {
                        return Err(auth_error("auth.client_secret is empty"));
                    }
                    _ => None,
                };
                Method::Client(Box::new(TokenClient { settings: *settings, key, state: Mutex::default() }))
            }
        };
        Ok(Self { method: Arc::new(method) })
    }

    /// Returns true if a refused token can be renewed.
    pub(crate) fn is_none(&self) -> bool {
        matches!(*self.method, Method::None)
    }

    /// Returns true if a new token can be had.
    pub(crate) fn renews(&self) -> bool {
        matches!(*self.method, Method::Client(_))
    }

    /// The header for a request; after the server refused one, another than that.
    pub(crate) async fn header(&self, web: &Web, refused: Option<&HeaderValue>) -> Result<Option<HeaderValue>> {
        match &*self.method {
            Method::None => Ok(None),
            Method::Bearer(header) => Ok(Some(header.clone())),
            Method::Client(client) => client.header(web, refused).await.map(Some),
        }
    }

    /// Gets a new token and tells what came with it; `None` where none is needed.
    pub(crate) async fn check(&self, web: &Web) -> Result<Option<Granted>> {
        match &*self.method {
            Method::None | Method::Bearer(_) => Ok(None),
            Method::Client(client) => client.check(web).await.map(Some),
        }
    }
}

fn bearer(token: &str) -> Result<HeaderValue> {
    let mut header = HeaderValue::from_str(&format!("Bearer {token}"))
        .map_err(|_| auth_error("the token has characters that no header may have"))?;
    header.set_sensitive(true);
    Ok(header)
}

impl TokenClient {
    async fn header(&self, web: &Web, refused: Option<&HeaderValue>) -> Result<HeaderValue> {
        let mut state = self.state.lock().await;
        if let Some(known) = &state.token {
            // Another waiter may have renewed the refused one while we queued.
            let refused = refused.is_some_and(|refused| *refused == known.header);
            if Instant::now() < known.renew_at && !refused {
                return Ok(known.header.clone());
            }
        }
        let renewed = self.fetch(web, &mut state).await?;
        let header = renewed.header.clone();
        if let Some(granted) = &renewed.granted
            && !state.told
        {
            let missing = not_granted(granted, &self.settings.access);
            if !missing.is_empty() {
                tracing::warn!(scope = %granted, types = %missing.join(", "), "the granted scope does not let these \
                    types be read");
            }
            state.told = true;
        }
        state.token = Some(renewed);
        Ok(header)
    }

    async fn check(&self, web: &Web) -> Result<Granted> {
        let mut state = State::default();
        let token = self.fetch(web, &mut state).await?;
        let server = state.server.unwrap_or_default();
        Ok(Granted {
            endpoint: Some(self.endpoint(&server)?),
            requested: self.scope(&server),
            missing: token
                .granted
                .as_deref()
                .map(|granted| not_granted(granted, &self.settings.access))
                .unwrap_or_default(),
            granted: token.granted,
            key: self.key.as_ref().map(|key| (key.algorithm(), key.kid().map(str::to_owned))),
            life: token.life,
            server: Some(server),
        })
    }

    fn endpoint(&self, server: &SmartConfiguration) -> Result<Url> {
        let endpoint = self.settings.token_url.as_ref().or(server.token_endpoint.as_ref());
        let endpoint =
            endpoint.cloned().ok_or_else(|| auth_error("no token endpoint is known; set source.auth.token_url"))?;
        let is_here = match endpoint.host() {
            Some(url::Host::Domain(name)) => name == "localhost",
            Some(url::Host::Ipv4(address)) => address.is_loopback(),
            Some(url::Host::Ipv6(address)) => address.is_loopback(),
            None => false,
        };
        if endpoint.scheme() != "https" && !is_here && !self.settings.plain_http {
            let why = format!("the server names a token endpoint without encryption: {}", shown(&endpoint));
            return Err(auth_error(why).with_hint(
                "the client secret would be sent unencrypted: use https, or set source.auth.plain_http: true",
            ));
        }
        Ok(endpoint)
    }

    fn scope(&self, server: &SmartConfiguration) -> String {
        self.settings.scope.clone().unwrap_or_else(|| server.scopes_for(&self.settings.access))
    }

    /// A new token, asked for with a new assertion each time (T8).
    async fn fetch(&self, web: &Web, state: &mut State) -> Result<Token> {
        let server = match state.server.take() {
            Some(server) => server,
            // With endpoint and scope given there is nothing to discover.
            None if self.settings.token_url.is_some() && self.settings.scope.is_some() => SmartConfiguration::default(),
            None => match SmartConfiguration::discover(web).await {
                Ok(server) => server,
                Err(error) if self.settings.token_url.is_some() && error.kind() == ErrorKind::Auth => {
                    SmartConfiguration::default()
                }
                Err(error) => return Err(error),
            },
        };
        let server = state.server.insert(server);
        let (endpoint, scope) = (self.endpoint(server)?, self.scope(server));
        for tried in 1.. {
            match self.ask(web, &endpoint, &scope, server.skew).await? {
                Answer::Token(token) => return Ok(token),
                Answer::Refused { why, skew, final_word } => {
                    // A clock that is off is the likeliest reason that can be mended.
                    let clock = skew != server.skew;
                    server.skew = skew;
                    if tried >= TRIES || (final_word && !clock) {
                        return Err(auth_error(why));
                    }
                    tracing::warn!(why, "asking for a token again");
                    tokio::time::sleep(Duration::from_millis(250 << tried)).await;
                }
            }
        }
        Err(auth_error("no token"))
    }

    async fn ask(&self, web: &Web, endpoint: &Url, scope: &str, skew: i64) -> Result<Answer> {
        let id = self.settings.client_id.expose_secret();
        web.reach.check(endpoint, "the token endpoint").await?;
        let mut form = vec![("grant_type", "client_credentials".to_owned()), ("scope", scope.to_owned())];
        let mut request = web.http.post(endpoint.clone()).header("accept", "application/json");
        match (&self.settings.proof, &self.key) {
            (Proof::Key(..), Some(key)) => {
                let audience = self.settings.audience.as_deref().unwrap_or(endpoint.as_str());
                form.push((
                    "client_assertion_type",
                    "urn:ietf:params:oauth:client-assertion-type:jwt-bearer".to_owned(),
                ));
                form.push(("client_assertion", key.assertion(id, audience, skew)?));
            }
            (Proof::SecretInHeader(secret), _) => {
                // Each encoded as in a form before they are joined (RFC 6749, section 2.3.1).
                let encoded = |text: &str| url::form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>();
                let pair = STANDARD.encode(format!("{}:{}", encoded(id), encoded(secret.expose_secret())));
                let mut header =
                    HeaderValue::from_str(&format!("Basic {pair}")).map_err(|_| auth_error("auth.client_secret"))?;
                header.set_sensitive(true);
                request = request.header(AUTHORIZATION, header);
            }
            (Proof::SecretInForm(secret), _) => {
                form.push(("client_id", id.to_owned()));
                form.push(("client_secret", secret.expose_secret().to_owned()));
            }
            (Proof::Key(..), None) => return Err(Error::new(ErrorKind::Internal, "a key that was not read")),
        }
        let response = request.form(&form).send().await;
        let response = response.map_err(|error| {
            crate::http::network(&error, "the token endpoint cannot be reached").at(shown(endpoint))
        })?;
        let status = response.status();
        let theirs = clock_skew(response.headers());
        let body = whole(response, SMALL, &web.stop, "the token endpoint").await?;
        if status.is_server_error() || matches!(status.as_u16(), 408 | 425 | 429) {
            return Err(Error::new(ErrorKind::Network, format!("the token endpoint answered {status}")));
        }
        let json: Value = serde_json::from_slice(&body).unwrap_or(Value::Null);
        let Some(access) = json.get("access_token").and_then(Value::as_str).filter(|_| status.is_success()) else {
            let code = json.get("error").and_then(Value::as_str);
            let words = json.get("error_description").and_then(Value::as_str).or(code);
            let words = words.map_or_else(|| server_words(&body), |text| one_line(text, 300));
            let why = format!("the token endpoint answered {status} to a request for the scope {scope}: {words}");
            return Ok(Answer::Refused { why, skew: theirs, final_word: code.is_some() });
        };
        // Some send a number as text.
        let life = json.get("expires_in").and_then(|life| life.as_f64().or_else(|| life.as_str()?.parse().ok()));
        let life = life.filter(|life| *life >= 0.0).map_or(DEFAULT_TOKEN_LIFE, |life| life as u64);
        let life = Duration::from_secs(life.min(24 * 3600));
        // Ahead of its end by 30 s, or by a tenth of a short life.
        let ahead = Duration::from_secs(30).min(life / 10);
        Ok(Answer::Token(Token {
            header: bearer(access)?,
            renew_at: Instant::now() + (life - ahead),
            life,
            granted: json.get("scope").and_then(Value::as_str).map(str::to_owned),
        }))
    }
}

/// Response of a token endpoint.
enum Answer {
    Token(Token),
    /// `final_word` where it gives an OAuth error's code.
    Refused {
        why: String,
        skew: i64,
        final_word: bool,
    },
}
