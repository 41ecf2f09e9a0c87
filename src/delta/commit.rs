//! One attempt to commit to a table that exists.

use std::collections::BTreeMap;

use deltalake::DeltaTableError;
use deltalake::kernel::transaction::{CommitBuilder, CommitProperties, TransactionError};
use deltalake::kernel::{Action, Transaction};
use deltalake::protocol::DeltaOperation;
use futures::TryStreamExt;
use serde_json::Value;

use super::table::{Table, storage};
use crate::error::{Error, ErrorKind, Result};

/// What became of it.
pub(super) enum Attempt {
    /// It is this version.
    Done(Option<u64>),
    /// Another writer was faster.
    Conflict,
}

/// How every commit of ours is made.
pub(super) fn properties(info: &BTreeMap<String, Value>, transactions: Vec<Transaction>) -> CommitProperties {
    CommitProperties::default()
        .with_metadata(info.clone())
        // What was decided holds for the snapshot that it was decided on only.
        .with_max_retries(0)
        // Made apart, after the commit: their failure must not look like the commit's.
        .with_create_checkpoint(false)
        .with_cleanup_expired_logs(Some(false))
        .with_application_transactions(transactions)
}

/// Whether an error says that another writer was faster.
pub(super) fn is_conflict(error: &DeltaTableError) -> bool {
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
    pub(super) async fn find_commit_of(&mut self, run: &str, before: Option<u64>) -> Result<Option<u64>> {
        self.refresh().await?;
        let Some(delta) = &self.delta else { return Ok(None) };
        let newest = self.version().unwrap_or(0);
        let newer = newest - before.map_or(0, |version| version.min(newest)) + u64::from(before.is_none());
        let mut history = delta.history(Some(usize::try_from(newer).unwrap_or(usize::MAX)));
        let mut version = newest;
        while let Some(info) = history.try_next().await.map_err(|error| storage(error, "the log cannot be read"))? {
            let merges = info.operation.as_deref().is_none_or(|operation| !NO_ROWS.contains(&operation));
            if merges && info.info.get("run").and_then(Value::as_str) == Some(run) {
                return Ok(Some(version));
            }
            version = version.saturating_sub(1);
        }
        Ok(None)
    }
}

/// Operations that a run commits besides its rows.
const NO_ROWS: [&str; 2] = ["SET TBLPROPERTIES", "ADD COLUMN"];

/// Commits `actions` as the version after the table's snapshot, and writes a checkpoint where one is due.
pub(super) async fn attempt(
    table: &mut Table,
    actions: Vec<Action>,
    info: &BTreeMap<String, Value>,
    transactions: Vec<Transaction>,
    operation: DeltaOperation,
) -> Result<Attempt> {
    let Some(delta) = &table.delta else { return Err(Error::new(ErrorKind::Internal, "a commit to no table")) };
    let snapshot = delta.snapshot().map_err(|error| storage(error, "no snapshot"))?;
    let committed = CommitBuilder::from(properties(info, transactions))
        .with_actions(actions)
        .build(Some(snapshot), table.log_store.clone(), operation)
        .await;
    match committed {
        Ok(commit) => {
            let version = Some(commit.version());
            table.checkpoint(version).await;
            Ok(Attempt::Done(version))
        }
        Err(error) if is_conflict(&error) => Ok(Attempt::Conflict),
        Err(error) => Err(storage(error, "the commit failed")),
    }
}
