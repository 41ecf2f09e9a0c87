//! The source, as a FHIR server: kick-off, polls, manifests.

pub mod folder;
mod invalid_entries;
mod log;
mod pages;
mod polling;
mod type_bisection;

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use url::Url;

use self::pages::Passed;
use self::polling::{Next, Polls, Retry};
use self::type_bisection::{Asking, TypeBisection, may_be_for_a_type};
use crate::error::{Error, ErrorKind, Result};
use crate::export_log::ExportLog;
use crate::jobs::{ExportEvent, ExportEventSink, ExportHandle, Kickoff};
use crate::messages::{ControlEvent, ExportEnd, ExportFile, MergeInput, ResourceType, watermark_of};
use crate::stages::StageSpec;
use crate::telemetry;
use bulk_data_client::{Client, KickOffResponse, Links};
use flow::{Cancellation, Counters, Sender};
use foundation::fault_points::reached;

pub use self::pages::FIRST_INDEX;

/// Declaration of the source.
pub const EXPORT: &StageSpec = &StageSpec {
    name: "export",
    summary: &["kick-off, polls,", "manifest"],
    input: None,
    shares: &[],
    rate: Some((telemetry::FILES_EXPECTED, "files")),
};

/// Exports from a server.
pub struct ServerExport {
    /// The server.
    pub client: Client,
    /// Kick-offs, made one after the other: many servers have one slot.
    pub kickoffs: Vec<Kickoff>,
    /// Types that the server refused one by one not long ago: refused together, they are not asked for apart.
    pub rejected_lately: HashSet<String>,
    /// Time for which a server may work.
    pub timeout: Option<Duration>,
    /// Newest `transactionTime` that a watermark may have: what changed after `_until` was not asked for.
    pub until: Option<i64>,
    /// Index of the first file that no earlier run has listed.
    pub first_index: u32,
    /// Destination of files.
    pub files: Sender<Arc<ExportFile>>,
    /// Destination of control events.
    pub merge: Sender<MergeInput>,
    /// Hears of status URLs.
    pub remember: ExportEventSink,
    /// Shows the server's words on its progress.
    pub heard: Arc<dyn Fn(&str) + Send + Sync>,
    /// Source of new links of files, should they end.
    pub links: Links,
    /// The log that Bulk Data clients share.
    pub log: ExportLog,
    /// Counters.
    pub counters: Counters,
    /// The run's cancellation.
    pub stop: Cancellation,
}

/// Why an export ended early.
enum Ended {
    Failed(Error),
    /// The server refused the kick-off, and may have done so for one of its types.
    Refused(Error),
    /// The server knows no such export.
    Gone(Error),
    /// Nobody listens any more.
    Unheard,
}

impl From<Error> for Ended {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

impl ServerExport {
    /// Makes each kick-off, or resumes what was asked for before, and sends its files on. Types of which some are
    /// refused are bisected: a type that the server does not give away must not hold back its neighbours.
    pub async fn run(self) -> Result<()> {
        let mut index = self.first_index.max(FIRST_INDEX);
        let mut bisection = TypeBisection::of(&self.kickoffs, self.rejected_lately.clone());
        while let Some(asking) = bisection.next() {
            let span = tracing::info_span!("export", export = asking.export);
            let ended = tracing::Instrument::instrument(self.export(&asking, &mut index, &mut bisection), span).await;
            let heard = match ended {
                Ok(()) => Ok(()),
                Err(Ended::Refused(error)) => self.refused(asking, error, &mut bisection).await,
                // One failed export does not hold the others back; one alone is the run's end.
                Err(Ended::Failed(error) | Ended::Gone(error)) if self.is_its_own_only(&error, &bisection) => {
                    bisection.failed();
                    let mut failed = vec![(asking.export, asking.kickoff)];
                    // A server that wants to be left alone is.
                    if error.kind() == ErrorKind::Throttled {
                        failed.extend(bisection.rest());
                    }
                    self.exports_failed(failed, &error).await
                }
                Err(Ended::Failed(error) | Ended::Gone(error)) => return Err(error),
                unheard => unheard,
            };
            if heard.is_err() {
                return Ok(());
            }
            let reject = bisection.reject();
            if !reject.is_empty() {
                (self.remember)(&ExportEvent::TypesRejected(&reject))?;
            }
        }
        if let Some(types) = bisection.in_vain() {
            (self.remember)(&ExportEvent::AllRejected(&types))?;
        }
        for (export, kickoff, error) in bisection.end(self.kickoffs.len())? {
            if self.exports_failed(vec![(export, kickoff)], &error).await.is_err() {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Returns true if the failure of an export is no failure of the run.
    fn is_its_own_only(&self, error: &Error, bisection: &TypeBisection) -> bool {
        match error.kind() {
            ErrorKind::Server | ErrorKind::Auth => !bisection.is_one(),
            ErrorKind::Throttled => !bisection.is_one() && bisection.holds(),
            _ => false,
        }
    }

    async fn refused(&self, asking: Asking, error: Error, bisection: &mut TypeBisection) -> Result<(), Ended> {
        let (export, types, words) = (asking.export, asking.kickoff.requested.len(), error.to_string());
        let parts = bisection.refused(asking, error);
        if parts == 0 {
            return Ok(());
        }
        tracing::info!(types, parts, error = words, "the server rejected the kick-off; bisecting its types");
        self.tell(ControlEvent::ExportBisected { export, parts }).await?;
        // A server that has just refused is not asked again at once.
        if self.stop.or(tokio::time::sleep(self.client.settings().min_pause)).await.is_none() {
            return Err(Error::new(ErrorKind::Interrupted, "stopped between two kick-offs").into());
        }
        Ok(())
    }

    async fn exports_failed(&self, failed: Vec<(usize, Kickoff)>, error: &Error) -> Result<(), Ended> {
        for (export, kickoff) in failed {
            tracing::error!(types = %kickoff.requested.join(", "), %error, "the export failed; its types are left as \
                they were");
            self.tell(ControlEvent::ExportFailed { export, requested: kickoff.requested, why: error.to_string() })
                .await?;
        }
        Ok(())
    }

    async fn export(&self, asking: &Asking, index: &mut u32, bisection: &mut TypeBisection) -> Result<(), Ended> {
        let (export, kickoff) = (asking.export, &asking.kickoff);
        if let Some(accepted) = &kickoff.in_flight {
            tracing::info!("resuming the export of an earlier run");
            bisection.resumes();
            match self.follow(export, kickoff, accepted, index).await {
                Err(Ended::Gone(error)) => {
                    bisection.is_gone();
                    tracing::warn!(%error, "the export expired on the server; starting a new one");
                    (self.remember)(&ExportEvent::Expired { status: &accepted.status })?;
                }
                ended => return ended,
            }
        }
        // Before the server hears of it: should its answer be lost, that much is known.
        (self.remember)(&ExportEvent::Requested)?;
        reached("before the kick-off");
        let lost = AtomicBool::new(false);
        let answer = self.client.kick_off(&kickoff.request, &lost).await;
        reached("the kick-off is answered");
        let lost = lost.into_inner();
        if !lost && !matches!(answer, Ok(KickOffResponse::Accepted { .. })) {
            (self.remember)(&ExportEvent::NotAccepted)?;
        }
        self.log_kick_off(export, kickoff, &answer);
        let accepted = match answer
            .map_err(|error| if may_be_for_a_type(&error) { Ended::Refused(error) } else { error.into() })?
        {
            KickOffResponse::Accepted { status, separate } => ExportHandle::new(status, separate),
            KickOffResponse::Later { wait, why } => {
                (self.remember)(&ExportEvent::Throttled { wait, why: &why })?;
                let asks = match wait {
                    Some(wait) => format!("next try in {} s", wait.as_secs()),
                    None => "it names no time: next try in an hour".to_owned(),
                };
                let lost =
                    if lost { ". The answer to an earlier try was lost, so it may be working on that one" } else { "" };
                return Err(Error::new(ErrorKind::Throttled, format!("{why}; {asks}{lost}")).into());
            }
        };
        (self.remember)(&ExportEvent::Accepted { kickoff, status: &accepted.status, separate: accepted.separate })?;
        bisection.accepted();
        tracing::info!(
            types = if kickoff.requested.is_empty() { "all".to_owned() } else { kickoff.requested.len().to_string() },
            incremental = kickoff.request.since.is_some(),
            "the server accepted the export"
        );
        self.follow(export, kickoff, &accepted, index).await.inspect_err(|ended| {
            if let Ended::Gone(_) = ended {
                let lost = (self.remember)(&ExportEvent::Expired { status: &accepted.status });
                lost.unwrap_or_else(|error| tracing::warn!(%error, "the expired export could not be persisted"));
            }
        })
    }

    /// Polls until the export is done, page by page of its manifest, and sends files on as soon as they are final.
    async fn follow(
        &self,
        export: usize,
        kickoff: &Kickoff,
        accepted: &ExportHandle,
        index: &mut u32,
    ) -> Result<(), Ended> {
        let mut pages = vec![accepted.status.clone()];
        let began = tokio::time::Instant::now();
        let mut passed =
            Passed { time: None, files: 0, known: HashSet::new(), unusable: HashSet::new(), merged: Vec::new() };
        loop {
            let page = pages.len() - 1;
            let next =
                self.page(export, kickoff, accepted, (&pages[page].clone(), page, began), &mut passed, index).await?;
            match next {
                None => break,
                Some(next) if pages.contains(&next) => {
                    return Err(Error::new(ErrorKind::Server, "the manifest's `next` links form a loop").into());
                }
                Some(_) if pages.len() >= MAX_PAGES => {
                    return Err(
                        Error::new(ErrorKind::Server, format!("the manifest has more than {MAX_PAGES} pages")).into()
                    );
                }
                Some(next) => pages.push(next),
            }
        }
        if passed.files == 0 && kickoff.request.since.is_none() {
            self.counters.add(telemetry::DEVIATIONS, &"an export of everything is empty".into(), 1);
            tracing::warn!(
                types = %kickoff.requested.join(", "),
                "the full export is empty: check that the group and the types exist"
            );
        }
        let time = passed.time.map(|time| watermark_of(time, self.until));
        let left =
            |names: &[ResourceType]| names.iter().filter(|name| !passed.merged.contains(name)).cloned().collect();
        self.log_end(export, passed.time);
        let end = ExportEnd {
            export,
            requested: left(&kickoff.requested),
            all_types: kickoff.requested.is_empty(),
            known: left(&kickoff.known),
            transaction_time: time,
            full: kickoff.request.since.is_none(),
            merged: passed.merged.clone(),
        };
        self.tell(ControlEvent::ExportEnd(end)).await
    }

    async fn tell(&self, fact: ControlEvent) -> Result<(), Ended> {
        self.merge.send(MergeInput::ControlEvent(fact)).await.map_err(|_| Ended::Unheard)
    }

    /// Polls one page until it is final or has a next one; that one.
    async fn page(
        &self,
        export: usize,
        kickoff: &Kickoff,
        accepted: &ExportHandle,
        (url, page, began): (&Url, usize, tokio::time::Instant),
        passed: &mut Passed,
        index: &mut u32,
    ) -> Result<Option<Url>, Ended> {
        let takes_partial = kickoff.request.options.allow_partial_manifests;
        let mut polls = Polls::new(self.client.settings(), takes_partial, page == 0);
        loop {
            let answer = match self.client.poll(url, accepted.separate).await {
                // It will hardly be another the next time; if it is not, another export is started.
                Err(error) if error.kind() == ErrorKind::Server => {
                    (self.remember)(&ExportEvent::Unusable { status: &accepted.status })?;
                    return Err(error
                        .with_hint(
                            "run again: after three such responses a new export is started; \
                        `fhirlake jobs cancel` cancels this one now",
                        )
                        .into());
                }
                answer => answer?,
            };
            self.log_poll(export, &answer);
            let pause = match polls.on(answer, std::time::Instant::now()) {
                Next::Done(manifest) => {
                    self.pass_on(export, accepted, (url, page), &manifest, passed, index).await?;
                    return Ok(manifest.next);
                }
                Next::Partial(manifest, pause) => {
                    (self.heard)("the first files are there");
                    self.pass_on(export, accepted, (url, page), &manifest, passed, index).await?;
                    if manifest.next.is_some() {
                        return Ok(manifest.next);
                    }
                    pause
                }
                Next::Working { progress, is_unrequested, pause } => {
                    if is_unrequested {
                        tracing::warn!(
                            "the server lists files before the export is complete; set source.allow_partial_manifests \
                                to download them early"
                        );
                        self.counters.add(
                            telemetry::DEVIATIONS,
                            &"a partial manifest that was not asked for".into(),
                            1,
                        );
                    }
                    let words = progress.as_deref().unwrap_or("in progress");
                    tracing::debug!(progress = words, "the server is exporting");
                    (self.heard)(words);
                    pause
                }
                Next::Retry(error, why, pause) => {
                    match why {
                        Retry::Transient => tracing::warn!(%error, "the poll failed; retrying"),
                        Retry::SaidFailed => {
                            tracing::warn!(%error, "the server says that the export failed; polling again")
                        }
                        Retry::NotFound => tracing::warn!(%error, "the server does not find the export; polling again"),
                    }
                    if why == Retry::Transient {
                        self.counters.add(telemetry::RETRIES, &telemetry::NO_TYPE.into(), 1);
                    }
                    pause
                }
                Next::Fail { error, is_of_server } => {
                    if is_of_server {
                        (self.remember)(&ExportEvent::Unusable { status: &accepted.status })?;
                    }
                    return Err(error.into());
                }
                Next::Failed(error) => return Err(self.given_up(kickoff, accepted, error).await?.into()),
                Next::Gone(error) => return Err(Ended::Gone(error)),
            };
            if let Some(timeout) = self.timeout
                && began.elapsed() + pause > timeout
            {
                let why = format!("the export did not complete within source.timeout ({} s)", timeout.as_secs());
                let error = Error::new(ErrorKind::Server, why);
                return Err(error
                    .with_hint("run again: the next run resumes this export; or raise source.timeout")
                    .into());
            }
            if self.stop.or(tokio::time::sleep(pause)).await.is_none() {
                return Err(Error::new(ErrorKind::Interrupted, "stopped while the server was exporting").into());
            }
        }
    }

    /// The server gave the export up: it will not be another the next time, so the next run starts a new one.
    async fn given_up(&self, kickoff: &Kickoff, accepted: &ExportHandle, error: Error) -> Result<Error> {
        if let Err(error) = self.client.delete_export(&accepted.status).await {
            tracing::warn!(%error, "the failed export job could not be deleted on the server");
        }
        (self.remember)(&ExportEvent::Expired { status: &accepted.status })?;
        // It would fail for the same reason each time.
        let hint = match names_a_filter(&error, &kickoff.request.options.type_filters) {
            true => "the server's words name a search parameter: correct or remove that query of source.type_filters",
            false => "the server gave the export up; run again: a new export is started",
        };
        Ok(error.with_hint(hint))
    }
}

/// Returns true if the server's words on an export that failed name a parameter of one of its `_typeFilter` queries.
fn names_a_filter(error: &Error, filters: &[String]) -> bool {
    let words = error.to_string();
    let parameters = filters.iter().filter_map(|filter| filter.split_once('?')).flat_map(|(_, query)| query.split('&'));
    let mut names = parameters.filter_map(|parameter| parameter.split(['=', ':', '.']).next());
    names.any(|name| !name.is_empty() && words.contains(name))
}

/// Pages of a manifest; each may have any number of files.
const MAX_PAGES: usize = 10_000;
