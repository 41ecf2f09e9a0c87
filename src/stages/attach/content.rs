//! The body of an attachment as it comes, unpacked where it was packed for the way.

use std::pin::Pin;

use bytes::Bytes;
use tokio_stream::{Stream, StreamExt};

use crate::error::{Error, ErrorKind, Result};
use bulk_data_client::content_encoding::Unpack;

/// Bytes that tell how a body is packed.
const HEAD: usize = 4;

/// A body. A file that is packed itself stays so: only `Content-Encoding` is undone.
pub(super) struct Content {
    body: Pin<Box<dyn Stream<Item = reqwest::Result<Bytes>> + Send>>,
    encoding: Option<String>,
    unpack: Option<Unpack>,
    head: Vec<u8>,
    ended: bool,
}

impl Content {
    pub(crate) fn new(response: reqwest::Response) -> Self {
        let encoding = response.headers().get("content-encoding").and_then(|text| text.to_str().ok());
        let encoding = encoding.map(str::to_ascii_lowercase);
        Self { encoding, body: Box::pin(response.bytes_stream()), unpack: None, head: Vec::new(), ended: false }
    }

    /// The next bytes; `None` at the end.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>> {
        loop {
            let piece = self.body.next().await.transpose();
            let piece = piece.map_err(|error| {
                Error::new(ErrorKind::Network, format!("connection closed early: {}", error.without_url()))
            })?;
            let Some(encoding) = &self.encoding else { return Ok(piece) };
            let mut came = Vec::new();
            let mut sink = |bytes: &[u8]| {
                came.extend_from_slice(bytes);
                Ok(())
            };
            let ends = piece.is_none();
            if ends && std::mem::replace(&mut self.ended, true) {
                return Ok(None);
            }
            // The first bytes may come one by one.
            self.head.extend_from_slice(&piece.unwrap_or_default());
            if self.unpack.is_none() && (self.head.len() >= HEAD || ends && !self.head.is_empty()) {
                self.unpack = Some(Unpack::of(encoding, &self.head)?);
            }
            if let Some(unpack) = &mut self.unpack {
                unpack.push(&std::mem::take(&mut self.head), &mut sink, broken)?;
            }
            if let Some(unpack) = self.unpack.take_if(|_| ends) {
                unpack.end(&mut sink, broken)?;
            }
            if !came.is_empty() {
                return Ok(Some(came.into()));
            }
        }
    }
}

fn broken(error: std::io::Error) -> Error {
    Error::new(ErrorKind::Server, format!("cannot be unpacked: {error}"))
}
