//! FHIR definitions → the shape of a resource type → Arrow columns.
//!
//! [`Model`] is FHIR R4 as data. [`Layout`] is a tree that says which columns a type has and from
//! which JSON each stems; today's only layout is Pathling's. [`Encoder`] fills a layout's columns from
//! JSON tapes and knows nothing of the layout's name.

mod arrow_schema;
mod attachments;
mod columns;
mod definitions;
mod encoder;
mod filled;
mod finish;
mod layout;
mod names;
mod scalars;
mod ucum;
mod ucum_fractions;

pub use arrow_schema::{arrow_schema, conform, layout_for, same_types, widen};
pub use attachments::for_each_attachment;
pub use definitions::{ISSUE_TYPES, Model};
pub use encoder::{EncodedRows, Encoder, MAX_LOSS_PATHS};
pub use filled::{Columns, Filled};
pub use layout::{EXCLUDED_TYPES, Field, Group, Layout, LayoutOptions, Node, Source};
pub use scalars::{instant_text, parse_instant};
