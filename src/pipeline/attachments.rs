//! The stage that fetches attachments, where a pipeline asks for it.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tracing::Instrument;
use url::Url;

use super::prepare::Prepared;
use crate::config::AttachmentsSection;
use crate::error::Result;
use crate::messages::Rows;
use crate::stages::attach::{ATTACHMENTS_FOLDER, Attach, AttachSettings};
use bulk_data_client::Client;
use flow::{Board, Crew, Receiver, Sender};
use foundation::secure_fs::private_dir;

/// Starts its workers, from the edge `rows` to the edge `attached`.
pub(super) fn spawn(
    crew: &mut Crew,
    section: &AttachmentsSection,
    prepared: &Prepared,
    client: Client,
    (rows, attached): (Receiver<Rows>, Sender<Rows>),
    board: &Board,
) -> Result<()> {
    let concurrency = section.concurrency.max(1);
    let any = section.origins.iter().any(|origin| origin == "any");
    let origins = section.origins.iter().filter_map(|origin| Some(Url::parse(origin).ok()?.origin())).collect();
    let settings = Arc::new(AttachSettings {
        inline_up_to: section.inline_up_to.0,
        max_size: section.max_size.0,
        types: section.types.iter().map(|name| name.as_str().into()).collect(),
        content_types: section.content_types.iter().map(|text| text.to_ascii_lowercase()).collect(),
        origins: (!any).then_some(origins),
        chunk_bytes: prepared.plan.chunk_bytes,
    });
    if let Some(folder) = prepared.tables.local() {
        private_dir(&folder.join(ATTACHMENTS_FOLDER))?;
    }
    let places = Arc::new(Semaphore::new(concurrency));
    let (store, failures, said) = (prepared.tables.store()?, Arc::default(), Arc::default());
    for _ in 0..concurrency {
        let worker = Attach {
            rows: rows.clone(),
            attached: attached.clone(),
            client: client.clone(),
            store: store.clone(),
            settings: settings.clone(),
            places: places.clone(),
            failures: Arc::clone(&failures),
            said: Arc::clone(&said),
            board: board.clone(),
            stop: crew.stop().clone(),
        };
        crew.spawn("attach", async move { worker.run().await }.in_current_span());
    }
    Ok(())
}
