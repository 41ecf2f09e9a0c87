//! Kick-off, polling and the end of an export.

use std::time::Duration;

use reqwest::header::{ACCEPT, HeaderMap, HeaderValue};
use reqwest::{Method, StatusCode};
use url::Url;

use super::http::{Ask, Client, refusal, retry_after};
use super::manifest::Manifest;
use crate::error::{Context, Error, ErrorKind, Result};

/// Whose data is exported (K1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Level {
    /// `[base]/$export`
    System,
    /// `[base]/Patient/$export`
    Patient,
    /// `[base]/Group/[id]/$export`
    Group(String),
}

/// What is asked of the server.
#[derive(Debug, Clone)]
pub struct ExportRequest {
    /// Whose data.
    pub level: Level,
    /// `_type`; empty for all.
    pub types: Vec<String>,
    /// `_since`, microseconds since the epoch.
    pub since: Option<i64>,
}

impl ExportRequest {
    /// The kick-off URL under `base`.
    pub fn url(&self, base: &Url) -> Result<Url> {
        let mut url = base.clone();
        {
            let mut path =
                url.path_segments_mut().map_err(|()| Error::new(ErrorKind::Config, "source.url cannot be a base of requests"))?;
            path.pop_if_empty();
            match &self.level {
                Level::System => {}
                Level::Patient => {
                    path.push("Patient");
                }
                Level::Group(id) => {
                    path.push("Group").push(id);
                }
            }
            path.push("$export");
        }
        if !self.types.is_empty() {
            url.query_pairs_mut().append_pair("_type", &self.types.join(","));
        }
        if let Some(since) = self.since {
            let time = chrono::DateTime::from_timestamp_micros(since)
                .ok_or_else(|| Error::new(ErrorKind::Config, "since is out of range"))?;
            url.query_pairs_mut().append_pair("_since", &time.to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true));
        }
        Ok(url)
    }
}

/// The answer to one poll.
#[derive(Debug)]
pub enum Poll {
    /// The server still works.
    Working {
        /// Its own words on how far it is.
        progress: Option<String>,
        /// How long it asks us to wait.
        wait: Option<Duration>,
    },
    /// The manifest.
    Done(Box<Manifest>),
}

impl Client {
    /// Asks for an export; the status URL.
    pub async fn kick_off(&self, request: &ExportRequest) -> Result<Url> {
        let url = request.url(self.base())?;
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static("application/fhir+json"));
        headers.insert("prefer", HeaderValue::from_static("respond-async"));
        let ask = Ask { method: Method::GET, url: &url, headers, with_token: true, what: "the kick-off" };
        let response = self.send(&ask).await?;
        if response.status() != StatusCode::ACCEPTED {
            return Err(refusal(response, ask.what).await);
        }
        let location = response.headers().get("content-location").and_then(|to| to.to_str().ok());
        let location = location
            .ok_or_else(|| Error::new(ErrorKind::Server, "the kick-off was accepted without a Content-Location to poll"))?;
        url.join(location).context(ErrorKind::Server, "the kick-off's Content-Location is no URL")
    }

    /// Asks once how an export stands.
    pub async fn poll(&self, status: &Url) -> Result<Poll> {
        let headers = HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static("application/json"))]);
        let ask = Ask { method: Method::GET, url: status, headers, with_token: true, what: "the export's status" };
        let response = self.send(&ask).await?;
        match response.status() {
            StatusCode::ACCEPTED => {
                let progress = response.headers().get("x-progress").and_then(|text| text.to_str().ok());
                let progress = progress.map(|text| text.chars().take(100).collect());
                Ok(Poll::Working { progress, wait: retry_after(response.headers()) })
            }
            StatusCode::OK => {
                let body = response.bytes().await.map_err(|error| error.without_url());
                let body = body.context(ErrorKind::Network, "the manifest broke off")?;
                Ok(Poll::Done(Box::new(Manifest::read(&body, status)?)))
            }
            _ => Err(refusal(response, ask.what).await),
        }
    }

    /// Polls until the export is done (S1 to S5). `heard` gets the server's words on its progress.
    pub async fn wait(&self, status: &Url, timeout: Option<Duration>, heard: impl Fn(&str)) -> Result<Manifest> {
        let began = tokio::time::Instant::now();
        let mut pause = self.settings().min_pause;
        loop {
            match self.poll(status).await? {
                Poll::Done(manifest) => return Ok(*manifest),
                Poll::Working { progress, wait } => {
                    heard(progress.as_deref().unwrap_or("in progress"));
                    let wait = wait.unwrap_or(pause).clamp(Duration::from_millis(50), self.settings().max_pause);
                    pause = (pause * 2).min(self.settings().max_pause);
                    if let Some(timeout) = timeout
                        && began.elapsed() + wait > timeout
                    {
                        return Err(Error::new(
                            ErrorKind::Server,
                            format!("the export was not done within source.timeout ({} s)", timeout.as_secs()),
                        ));
                    }
                    if self.stop().or(tokio::time::sleep(wait)).await.is_none() {
                        return Err(Error::new(ErrorKind::Interrupted, "stopped while the server was exporting"));
                    }
                }
            }
        }
    }

    /// Tells the server that its files are no longer needed. Servers answer this in many ways; none is an error
    /// of the run.
    pub async fn delete_export(&self, status: &Url) {
        let ask =
            Ask { method: Method::DELETE, url: status, headers: HeaderMap::new(), with_token: true, what: "the export's end" };
        match self.send(&ask).await {
            Ok(response) if response.status().is_success() || matches!(response.status().as_u16(), 404 | 405 | 410 | 501) => {}
            Ok(response) => tracing::warn!(status = %response.status(), "the server did not take the export back"),
            Err(error) => tracing::warn!(%error, "the export could not be given back to the server"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kick_off_urls() {
        let base = Url::parse("https://h.example/fhir/").unwrap();
        let request = ExportRequest { level: Level::System, types: vec![], since: None };
        assert_eq!(request.url(&base).unwrap().as_str(), "https://h.example/fhir/$export");
        let request = ExportRequest {
            level: Level::Group("a/b".into()),
            types: vec!["Patient".into(), "Condition".into()],
            since: Some(1_767_323_045_000_000),
        };
        assert_eq!(
            request.url(&base).unwrap().as_str(),
            "https://h.example/fhir/Group/a%2Fb/$export?_type=Patient%2CCondition&_since=2026-01-02T03%3A04%3A05Z"
        );
    }
}
