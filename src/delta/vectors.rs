//! Deletion vectors: read those of the snapshot, write those of a commit into one file.

use std::sync::Arc;

use bytes::Bytes;
use delta_kernel::actions::deletion_vector::DeletionVectorDescriptor as KernelDescriptor;
use delta_kernel::actions::deletion_vector_writer::{DeletionVector, StreamingDeletionVectorWriter};
use deltalake::kernel::{DeletionVectorDescriptor, StorageType};
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutPayload};
use roaring::RoaringTreemap;
use uuid::Uuid;

use super::new_file::sync_file;
use super::table::{Table, storage};
use crate::error::{Context, ErrorKind, Result};
use buoyant_kernel as delta_kernel;

/// A set of rows as the kernel's writer takes it.
struct Rows(RoaringTreemap);

impl DeletionVector for Rows {
    type IndexIterator = roaring::treemap::IntoIter;
    fn into_iter(self) -> Self::IndexIterator {
        self.0.into_iter()
    }
    fn cardinality(&self) -> u64 {
        self.0.len()
    }
}

/// The rows that `descriptor` marks, for a table of any storage kind.
pub(super) fn read(table: &Table, descriptor: &DeletionVectorDescriptor) -> Result<RoaringTreemap> {
    let failed = |error: delta_kernel::Error| storage(error, "a deletion vector cannot be read");
    let descriptor = KernelDescriptor::try_from(descriptor.clone()).map_err(failed)?;
    let engine = table.log_store.engine(None);
    descriptor.read(engine.storage_handler(), table.log_store.root_url()).map_err(failed)
}

/// The id of the file that an attempt of a run writes for a table: made from them, so that a later run finds what a
/// killed one left. The file's name has no room for the run itself.
pub(super) fn file_id(run: &str, resource_type: &str, attempt: usize) -> Uuid {
    let seed = format!("{run}|{resource_type}|{attempt}");
    uuid::Builder::from_random_bytes(twox_hash::XxHash3_128::oneshot(seed.as_bytes()).to_be_bytes()).into_uuid()
}

/// Where the file of that id is, in the table's folder.
pub(super) fn file_path(id: Uuid) -> Path {
    Path::from(format!("deletion_vector_{id}.bin"))
}

/// How a descriptor names it.
pub(super) fn encoded(id: Uuid) -> String {
    z85::encode(id.as_bytes())
}

/// Writes `vectors` into one file in the table's folder; a descriptor for each, in order, and the file's path.
pub(super) async fn write(
    table: &Table,
    vectors: Vec<RoaringTreemap>,
    id: Uuid,
) -> Result<(Vec<DeletionVectorDescriptor>, Path)> {
    let path = file_path(id);
    let mut bytes = Vec::new();
    let mut writer = StreamingDeletionVectorWriter::new(&mut bytes);
    let mut descriptors = Vec::with_capacity(vectors.len());
    for vector in vectors {
        let cardinality = vector.len() as i64;
        let written =
            writer.write_deletion_vector(Rows(vector)).context(ErrorKind::Internal, "a deletion vector cannot be written")?;
        descriptors.push(DeletionVectorDescriptor {
            storage_type: StorageType::UuidRelativePath,
            path_or_inline_dv: encoded(id),
            offset: Some(written.offset),
            size_in_bytes: written.size_in_bytes,
            cardinality,
        });
    }
    writer.finalize().context(ErrorKind::Internal, "a deletion vector cannot be written")?;
    let store: Arc<dyn object_store::ObjectStore> = table.store();
    let failed = |error: &dyn std::fmt::Display| storage(error, &format!("{path} cannot be written"));
    store.put(&path, PutPayload::from_bytes(Bytes::from(bytes))).await.map_err(|error| failed(&error))?;
    if let Some(folder) = table.local() {
        sync_file(folder.join(path.as_ref())).await.map_err(|error| failed(&error))?;
    }
    Ok((descriptors, path))
}
