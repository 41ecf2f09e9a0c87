//! Encodes NDJSON of one resource type into a record batch, and prints its columns and what has no column.
//!
//! `cargo run --release --example ndjson_to_arrow -- Patient < Patient.ndjson`, or without arguments two made-up
//! patients.

use std::io::Read;
use std::sync::Arc;

use fhir_arrow::tape::{Tape, parse_value};
use fhir_arrow::{ColumnPruning, Encoder, Layout, LayoutOptions, PresentColumns};

const SAMPLE: &str = r#"{"resourceType":"Patient","id":"a","birthDate":"1970-01","name":[{"family":"Example"}]}
{"resourceType":"Patient","id":"b","active":true,"contained":[{"resourceType":"Organization"}]}
"#;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let resource_type = std::env::args().nth(1);
    let mut text = SAMPLE.to_owned();
    if resource_type.is_some() {
        text.clear();
        std::io::stdin().read_to_string(&mut text)?;
    }
    let resource_type = resource_type.unwrap_or_else(|| "Patient".to_owned());
    let layout = Layout::pathling(&resource_type, &LayoutOptions::default()).ok_or("not a resource type of R4")?;
    let mut encoder = Encoder::new(Arc::new(layout));
    for line in text.lines() {
        let mut tape = Tape::default();
        let root = parse_value(&mut tape, line.as_bytes(), 0, line.len())?;
        encoder.push(tape.over(line.as_bytes()).value(root), line.as_bytes());
    }
    let unmapped = encoder.take_unmapped();
    let rows = encoder.finish(&mut PresentColumns::default(), ColumnPruning::TopLevel)?;
    let mut out = format!("{} rows\n", rows.batch.num_rows());
    for field in rows.schema.fields() {
        out.push_str(&format!("  {}\n", field.name()));
    }
    for (path, count) in unmapped {
        out.push_str(&format!("no column: {path} ({count})\n"));
    }
    std::io::Write::write_all(&mut std::io::stdout(), out.as_bytes())?;
    Ok(())
}
