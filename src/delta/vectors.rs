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

/// Writes `vectors` into one file in the table's folder; a descriptor for each, in order, and the file's path.
pub(super) async fn write(table: &Table, vectors: Vec<RoaringTreemap>) -> Result<(Vec<DeletionVectorDescriptor>, Path)> {
    let id = Uuid::new_v4();
    let path = Path::from(format!("deletion_vector_{id}.bin"));
    let mut bytes = Vec::new();
    let mut writer = StreamingDeletionVectorWriter::new(&mut bytes);
    let mut descriptors = Vec::with_capacity(vectors.len());
    for vector in vectors {
        let cardinality = vector.len() as i64;
        let written =
            writer.write_deletion_vector(Rows(vector)).context(ErrorKind::Internal, "a deletion vector cannot be written")?;
        descriptors.push(DeletionVectorDescriptor {
            storage_type: StorageType::UuidRelativePath,
            path_or_inline_dv: z85::encode(id.as_bytes()),
            offset: Some(written.offset),
            size_in_bytes: written.size_in_bytes,
            cardinality,
        });
    }
    writer.finalize().context(ErrorKind::Internal, "a deletion vector cannot be written")?;
    let store: Arc<dyn object_store::ObjectStore> = table.store();
    store
        .put(&path, PutPayload::from_bytes(Bytes::from(bytes)))
        .await
        .map_err(|error| storage(error, &format!("{path} cannot be written")))?;
    Ok((descriptors, path))
}
