//! Reading of a table's log: any folder of the file system, and logs whose checkpoints cannot be.

use std::collections::HashSet;
use std::sync::Arc;

use deltalake::DeltaTableBuilder;
use deltalake::logstore::{LogStoreRef, StorageConfig, logstore_with};
use futures::stream::BoxStream;
use futures::{TryFutureExt, TryStreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt,
    ObjectStoreScheme, PutMultipartOptions, PutOptions, PutPayload, PutResult,
};
use tokio_stream::StreamExt as _;
use url::Url;

use crate::table::{storage, table_folder};
use foundation::error::{Error, ErrorKind, Result};

const HINT: &str = "_delta_log/_last_checkpoint";

/// The log store of `below`, a relative URL, in the folder `root`.
pub(crate) fn open(root: &Url, below: &str) -> Result<LogStoreRef> {
    let failed = |error| storage(error, "the table's store cannot be used");
    if let Some(folder) = root.to_file_path().ok().filter(|folder| !survives(folder)) {
        // The kernel would look for it under another name. From the folder on, names are ours; it asks the file system
        // for what is of the scheme `file`, so this is of another.
        table_folder(&folder)?;
        let store = object_store::local::LocalFileSystem::new_with_prefix(&folder)
            .map_err(|error| storage(error, &format!("{} cannot be used", folder.display())))?;
        let url = Url::parse("memory:///").and_then(|url| url.join(below));
        let url = url.map_err(|error| storage(error, "the table's place cannot be used"))?;
        // It also takes listings of other schemes for sorted, which those of a file system are not.
        let sorted = Shown { inner: Arc::new(store), hidden: Arc::default() };
        return logstore_with(Arc::new(sorted), &url, StorageConfig::default()).map_err(failed);
    }
    let url = root.join(below).map_err(|error| storage(error, "the table's place cannot be used"))?;
    DeltaTableBuilder::from_url(url).and_then(|builder| builder.build_storage()).map_err(failed)
}

/// Returns true if a path is the same after the kernel has made a URL of it, which takes `%20` and `\` for something
/// else.
fn survives(path: &std::path::Path) -> bool {
    let Some((text, mut url)) = path.to_str().zip(Url::parse("file:///").ok()) else { return false };
    url.set_path(text);
    url.to_file_path().is_ok_and(|made| made == path)
}

/// A log whose checkpoints of now are passed over, where there are any and all commits are there as JSON; the protocol
/// says of checkpoints that they may be (Delta protocol, "Checkpoints": a reader may ignore them). `None` where there
/// are none.
///
/// If commits are missing: an error if a checkpoint caused the `failure` to read the log, else `None` too.
pub(crate) async fn without_checkpoints(
    log_store: &LogStoreRef,
    failure: &deltalake::DeltaTableError,
) -> Result<Option<LogStoreRef>> {
    let failed = |error: object_store::Error| storage(error, "the table's log cannot be listed");
    let root = log_store.root_object_store(None);
    let url = log_store.root_url();
    // As the kernel finds a table's place in its store.
    let prefix = ObjectStoreScheme::parse(url).map(|(_, path)| path);
    let prefix = prefix.or_else(|_| Path::from_url_path(url.path())).map_err(|error| storage(error, "not a place"))?;
    let log = prefix.clone().join("_delta_log");
    let names: Vec<Path> = root
        .list(Some(&log))
        .map(|object| object.map(|object| object.location))
        .collect::<object_store::Result<_>>()
        .await
        .map_err(failed)?;
    let is_checkpoint =
        |path: &&Path| path.filename().is_some_and(|name| name.contains(".checkpoint") || name == "_last_checkpoint");
    let mut hidden: HashSet<Path> = names.iter().filter(is_checkpoint).cloned().collect();
    if hidden.is_empty() {
        return Ok(None);
    }
    let version =
        |path: &Path| path.filename()?.strip_suffix(".json").filter(|stem| stem.len() == 20)?.parse::<u64>().ok();
    let mut versions: Vec<u64> = names.iter().filter_map(version).collect();
    versions.sort_unstable();
    if versions.is_empty() || versions.iter().enumerate().any(|(at, version)| *version != at as u64) {
        let words = failure.to_string();
        if !is_damaged(&root, &hidden, &words).await {
            return Ok(None);
        }
        let why = format!("its checkpoint cannot be read, and older commits are no longer there as JSON: {words}");
        return Err(Error::new(ErrorKind::Table, why).with_hint(
            "restore `_delta_log` from a backup, or let another engine repair the table; to reload it, move its \
                folder away and run with --full-refresh",
        ));
    }
    hidden.insert(prefix.parts().chain(Path::from(HINT).parts()).collect());
    let store = Shown { inner: root, hidden: Arc::new(hidden) };
    let config = log_store.config().options().clone();
    let opened = logstore_with(Arc::new(store), log_store.root_url(), config);
    opened.map(Some).map_err(|error| storage(error, "the table's store cannot be used"))
}

/// Returns true if the newest checkpoint is missing, cut short or not Parquet, so that the log cannot be read with it.
/// `words` is the error that reading gave.
async fn is_damaged(store: &Arc<dyn ObjectStore>, hidden: &HashSet<Path>, words: &str) -> bool {
    let Some(newest) = hidden.iter().filter(|path| path.extension() == Some("parquet")).max() else { return true };
    let size = match store.head(newest).await {
        Ok(found) => found.size,
        Err(error) => return matches!(error, object_store::Error::NotFound { .. }),
    };
    if size < 12 {
        return true;
    }
    match store.get_range(newest, size - 4..size).await {
        Ok(end) => *end != *b"PAR1" || words.contains("arquet") || words.contains("Arrow"),
        Err(_) => false,
    }
}

/// A store that lists what comes after a name in order, without the files that are hidden.
#[derive(Debug, Clone)]
struct Shown {
    inner: Arc<dyn ObjectStore>,
    hidden: Arc<HashSet<Path>>,
}

impl std::fmt::Display for Shown {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} without {} files", self.inner, self.hidden.len())
    }
}

impl Shown {
    fn seen(
        &self,
        listed: BoxStream<'static, object_store::Result<ObjectMeta>>,
    ) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        let hidden = self.hidden.clone();
        let seen = move |object: &object_store::Result<ObjectMeta>| {
            object.as_ref().map_or(true, |object| !hidden.contains(&object.location))
        };
        Box::pin(listed.filter(seen))
    }
}

#[async_trait::async_trait]
impl ObjectStore for Shown {
    async fn put_opts(&self, to: &Path, payload: PutPayload, options: PutOptions) -> object_store::Result<PutResult> {
        self.inner.put_opts(to, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        to: &Path,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(to, options).await
    }

    async fn get_opts(&self, from: &Path, options: GetOptions) -> object_store::Result<GetResult> {
        if self.hidden.contains(from) {
            return Err(object_store::Error::NotFound {
                path: from.to_string(),
                source: "a checkpoint that is passed over".into(),
            });
        }
        self.inner.get_opts(from, options).await
    }

    fn delete_stream(
        &self,
        places: BoxStream<'static, object_store::Result<Path>>,
    ) -> BoxStream<'static, object_store::Result<Path>> {
        self.inner.delete_stream(places)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        self.seen(self.inner.list(prefix))
    }

    fn list_with_offset(
        &self,
        prefix: Option<&Path>,
        offset: &Path,
    ) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        let listed = self.seen(self.inner.list_with_offset(prefix, offset)).try_collect::<Vec<_>>();
        let sorted = listed.map_ok(|mut objects| {
            objects.sort_unstable_by(|one, other| one.location.cmp(&other.location));
            tokio_stream::iter(objects.into_iter().map(Ok))
        });
        Box::pin(sorted.try_flatten_stream())
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> object_store::Result<ListResult> {
        let mut listed = self.inner.list_with_delimiter(prefix).await?;
        listed.objects.retain(|object| !self.hidden.contains(&object.location));
        Ok(listed)
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    // Breaks if a folder is made under one name and looked for under another.
    #[test]
    fn names_that_urls_change() {
        for fine in ["/a b/c", "/ä", "/a#b?c", "/100%", "/[x]", "/a%zz"] {
            assert!(survives(std::path::Path::new(fine)), "{fine}");
        }
        for odd in ["/a%20b", "/a\\b", "/%25", "/a%2Fb/c", "/a\tb", "/a\nb"] {
            assert!(!survives(std::path::Path::new(odd)), "{odd}");
        }
    }
}
