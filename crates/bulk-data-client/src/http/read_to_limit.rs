//! Bodies that are read whole: bounded in bytes and in time, and given up when the run stops.

use std::time::Duration;

use reqwest::Response;
use reqwest::header::CONTENT_ENCODING;

use crate::http::content_encoding::unpacked;
use crate::http::network;
use flow::Cancellation;
use foundation::error::{Error, ErrorKind, Result};

/// Bounds of a body: bytes and time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    /// Most bytes.
    pub bytes: usize,
    /// Longest time from the answer's head to its last byte.
    pub time: Duration,
}

/// Answers of a token endpoint, and of discovery.
pub(crate) const SMALL: Bounds = Bounds { bytes: 1 << 20, time: Duration::from_secs(60) };
/// A server's CapabilityStatement.
pub(crate) const METADATA: Bounds = Bounds { bytes: 16 << 20, time: Duration::from_secs(120) };
/// A page of a manifest: some 300,000 files. A server with more has pages, or larger files.
pub(crate) const MANIFEST: Bounds = Bounds { bytes: 64 << 20, time: Duration::from_secs(600) };

/// The body, or an error where it is more, slower, or broke off.
pub(crate) async fn whole(mut response: Response, bounds: Bounds, stop: &Cancellation, what: &str) -> Result<Vec<u8>> {
    let most = bounds.bytes;
    let encoding = response.headers().get(CONTENT_ENCODING).and_then(|encoding| encoding.to_str().ok());
    let encoding = encoding.unwrap_or_default().to_ascii_lowercase();
    if response.content_length().is_some_and(|length| length > most as u64) {
        return Err(too_long(what, most));
    }
    let read = async {
        let mut body = Vec::new();
        while let Some(bytes) =
            response.chunk().await.map_err(|error| network(&error, &format!("{what}: connection closed early")))?
        {
            if body.len() + bytes.len() > most {
                return Err(too_long(what, most));
            }
            body.extend_from_slice(&bytes);
        }
        Ok(body)
    };
    match stop.or(tokio::time::timeout(bounds.time, read)).await {
        Some(Ok(body)) => unpacked(&encoding, body?, most).map_err(|error| error.at(what.to_owned())),
        Some(Err(_)) => Err(Error::new(
            ErrorKind::Network,
            format!("{what}: the answer did not end within {} s", bounds.time.as_secs()),
        )),
        None => Err(Error::new(ErrorKind::Interrupted, format!("{what}: stopped"))),
    }
}

fn too_long(what: &str, most: usize) -> Error {
    Error::new(ErrorKind::Server, format!("{what}: response exceeds the {} MiB limit", most >> 20))
}
