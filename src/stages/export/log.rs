//! Events of an export in the log that Bulk Data clients share.

use serde_json::json;

use super::ServerExport;
use crate::error::Result;
use crate::jobs::Kickoff;
use crate::messages::instant_text;
use bulk_data_client::{KickOffResponse, Manifest, PollStatus, shown};

impl ServerExport {
    pub(super) fn log_kick_off(&self, export: usize, kickoff: &Kickoff, answer: &Result<KickOffResponse>) {
        let request = &kickoff.request;
        let (code, body) = match answer {
            Ok(KickOffResponse::Accepted { .. }) => (None, None),
            Ok(KickOffResponse::Later { why, .. }) => (Some(429), Some(why.clone())),
            Err(error) => (error.status(), Some(error.to_string())),
        };
        self.log.note(export, "kickoff", || {
            json!({
                "exportUrl": request.url(self.client.base()).map(|url| shown(&url)).unwrap_or_default(),
                "softwareName": "fhirlake",
                "softwareVersion": env!("CARGO_PKG_VERSION"),
                "fhirVersion": "4.0.1",
                "requestParameters": request.logged().unwrap_or_default(),
                "errorCode": code,
                "errorBody": body,
                "responseHeaders": {},
            })
        });
    }

    pub(super) fn log_poll(&self, export: usize, answer: &PollStatus) {
        match answer {
            PollStatus::InProgress { progress, wait, .. } => self.log.note(
                export,
                "status_progress",
                || json!({ "body": null, "xProgress": progress, "retryAfter": wait.map(|wait| wait.as_secs()) }),
            ),
            PollStatus::Transient { error, .. } | PollStatus::NotFound { error, .. } | PollStatus::Failed(error) => {
                self.log.note(export, "status_error", || {
                    json!({ "body": null, "code": error.status(), "message": error.to_string(),
                        "responseHeaders": {} })
                });
            }
            PollStatus::Done(_) => {}
        }
    }

    pub(super) fn log_page(&self, export: usize, manifest: &Manifest) {
        self.log.note(export, "status_page_complete", || {
            json!({
                "transactionTime": instant_text(manifest.transaction_time),
                "outputFileCount": manifest.output.len(),
                "deletedFileCount": manifest.deleted.len(),
                "errorFileCount": manifest.outcomes.len(),
            })
        });
    }

    pub(super) fn log_end(&self, export: usize, transaction_time: Option<i64>) {
        self.log.note(export, "status_complete", || json!({ "transactionTime": transaction_time.map(instant_text) }));
    }
}
