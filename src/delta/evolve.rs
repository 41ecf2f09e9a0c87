//! Changes of a table itself that its pipeline asks for: never unasked, each a commit of its own that the history tells of.

use std::collections::{BTreeMap, HashMap};

use arrow::datatypes::Schema;
use deltalake::kernel::{Action, MetadataExt};
use deltalake::protocol::DeltaOperation;
use serde_json::Value;

use super::commit::{self, Attempt};
use super::table::{Table, delta_schema, storage};
use crate::error::{Context, Error, ErrorKind, Result};
use crate::schema::widen;

impl Table {
    /// A commit that names no file; whether it was made. The snapshot is the newest afterwards.
    pub(super) async fn change(
        &mut self,
        actions: Vec<Action>,
        info: &BTreeMap<String, Value>,
        operation: DeltaOperation,
    ) -> Result<bool> {
        match commit::attempt(self, actions, info, Vec::new(), operation).await? {
            Attempt::Done(_) => self.refresh().await.map(|()| true),
            Attempt::Conflict => Ok(false),
            Attempt::Unknown(error) => Err(error),
        }
    }

    /// Turns deletion vectors on where they are off, which raises the table's protocol.
    pub(super) async fn turn_on_deletion_vectors(&mut self, info: &BTreeMap<String, Value>) -> Result<()> {
        for _ in 0..super::upsert::MAX_ATTEMPTS {
            let Some((protocol, metadata)) = self.with_deletion_vectors()? else { return Ok(()) };
            let properties = HashMap::from([("delta.enableDeletionVectors".to_owned(), "true".to_owned())]);
            let actions = vec![Action::Protocol(protocol), Action::Metadata(metadata)];
            let operation = DeltaOperation::SetTableProperties { properties };
            if self.change(actions, info, operation).await? {
                tracing::info!(resource_type = %self.resource_type, "deletion vectors are on from now on");
            }
        }
        Err(too_often())
    }

    /// Adds the columns of `ours` that the table lacks.
    pub(super) async fn add_columns(&mut self, ours: &Schema, info: &BTreeMap<String, Value>) -> Result<()> {
        for _ in 0..super::upsert::MAX_ATTEMPTS {
            let (Some(now), Some(delta)) = (self.schema()?, &self.delta) else { return Ok(()) };
            let Some(widened) = widen(&now, ours) else { return Ok(()) };
            let snapshot = delta.snapshot().map_err(|error| storage(error, "no snapshot"))?;
            let widened = delta_schema(&widened)?;
            // Top-level columns and those that columns were added to, as Spark's own history has them.
            let before = snapshot.schema();
            let fields = widened.fields().filter(|field| before.field(field.name()) != Some(*field)).cloned().collect();
            let metadata =
                snapshot.metadata().clone().with_schema(&widened).context(ErrorKind::Table, "columns cannot be added")?;
            let operation = DeltaOperation::AddColumn { fields };
            if self.change(vec![Action::Metadata(metadata)], info, operation).await? {
                tracing::info!(resource_type = %self.resource_type, "columns were added");
            }
        }
        Err(too_often())
    }
}

fn too_often() -> Error {
    Error::new(ErrorKind::Table, "other writers committed first, again and again")
}
