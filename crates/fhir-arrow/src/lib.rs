//! FHIR resources as Arrow record batches, in the layout that Pathling's encoders write.
//!
//! * [`tape`] parses JSON into nodes that point into its bytes: decimals keep their text, and nothing is copied.
//! * [`Model`] is FHIR R4 as data: the elements of each type, and how often each occurs.
//! * [`Layout`] is a tree that says which columns a resource type has and which element fills each.
//!   [`Layout::pathling`] is the layout of Pathling's R4 encoders.
//! * [`Encoder`] fills the columns of a layout from tapes. Columns that no row fills can be left out of a batch
//!   ([`ColumnPruning`](ColumnPruning)).
//!
//! The cost of a row follows the values that it has, and not the columns of its type.

mod encode;
mod layout;
mod model;
pub mod tape;
mod ucum;

pub use encode::attachments::for_each_attachment;
pub use encode::{EncodedRows, Encoder, MAX_UNMAPPED_PATHS};
pub use layout::arrow_schema::{arrow_schema, conform, layout_for};
pub use layout::present_columns::{ColumnPruning, PresentColumns};
pub use layout::{EXCLUDED_TYPES, Field, Group, Layout, LayoutOptions, Node, Source};
pub use model::Model;
