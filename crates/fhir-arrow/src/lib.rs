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
//!
//! ```
//! use std::sync::Arc;
//!
//! use fhir_arrow::tape::{Tape, parse_value};
//! use fhir_arrow::{ColumnPruning, Encoder, Layout, LayoutOptions, PresentColumns};
//!
//! let line = br#"{"resourceType":"Patient","id":"a","birthDate":"1970-01","unheardOf":1}"#;
//! let layout = Layout::pathling("Patient", &LayoutOptions::default()).unwrap();
//! let (mut encoder, mut tape) = (Encoder::new(Arc::new(layout)), Tape::default());
//! let root = parse_value(&mut tape, line, 0, line.len()).unwrap();
//! encoder.push(tape.over(line).value(root), line);
//! assert_eq!(encoder.take_unmapped().into_keys().collect::<Vec<_>>(), ["Patient.unheardOf"]);
//! let rows = encoder.finish(&mut PresentColumns::default(), ColumnPruning::TopLevel).unwrap();
//! assert!(rows.batch.column_by_name("birthDate").is_some());
//! ```

mod encode;
mod layout;
mod model;
pub mod tape;
mod ucum;

pub use encode::attachments::for_each_attachment;
pub use encode::{ENCODER_REVISION, EncodedRows, Encoder, MAX_UNMAPPED_PATHS};
pub use foundation::error::{Error, ErrorKind, Result};
pub use layout::arrow_schema::{arrow_schema, conform, layout_for};
pub use layout::present_columns::{ColumnPruning, PresentColumns};
pub use layout::{EXCLUDED_TYPES, Field, Group, Layout, LayoutOptions, Node, Source};
pub use model::Model;
