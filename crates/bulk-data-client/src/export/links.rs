//! Links of files that end before the files are read (F7): the manifest has newer ones.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::Mutex;
use url::Url;

use crate::export::manifest::{Manifest, ManifestFile};
use crate::export::poll::PollStatus;
use crate::http::Client;
use foundation::error::{Error, ErrorKind, Result};

/// Asking for a page again sooner gives no newer links.
const INTERVAL: Duration = Duration::from_secs(10);

/// Place of a file: its export, the page of the manifest, the list of the page, and its place in that.
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
    requested: Option<Instant>,
    /// Its lists when it was asked for last.
    newest: [Vec<Listed>; 3],
    /// All that it ever listed: the places are of those.
    files: [Vec<Listed>; 3],
}

impl Page {
    fn newer(&self, place: LinkPlace) -> Option<Url> {
        let lists = self.files.get(place.list).zip(self.newest.get(place.list));
        lists.and_then(|(old, new)| newer(old, new, place.file)).cloned()
    }
}

/// A file as a page lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Listed {
    url: Url,
    resource_type: Option<String>,
    count: Option<u64>,
}

/// A link without what signs it: the same for the same file, as long as its path is not signed.
pub fn unsigned(link: &Url) -> String {
    // Azure's parameters are two letters, which alone may be anybody's.
    let azure = link.query_pairs().any(|(name, _)| name == "sig");
    let pairs = link.query_pairs().filter(|(name, _)| !is_of_signature(name, azure));
    let query: Vec<(String, String)> = pairs.map(|(name, value)| (name.into_owned(), value.into_owned())).collect();
    format!("{} {} {query:?}", link.host_str().unwrap_or_default(), link.path())
}

/// Returns true if a parameter of a link belongs to its signature, by the names that the stores use: it changes though
/// the file does not. A name that is missing here costs a download, no more.
fn is_of_signature(name: &str, azure: bool) -> bool {
    let name = name.to_ascii_lowercase();
    const AZURE: [&str; 13] =
        ["sig", "se", "st", "sp", "sv", "sr", "spr", "sip", "skoid", "sktid", "skt", "ske", "sks"];
    let known = ["expires", "signature", "awsaccesskeyid", "googleaccessid", "key-pair-id", "policy"];
    known.contains(&name.as_str())
        || (azure && (AZURE.contains(&name.as_str()) || name == "skv"))
        || name.starts_with("x-amz-")
        || name.starts_with("x-goog-")
}

/// The newer link of the file at place `at` of the list `old`, in the list `new`: the server may list files in another
/// order.
fn newer<'a>(old: &[Listed], new: &'a [Listed], at: usize) -> Option<&'a Url> {
    let was = old.get(at)?;
    let name = unsigned(&was.url);
    let mut same = new.iter().filter(|file| unsigned(&file.url) == name);
    if let Some(found) = same.next() {
        return Some(&found.url).filter(|_| same.next().is_none());
    }
    // Paths are signed too: then no old one is among the new, and the place alone tells, where nothing else speaks
    // against it.
    let old_names: Vec<String> = old.iter().map(|file| unsigned(&file.url)).collect();
    let no_path_is_kept = !new.iter().any(|file| old_names.contains(&unsigned(&file.url)));
    let alike = |file: &&Listed| (&file.resource_type, file.count) == (&was.resource_type, was.count);
    let in_order = old.len() == new.len()
        && old.iter().zip(new).all(|(old, new)| (&old.resource_type, old.count) == (&new.resource_type, new.count));
    new.get(at).filter(alike).filter(|_| no_path_is_kept && in_order && was.count.is_some()).map(|file| &file.url)
}

/// The lists of a page.
fn files(manifest: &Manifest) -> [Vec<Listed>; 3] {
    let lists = [&manifest.output, &manifest.deleted, &manifest.outcomes];
    lists.map(|list| {
        let listed = |file: &ManifestFile| Listed {
            url: file.url.clone(),
            resource_type: file.resource_type.clone(),
            count: file.count,
        };
        list.iter().map(listed).collect()
    })
}

impl Links {
    /// Remembers a page, and where it came from. What it lists that it did not list before: which list, the file's
    /// place among all that the page ever listed there, and the file.
    pub async fn page<'m>(
        &self,
        export: usize,
        page: usize,
        url: &Url,
        separate: bool,
        manifest: &'m Manifest,
    ) -> Vec<(usize, usize, &'m ManifestFile)> {
        let mut pages = self.pages.lock().await;
        let new = || Page {
            url: url.clone(),
            separate,
            requested: None,
            newest: Default::default(),
            files: Default::default(),
        };
        let known = pages.entry((export, page)).or_insert_with(new);
        let mut fresh = Vec::new();
        let lists = [&manifest.output, &manifest.deleted, &manifest.outcomes];
        for (list, ((known, listed), given)) in known.files.iter_mut().zip(files(manifest)).zip(lists).enumerate() {
            // How many files of a name were listed before: a link's query may be all that tells two files apart.
            let mut names: HashMap<String, usize> = HashMap::new();
            for file in known.iter() {
                *names.entry(unsigned(&file.url)).or_default() += 1;
            }
            // Paths may be signed too: then none of the old names comes again, and the place tells.
            let by_place = !names.is_empty() && !listed.iter().any(|file| names.contains_key(&unsigned(&file.url)));
            let before = known.len();
            let mut whole: HashSet<Url> = HashSet::new();
            for (at, (file, given)) in listed.into_iter().zip(given).enumerate() {
                // The very same link twice is one file.
                if !whole.insert(file.url.clone()) {
                    continue;
                }
                let seen = match names.get_mut(&unsigned(&file.url)) {
                    Some(0) | None => false,
                    Some(left) => {
                        *left -= 1;
                        true
                    }
                };
                // Taken for one that was there only where all that is said of it is the same: a file read twice costs
                // less than one that is never read.
                let in_place = by_place
                    && at < before
                    && known.get(at).is_some_and(|was| {
                        was.count.is_some() && (&was.resource_type, was.count) == (&file.resource_type, file.count)
                    });
                if !seen && !in_place {
                    fresh.push((list, known.len(), given));
                    known.push(file);
                }
            }
        }
        fresh
    }

    /// A newer link of a file whose link `ended`; an error where the manifest has none.
    pub async fn refreshed(&self, client: &Client, place: LinkPlace, ended: &Url) -> Result<Url> {
        let gone = |why: &str| {
            Error::new(ErrorKind::Server, format!("download URL expired and could not be refreshed: {why}"))
        };
        let mut pages = self.pages.lock().await;
        let page = pages.get_mut(&(place.export, place.page)).ok_or_else(|| gone("its manifest is not known"))?;
        // Another file may have asked already.
        if let Some(fresh) = page.newer(place).filter(|fresh| fresh != ended) {
            return Ok(fresh);
        }
        // What was asked for just now says it for all: files that are missing must not wait for each other.
        let first = page.files.get(place.list).and_then(|files| files.get(place.file));
        let signs_anew = first.is_some_and(|first| first.url != *ended);
        if let Some(requested) = page.requested.filter(|requested| requested.elapsed() < INTERVAL) {
            if !signs_anew {
                return Err(gone("the refreshed manifest has the same URL"));
            }
            // A link of one use: there will be another.
            tokio::time::sleep(INTERVAL.saturating_sub(requested.elapsed())).await;
        }
        let manifest = ask(client, page).await?.ok_or_else(|| gone("the manifest cannot be had again"))?;
        page.requested = Some(Instant::now());
        page.newest = files(&manifest);
        tracing::info!("download URLs were refreshed from the manifest");
        page.newer(place).filter(|fresh| fresh != ended).ok_or_else(|| gone("the manifest has no newer one"))
    }
}

/// Asks for a page again, and once more where the server is only busy.
async fn ask(client: &Client, page: &Page) -> Result<Option<Box<Manifest>>> {
    for _ in 0..TRIES {
        match client.poll(&page.url, page.separate).await? {
            PollStatus::Done(manifest) | PollStatus::InProgress { partial: Some(manifest), .. } => {
                return Ok(Some(manifest));
            }
            PollStatus::Transient { wait, .. } => {
                let wait = wait.unwrap_or(client.settings().min_pause).min(client.settings().max_pause);
                tokio::time::sleep(wait.max(Duration::from_millis(200))).await;
            }
            _ => return Ok(None),
        }
    }
    Ok(None)
}

/// Number of requests for a manifest while the server is busy.
const TRIES: usize = 10;

#[cfg(test)]
mod tests {
    use super::*;

    // Breaks if a file is read twice and another not at all, since the server lists them in another order.
    #[test]
    fn a_newer_link_is_of_the_same_file() {
        let listed = |url: &str, count: u64| Listed {
            url: Url::parse(url).unwrap(),
            resource_type: Some("Patient".into()),
            count: Some(count),
        };
        let old = [listed("https://x/a?sig=1", 5), listed("https://x/b?sig=1", 7)];
        let turned = [listed("https://x/b?sig=2", 7), listed("https://x/a?sig=2", 5)];
        assert_eq!(newer(&old, &turned, 0).unwrap().as_str(), "https://x/a?sig=2");
        assert_eq!(newer(&old, &turned, 1).unwrap().as_str(), "https://x/b?sig=2");
        // The path is signed: the place tells, as long as all counts are where they were.
        let signed = [listed("https://x/s2/a", 5), listed("https://x/s2/b", 7)];
        assert_eq!(newer(&old, &signed, 1).unwrap().path(), "/s2/b");
        let signed_and_turned = [listed("https://x/s2/b", 7), listed("https://x/s2/a", 5)];
        assert_eq!(newer(&old, &signed_and_turned, 1), None);
        assert_eq!(newer(&old, &old[..1], 1), None, "it is not listed any more");
        // A link whose query alone tells two files apart is two files, whatever the parameter is called.
        assert_ne!(
            unsigned(&Url::parse("https://x/dl?token=a").unwrap()),
            unsigned(&Url::parse("https://x/dl?token=b").unwrap())
        );
        assert_ne!(unsigned(&Url::parse("https://x/1").unwrap()), unsigned(&Url::parse("https://y/1").unwrap()));
        // Numbers in a query are part of the name.
        let by_number = [listed("https://x/f?id=1&Expires=1", 5), listed("https://x/f?id=2&Expires=1", 5)];
        let later = [listed("https://x/f?id=2&Expires=2", 5), listed("https://x/f?id=1&Expires=2", 5)];
        assert_eq!(newer(&by_number, &later, 0).unwrap().query(), Some("id=1&Expires=2"));
    }

    // Breaks if a file is taken for another of the page, and its rows never come.
    #[tokio::test]
    async fn files_that_only_their_signatures_tell_apart_are_all_read() {
        let manifest = |names: &[&str]| {
            let output: Vec<String> =
                names.iter().map(|name| format!("{{\"type\":\"Patient\",\"url\":\"/dl?sig={name}\"}}")).collect();
            let body = format!("{{\"transactionTime\":\"2026-01-01T00:00:00Z\",\"output\":[{}]}}", output.join(","));
            Manifest::read(body.as_bytes(), &Url::parse("https://x/status").unwrap()).unwrap()
        };
        let (links, url) = (Links::default(), Url::parse("https://x/status").unwrap());
        assert_eq!(links.page(0, 0, &url, false, &manifest(&["a", "b", "a"])).await.len(), 2);
        assert_eq!(links.page(0, 0, &url, false, &manifest(&["c", "d"])).await.len(), 0, "the same two, signed anew");
        assert_eq!(links.page(0, 0, &url, false, &manifest(&["e", "f", "g"])).await.len(), 1);
    }
}
