//! Changes of a table itself that its pipeline asks for: never unasked, each a commit of its own that the history tells
//! of.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use arrow::datatypes::{DataType, Field as ArrowField, Fields, Schema};
use deltalake::kernel::{Action, MetadataExt};
use deltalake::protocol::DeltaOperation;
use serde_json::Value;

use crate::commit::{self, Attempt};
use crate::table::{Table, delta_schema, storage};
use foundation::error::{Context, Error, ErrorKind, Result};

impl Table {
    /// A commit that names no file; whether it was made. The snapshot is the newest afterwards.
    pub(crate) async fn change(
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
    pub(crate) async fn turn_on_deletion_vectors(&mut self, info: &BTreeMap<String, Value>) -> Result<()> {
        for _ in 0..crate::commit::upsert::MAX_ATTEMPTS {
            let Some((protocol, metadata)) = self.with_deletion_vectors()? else { return Ok(()) };
            let properties = HashMap::from([("delta.enableDeletionVectors".to_owned(), "true".to_owned())]);
            let actions = vec![Action::Protocol(protocol), Action::Metadata(metadata)];
            let operation = DeltaOperation::SetTableProperties { properties };
            if self.change(actions, info, operation).await? {
                tracing::info!(resource_type = %self.resource_type, "deletion vectors are enabled");
            }
        }
        Err(too_often())
    }

    /// Adds the columns of `ours` that the table lacks.
    pub(crate) async fn add_columns(&mut self, ours: &Schema, info: &BTreeMap<String, Value>) -> Result<()> {
        for _ in 0..crate::commit::upsert::MAX_ATTEMPTS {
            let (Some(now), Some(delta)) = (self.schema()?, &self.delta) else { return Ok(()) };
            let Some(widened) = widen(&now, ours) else { return Ok(()) };
            let snapshot = delta.snapshot().map_err(|error| storage(error, "no snapshot"))?;
            let widened = delta_schema(&widened)?;
            // Top-level columns and those that added columns to, as Spark's own history has them.
            let before = snapshot.schema();
            let fields = widened.fields().filter(|field| before.field(field.name()) != Some(*field)).cloned().collect();
            let metadata = snapshot
                .metadata()
                .clone()
                .with_schema(&widened)
                .context(ErrorKind::Table, "columns cannot be added")?;
            let operation = DeltaOperation::AddColumn { fields };
            if self.change(vec![Action::Metadata(metadata)], info, operation).await? {
                tracing::info!(resource_type = %self.resource_type, "added columns");
            }
        }
        Err(too_often())
    }
}

fn too_often() -> Error {
    Error::new(ErrorKind::Table, "other writers committed first in each attempt")
}

/// `table` with the columns of `ours` that it lacks behind its own, on every level; `None` where it lacks none. The
/// values of a map stay as they are: readers do not widen them.
pub fn widen(table: &Schema, ours: &Schema) -> Option<Schema> {
    let widened = Schema::new(widen_fields(table.fields(), ours.fields()));
    (widened.fields() != table.fields()).then_some(widened)
}

fn widen_fields(table: &Fields, ours: &Fields) -> Fields {
    let both = |field: &Arc<ArrowField>| {
        let our = ours.iter().find(|our| our.name() == field.name());
        our.map_or_else(|| field.clone(), |our| widen_field(field, our))
    };
    let lacking = ours.iter().filter(|our| !table.iter().any(|field| field.name() == our.name()));
    table.iter().map(both).chain(lacking.cloned()).collect()
}

fn widen_field(table: &Arc<ArrowField>, ours: &Arc<ArrowField>) -> Arc<ArrowField> {
    let data_type = match (table.data_type(), ours.data_type()) {
        (DataType::Struct(table), DataType::Struct(ours)) => DataType::Struct(widen_fields(table, ours)),
        (DataType::List(table), DataType::List(ours)) => DataType::List(widen_field(table, ours)),
        (other, _) => other.clone(),
    };
    Arc::new(table.as_ref().clone().with_data_type(data_type))
}

/// Returns true if columns that both have are of the same types.
pub fn same_types(table: &Fields, ours: &Fields) -> bool {
    fn same(table: &DataType, ours: &DataType) -> bool {
        match (table, ours) {
            (DataType::Struct(table), DataType::Struct(ours)) => same_types(table, ours),
            (DataType::List(table), DataType::List(ours)) => same(table.data_type(), ours.data_type()),
            (DataType::Map(_, _), DataType::Map(_, _)) => true,
            (table, ours) => same_type(table, ours),
        }
    }
    ours.iter().all(|our| table.find(our.name()).is_none_or(|(_, table)| same(table.data_type(), our.data_type())))
}

fn same_type(ours: &DataType, theirs: &DataType) -> bool {
    match (ours, theirs) {
        (DataType::Utf8, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View) => true,
        (DataType::Binary, DataType::Binary | DataType::LargeBinary | DataType::BinaryView) => true,
        (DataType::Timestamp(_, Some(_)), DataType::Timestamp(_, Some(_))) => true,
        (ours, theirs) => ours == theirs,
    }
}
