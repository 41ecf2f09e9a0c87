//! Links of files that end before the files are read (F7): the manifest has newer ones.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;
use url::Url;

use super::export::Poll;
use super::http::Client;
use super::manifest::Manifest;
use crate::error::{Error, ErrorKind, Result};

/// Asking for a page again sooner gives no newer links.
const INTERVAL: Duration = Duration::from_secs(10);

/// Where a file stands: its export, the page of the manifest, the list of the page, and its place in that.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct LinkPlace {
    /// Which of the run's exports.
    pub export: usize,
    /// Which page of its manifest.
    pub page: usize,
    /// Which list of the page: 0 for output, 1 for deletions, 2 for outcomes.
    pub list: usize,
    /// Which file of the list.
    pub file: usize,
}

/// The pages of all manifests of a run. Clones share them.
#[derive(Debug, Clone, Default)]
pub struct Links {
    pages: Arc<Mutex<HashMap<(usize, usize), Page>>>,
}

#[derive(Debug)]
struct Page {
    url: Url,
    separate: bool,
    asked: Option<Instant>,
    files: [Vec<Url>; 3],
}

/// The lists of a page.
fn files(manifest: &Manifest) -> [Vec<Url>; 3] {
    let lists = [&manifest.output, &manifest.deleted, &manifest.outcomes];
    lists.map(|list| list.iter().map(|file| file.url.clone()).collect())
}

impl Links {
    /// Remembers where a page came from.
    pub async fn page(&self, export: usize, page: usize, url: &Url, separate: bool, manifest: &Manifest) {
        let known = Page { url: url.clone(), separate, asked: None, files: files(manifest) };
        self.pages.lock().await.insert((export, page), known);
    }

    /// A newer link of a file whose link `ended`; an error where the manifest has none.
    pub async fn refreshed(&self, client: &Client, place: LinkPlace, ended: &Url) -> Result<Url> {
        let gone = |why: &str| Error::new(ErrorKind::Server, format!("the file's link has ended, and {why}"));
        let mut pages = self.pages.lock().await;
        let page = pages.get_mut(&(place.export, place.page)).ok_or_else(|| gone("its manifest is not known"))?;
        // Another file may have asked already.
        if page.asked.is_none_or(|asked| asked.elapsed() >= INTERVAL) {
            let poll = client.poll(&page.url, page.separate).await?;
            let (Poll::Done(manifest) | Poll::Working { partial: Some(manifest), .. }) = poll else {
                return Err(gone("the manifest cannot be had again"));
            };
            page.asked = Some(Instant::now());
            page.files = files(&manifest);
            tracing::info!("links of files were asked for anew");
        }
        let fresh = page.files.get(place.list).and_then(|list| list.get(place.file)).filter(|fresh| *fresh != ended);
        fresh.cloned().ok_or_else(|| gone("the manifest has no newer one"))
    }
}
