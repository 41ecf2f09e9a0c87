//! Connections of a run: its state, its tables, its server and its folder of NDJSON.

use std::sync::Arc;

use url::Url;

use super::{RunPlan, SourcePlan};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::state::StateStore;
use bulk_data_client::{Auth, Client};
use delta_upsert::Tables;
use flow::{Cancellation, Counters};

/// Returns the state of a plan, in a folder or in an object store.
pub fn state_of(plan: &RunPlan) -> Result<StateStore> {
    if !plan.state.contains("://") {
        return Ok(StateStore::local(std::path::Path::new(&plan.state), plan.state_file.as_deref()));
    }
    StateStore::object(&plan.state, plan.lock_expiry, || Tables::at(&plan.state)?.store())
}

/// Returns a folder or URL of a plan, for messages: relative paths are from where the process was started.
pub fn location(place: &str) -> String {
    let is_url = place.contains("://");
    let absolute = if is_url { None } else { std::path::absolute(place).ok() };
    absolute.map_or_else(|| place.to_owned(), |path| path.display().to_string())
}

/// Returns the tables of a plan, to which nothing is committed once the state's lease is lost.
pub(crate) fn tables_of(plan: &RunPlan, state: &StateStore) -> Result<Tables> {
    Ok(Tables::at(&plan.tables)?.guarded(state.guard()))
}

/// Returns the client of a plan's server; `None` where its source is a folder.
pub fn client(plan: &RunPlan, counters: &Counters, stop: &Cancellation) -> Result<Option<Client>> {
    match &plan.source {
        SourcePlan::Folder(_) => Ok(None),
        SourcePlan::Server { base, auth, http, .. } => {
            let auth = Auth::new(auth.clone())?;
            Client::new(base.clone(), auth, http.clone(), counters.clone(), stop.clone()).map(Some)
        }
    }
}

/// Returns the folder of a source of NDJSON, local or in an object store.
pub(super) fn source_folder(url: &Url) -> Result<Arc<dyn object_store::ObjectStore>> {
    if url.scheme() != "file" {
        return Tables::at(url.as_str())?.store().map_err(|error| error.at("source.url"));
    }
    let path = url.to_file_path().map_err(|()| Error::new(ErrorKind::Config, "source.url is not a folder"))?;
    if !path.is_dir() {
        return Err(Error::new(ErrorKind::Config, format!("source.url: {} is not a folder", path.display())));
    }
    // Not from the root: names on the way need not be such as objects may have.
    let store =
        object_store::local::LocalFileSystem::new_with_prefix(&path).context(ErrorKind::Config, "source.url")?;
    Ok(Arc::new(store))
}

/// Returns the local folders that fhirlake writes into and that lie in the source folder, as seen from there.
pub(super) fn own_folders(source: &Url, state: &StateStore, tables: &Tables) -> Vec<object_store::path::Path> {
    let state = state.folder().map(std::path::Path::to_path_buf);
    let Some(source) = source.to_file_path().ok().and_then(|source| source.canonicalize().ok()) else {
        return Vec::new();
    };
    let canonical = |folder: std::path::PathBuf| folder.canonicalize().or_else(|_| std::path::absolute(&folder)).ok();
    let folders = state.into_iter().chain(tables.local()).filter_map(canonical);
    let below =
        folders.filter_map(|folder| folder.strip_prefix(&source).ok()?.to_str().map(object_store::path::Path::parse));
    below.filter_map(std::result::Result::ok).filter(|folder| folder.parts().next().is_some()).collect()
}
