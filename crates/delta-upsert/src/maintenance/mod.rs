//! Maintenance of tables: compacting, purging of deleted rows, sorting by id, and removal of unreferenced files.

pub(crate) mod cluster;
pub(crate) mod optimize;
pub(crate) mod rewrite;
pub(crate) mod vacuum;
