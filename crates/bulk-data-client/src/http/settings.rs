//! Settings of requests: retries, pauses, headers, certificates, proxies.

use std::time::Duration;

use reqwest::header::HeaderMap;
use url::Origin;

use crate::http::tls::TlsSettings;

/// Settings of the client.
#[derive(Debug, Clone)]
pub struct HttpSettings {
    /// Time for which a request is retried before it fails.
    pub retry_for: Duration,
    /// First pause; doubled each time.
    pub min_pause: Duration,
    /// Longest pause that we choose, and longest that a server may ask for.
    pub max_pause: Duration,
    /// Time for which a connection, or a response that has begun, may stand still.
    pub stall: Duration,
    /// Longest pause that a refused kick-off may ask for and is waited for.
    pub max_kick_off_wait: Duration,
    /// Headers of every request to the server.
    pub headers: HeaderMap,
    /// Origins beside the server's own that may get the token.
    pub token_origins: Vec<Origin>,
    /// Statuses of polls and files that pass by themselves with this server, beside the usual ones.
    pub retry_status: Vec<u16>,
    /// Files at the same time.
    pub downloads: usize,
    /// True if no host is asked by a proxy, whatever the environment names.
    pub no_proxy: bool,
    /// Certificates beside the system's.
    pub tls: TlsSettings,
    /// Hosts that the pipeline file or the environment names, wherever they are.
    pub named_hosts: Vec<String>,
    /// The `User-Agent` of each request.
    pub user_agent: &'static str,
    /// Returns the W3C `traceparent` that requests to the server carry, where there is a trace.
    pub traceparent: Option<fn() -> Option<String>>,
}

impl Default for HttpSettings {
    fn default() -> Self {
        Self {
            retry_for: Duration::from_secs(15 * 60),
            min_pause: Duration::from_millis(500),
            max_pause: Duration::from_secs(60),
            stall: Duration::from_secs(120),
            max_kick_off_wait: Duration::from_secs(60),
            headers: HeaderMap::new(),
            token_origins: Vec::new(),
            retry_status: Vec::new(),
            downloads: 10,
            no_proxy: false,
            tls: TlsSettings::default(),
            named_hosts: Vec::new(),
            user_agent: concat!("bulk-data-client/", env!("CARGO_PKG_VERSION")),
            traceparent: None,
        }
    }
}
