//! `stages.attachments` of the pipeline file.

use std::sync::Arc;

use tokio::sync::Semaphore;
use tracing::Instrument;
use url::Url;

use super::{ATTACHMENTS_FOLDER, Attach, AttachSettings};
use crate::error::Result;
use crate::messages::Rows;
use crate::stages::{EdgeBytes, EdgeSpec, RunContext, Section, Stage, StageSpec, Stages};
use crate::values::{ByteSize, Findings, Types, is_origin, section};
use flow::{Receiver, Sender};
use foundation::secure_fs::private_dir;

section! {
    /// Attachments that resources link to: fetched, and kept as files in `attachments` beside the tables, or in the
    /// resource.
    pub struct AttachmentsSection {
        /// Attachments of at most so many bytes become the `data` of their resource; larger ones, and all with 0,
        /// become files, and `url` their path from the tables' folder on.
        pub inline_up_to: ByteSize = ByteSize(0),
        /// Larger ones stay links.
        pub max_size: ByteSize = ByteSize(1 << 30),
        /// Resource types whose attachments are fetched; empty for all.
        pub types: Types = Types::All,
        /// Content types that are fetched, `application/pdf` or `image/*`; empty for all.
        pub content_types: Vec<String> = Vec::new(),
        /// Hosts beside the server's and the export files' that attachments are fetched from; `[any]` for all there
        /// are.
        pub origins: Vec<String> = Vec::new(),
        /// Attachments at the same time.
        #[schemars(range(min = 1, max = 256))]
        pub concurrency: usize = 10,
    }
}

impl Stage for Attach {
    const SPEC: &'static StageSpec = &StageSpec {
        name: "attach",
        summary: &["attachments to", "files or data"],
        input: Some(EdgeSpec { carries: "rows", items: 256, bytes: EdgeBytes::SplitsNext }),
        shares: &[],
        rate: None,
    };
    type Input = Rows;
    type Output = Rows;

    fn workers(stages: &Stages) -> usize {
        stages.attachments.as_ref().map_or(0, |section| section.concurrency.max(1))
    }

    fn spawn(run: &mut RunContext, rows: Receiver<Rows>, attached: Sender<Rows>) -> Result<()> {
        let (Some(section), Some(client)) = (&run.stages.attachments, &run.client) else { return Ok(()) };
        let concurrency = Self::workers(&run.stages);
        let any = section.origins.iter().any(|origin| origin == "any");
        let origins = section.origins.iter().filter_map(|origin| Some(Url::parse(origin).ok()?.origin())).collect();
        let settings = Arc::new(AttachSettings {
            inline_up_to: section.inline_up_to.0,
            max_size: section.max_size.0,
            types: section.types.clone(),
            content_types: section.content_types.iter().map(|text| text.to_ascii_lowercase()).collect(),
            origins: (!any).then_some(origins),
            chunk_bytes: run.stages.download.chunk.bytes(),
        });
        if let Some(folder) = run.tables.local() {
            private_dir(&folder.join(ATTACHMENTS_FOLDER))?;
        }
        let places = Arc::new(Semaphore::new(concurrency));
        let (store, failures, said) = (run.tables.store()?, Arc::default(), Arc::default());
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
                counters: run.counters.clone(),
                stop: run.tasks.stop().clone(),
            };
            run.tasks.spawn("attach", async move { worker.run().await }.in_current_span());
        }
        Ok(())
    }
}

impl Section for AttachmentsSection {
    fn check(&self, memory: u64, found: &mut Findings) {
        let hint = "lower it (larger attachments become files), or raise memory";
        found.add_if(self.inline_up_to.0 > memory / 64, "inline_up_to", "more than a 64th of memory", Some(hint));
        for (index, origin) in self.origins.iter().enumerate().filter(|(_, origin)| *origin != "any") {
            let what = "neither `any` nor an origin such as https://files.example.org";
            found.add_if(!is_origin(origin), &format!("origins.{index}"), what, None);
        }
    }
}
