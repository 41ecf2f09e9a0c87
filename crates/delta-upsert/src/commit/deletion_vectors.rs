//! Deletion vectors: read those of the snapshot, write those of a commit into one file.

use std::sync::Arc;

use bytes::Bytes;
use delta_kernel::actions::deletion_vector::DeletionVectorDescriptor as KernelDescriptor;
use delta_kernel::actions::deletion_vector_writer::{DeletionVector, StreamingDeletionVectorWriter};
use deltalake::kernel::{DeletionVectorDescriptor, StorageType};
use deltalake::logstore::LogStoreRef;
use object_store::path::Path;
use object_store::{ObjectStoreExt, PutPayload};
use roaring::RoaringTreemap;
use uuid::Uuid;

use crate::staging::new_file::sync_file;
use crate::table::{Table, storage};
use buoyant_kernel as delta_kernel;
use foundation::error::{Context, Error, ErrorKind, Result};
use foundation::fault_points::reached;

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
pub(crate) fn read(table: &Table, descriptor: &DeletionVectorDescriptor) -> Result<RoaringTreemap> {
    read_from(&table.log_store, descriptor)
}

/// First bytes of vectors, in the one form that the protocol allows in files ("Deletion Vector Format").
const MAGIC: u32 = 1_681_511_377;

/// The kernel's own reader ends the process where a vector is cut, and does not look at checksums.
fn read_from(log_store: &LogStoreRef, descriptor: &DeletionVectorDescriptor) -> Result<RoaringTreemap> {
    let broken = |why: &str| Error::new(ErrorKind::Table, format!("a deletion vector cannot be read: {why}"));
    let failed = |error: delta_kernel::Error| storage(error, "a deletion vector cannot be read");
    let kernel = KernelDescriptor::try_from(descriptor.clone()).map_err(failed)?;
    let bytes = match kernel.absolute_path(log_store.root_url()).map_err(failed)? {
        None => z85::decode(&descriptor.path_or_inline_dv).map_err(|_| broken("it is not Base85"))?.into(),
        Some(path) => {
            let size = u64::try_from(descriptor.size_in_bytes).map_err(|_| broken("its size is negative"))?;
            let start = u64::try_from(descriptor.offset.unwrap_or(1)).map_err(|_| broken("its place is negative"))?;
            // Length, vector, checksum.
            let range = start..start + 4 + size + 4;
            let mut read =
                log_store.engine(None).storage_handler().read_files(vec![(path, Some(range))]).map_err(failed)?;
            let bytes = read.next().ok_or_else(|| broken("its file is not there"))?.map_err(failed)?;
            let size = usize::try_from(size).map_err(|_| broken("its size"))?;
            let word = |at: usize| bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map(u32::from_be_bytes);
            let (length, checksum) = word(0).zip(word(4 + size)).ok_or_else(|| broken("its file ends within it"))?;
            if length as usize != size {
                return Err(broken(&format!("the log says that it has {size} bytes, its file {length}")));
            }
            let vector = bytes.slice(4..4 + size);
            let mut sum = flate2::Crc::new();
            sum.update(&vector);
            if sum.sum() != checksum {
                return Err(broken("its checksum is wrong"));
            }
            vector
        }
    };
    let (magic, rows) = bytes.split_at_checked(4).ok_or_else(|| broken("it has no beginning"))?;
    if magic != MAGIC.to_le_bytes() {
        return Err(broken("it begins with no number that is known"));
    }
    let rows = RoaringTreemap::deserialize_from(rows).map_err(|error| broken(&error.to_string()))?;
    match u64::try_from(descriptor.cardinality) {
        Ok(count) if count != rows.len() => {
            Err(broken(&format!("the log says that it marks {count} rows, and it marks {}", rows.len())))
        }
        _ => Ok(rows),
    }
}

/// The rows that a vector of these bytes marks: in a file of its own where the first byte is even, else in the log. For
/// fuzzers: what a table of somebody else's has may be anything.
pub fn read_bytes(data: &[u8]) -> Result<RoaringTreemap> {
    let failed = |error: &dyn std::fmt::Display| storage(error, "a deletion vector cannot be read");
    let Some((choice, bytes)) = data.split_first() else { return Ok(RoaringTreemap::new()) };
    let log_store =
        deltalake::DeltaTableBuilder::from_url(url::Url::parse("memory:///").map_err(|error| failed(&error))?)
            .and_then(|builder| builder.build_storage())
            .map_err(|error| failed(&error))?;
    let (storage_type, path_or_inline_dv, offset) = if choice % 2 == 0 {
        let id = Uuid::nil();
        let (store, path) = (log_store.object_store(None), file_path(id));
        let put = store.put(&path, PutPayload::from_bytes(Bytes::copy_from_slice(bytes)));
        futures::executor::block_on(put).map_err(|error| failed(&error))?;
        (StorageType::UuidRelativePath, encoded(id), Some(1))
    } else {
        let mut whole = bytes.to_vec();
        whole.resize(bytes.len().next_multiple_of(4), 0);
        (StorageType::Inline, z85::encode(&whole), None)
    };
    let size_in_bytes = bytes.len().saturating_sub(9) as i32;
    let descriptor =
        DeletionVectorDescriptor { storage_type, path_or_inline_dv, offset, size_in_bytes, cardinality: -1 };
    read_from(&log_store, &descriptor)
}

/// The id of the file that an attempt of a run writes for a table: made from them, so that a later run finds what a
/// killed one left. The file's name has no room for the run itself.
pub(crate) fn file_id(run: &str, resource_type: &str, attempt: usize) -> Uuid {
    let seed = format!("{run}|{resource_type}|{attempt}");
    uuid::Builder::from_random_bytes(twox_hash::XxHash3_128::oneshot(seed.as_bytes()).to_be_bytes()).into_uuid()
}

/// Returns the path of the file of that id, in the table's folder.
pub(crate) fn file_path(id: Uuid) -> Path {
    Path::from(format!("deletion_vector_{id}.bin"))
}

/// Returns its name in a descriptor.
pub(crate) fn encoded(id: Uuid) -> String {
    z85::encode(id.as_bytes())
}

/// Writes `vectors` into one file in the table's folder; a descriptor for each, in order, and the file's path.
pub(crate) async fn write(
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
        let written = writer
            .write_deletion_vector(Rows(vector))
            .context(ErrorKind::Internal, "a deletion vector cannot be written")?;
        descriptors.push(DeletionVectorDescriptor {
            storage_type: StorageType::UuidRelativePath,
            path_or_inline_dv: encoded(id),
            offset: Some(written.offset),
            size_in_bytes: written.size_in_bytes,
            cardinality,
        });
    }
    writer.finalize().context(ErrorKind::Internal, "a deletion vector cannot be written")?;
    reached("before vectors are written");
    let store: Arc<dyn object_store::ObjectStore> = table.store();
    let failed = |error: &dyn std::fmt::Display| storage(error, &format!("{path} cannot be written"));
    store.put(&path, PutPayload::from_bytes(Bytes::from(bytes))).await.map_err(|error| failed(&error))?;
    if let Some(folder) = table.local() {
        sync_file(folder.join(path.as_ref())).await.map_err(|error| failed(&error))?;
    }
    reached("vectors are written");
    Ok((descriptors, path))
}
