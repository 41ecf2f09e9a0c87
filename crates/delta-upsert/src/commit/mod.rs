//! One attempt to commit to a table that exists.

pub(crate) mod add_actions;
pub(crate) mod deletion_vectors;
pub(crate) mod upsert;

use std::collections::BTreeMap;

use deltalake::DeltaTableError;
use deltalake::kernel::transaction::{CommitBuilder, CommitProperties, TransactionError};
use deltalake::kernel::{Action, Transaction};
use deltalake::protocol::DeltaOperation;
use serde_json::Value;
use tokio_stream::StreamExt;

use crate::table::{Table, storage};
use foundation::error::{Error, ErrorKind, Result};
use foundation::fault_points::reached;

/// Its outcome.
pub(crate) enum Attempt {
    /// It is this version.
    Done(Option<u64>),
    /// Another writer was faster; the table's snapshot is the newest again.
    Conflict,
    /// It failed, and whether it was made could not be found out: its files must stay.
    Unknown(Error),
}

/// Returns the settings of every commit.
pub(crate) fn properties(info: &BTreeMap<String, Value>, transactions: Vec<Transaction>) -> CommitProperties {
    CommitProperties::default()
        .with_metadata(info.clone())
        // What was decided holds for the snapshot that it was decided on only.
        .with_max_retries(0)
        // Made apart, after the commit: their failure must not look like the commit's.
        .with_create_checkpoint(false)
        .with_cleanup_expired_logs(Some(false))
        .with_application_transactions(transactions)
}

/// Returns true if an error says that another writer was faster.
fn is_conflict(error: &DeltaTableError) -> bool {
    matches!(
        error,
        DeltaTableError::VersionAlreadyExists(_)
            | DeltaTableError::Transaction {
                source: TransactionError::CommitConflict(_) | TransactionError::MaxCommitAttempts(_),
            }
    )
}

impl Table {
    /// The version that `run` committed after `before`, found in the log.
    async fn find_commit_of(&mut self, run: &str, before: Option<u64>) -> Result<Option<u64>> {
        self.refresh().await?;
        let Some(delta) = &self.delta else { return Ok(None) };
        let newest = self.version().unwrap_or(0);
        let newer = newest - before.map_or(0, |version| version.min(newest)) + u64::from(before.is_none());
        let mut history = delta.history(Some(usize::try_from(newer).unwrap_or(usize::MAX)));
        let mut version = newest;
        while let Some(info) = history.try_next().await.map_err(|error| storage(error, "the log cannot be read"))? {
            if info.info.get("run").and_then(Value::as_str) == Some(run) {
                return Ok(Some(version));
            }
            version = version.saturating_sub(1);
        }
        Ok(None)
    }
}

/// Classifies an error of a commit upon version `before`. A store that retries may call a commit of our own another's,
/// and what fails may come after the commit: only the log knows.
pub(crate) async fn after_error(
    table: &mut Table,
    info: &BTreeMap<String, Value>,
    before: Option<u64>,
    error: DeltaTableError,
) -> Result<Attempt> {
    let run = info.get("run").and_then(Value::as_str).unwrap_or_default().to_owned();
    match table.find_commit_of(&run, before).await {
        Ok(Some(version)) => {
            tracing::warn!(%error, version, "the commit succeeded, and a step after it failed");
            Ok(Attempt::Done(Some(version)))
        }
        // Two that create the same table: the loser resumes the winner's.
        Ok(None) if is_conflict(&error) || (before.is_none() && table.version().is_some()) => Ok(Attempt::Conflict),
        Ok(None) => Err(storage(error, "the commit failed")),
        Err(_) => Ok(Attempt::Unknown(storage(error, "the commit failed"))),
    }
}

/// Members of every commit's info: whose it is.
pub fn commit_info(pipeline: &str, run: &str) -> BTreeMap<String, Value> {
    BTreeMap::from([
        ("pipeline".to_owned(), pipeline.into()),
        ("run".to_owned(), run.into()),
        ("clientVersion".to_owned(), concat!("fhirlake.", env!("CARGO_PKG_VERSION")).into()),
    ])
}

/// Commits `actions` as the version after the table's snapshot, and writes a checkpoint where one is due.
pub(crate) async fn attempt(
    table: &mut Table,
    actions: Vec<Action>,
    info: &BTreeMap<String, Value>,
    transactions: Vec<Transaction>,
    operation: DeltaOperation,
) -> Result<Attempt> {
    (table.guard)()?;
    let before = table.version();
    let Some(delta) = &table.delta else { return Err(Error::new(ErrorKind::Internal, "a commit to no table")) };
    let snapshot = delta.snapshot().map_err(|error| storage(error, "no snapshot"))?;
    reached("before a commit");
    let committed = CommitBuilder::from(properties(info, transactions))
        .with_actions(actions)
        .build(Some(snapshot), table.log_store.clone(), operation)
        .await;
    match committed {
        Ok(commit) => {
            reached("a commit is made");
            let version = Some(commit.version());
            table.checkpoint(version).await;
            Ok(Attempt::Done(version))
        }
        Err(error) => after_error(table, info, before, error).await,
    }
}
