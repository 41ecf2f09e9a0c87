//! `fhirlake schema TYPE`

use clap::{Args, ValueEnum};

use super::output::Output;
use crate::error::{Context, Error, ErrorKind, Result};
use fhir_arrow::{EXCLUDED_TYPES, Field, Group, Layout, LayoutOptions, Node, arrow_schema};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Indented tree of columns and types.
    Tree,
    /// Arrow's notation.
    Arrow,
    /// JSON of the Delta log.
    Delta,
}

#[derive(Debug, Args)]
pub(super) struct SchemaArgs {
    /// FHIR resource type, such as `Patient`.
    #[arg(value_name = "TYPE")]
    resource_type: String,
    /// Format of the schema.
    #[arg(long, value_enum, default_value = "tree")]
    format: Format,
    /// Leave out `_fid` and `_extension`.
    #[arg(long)]
    no_extensions: bool,
    /// Depth to which a type may nest in itself.
    #[arg(long, default_value_t = LayoutOptions::default().max_nesting_level)]
    max_nesting_level: usize,
    /// Types that an open `value[x]` may have [default: Pathling's].
    #[arg(long, value_delimiter = ',', value_name = "TYPE")]
    open_types: Option<Vec<String>>,
}

pub(super) fn schema(args: &SchemaArgs, output: &Output) -> Result<()> {
    let mut options = LayoutOptions {
        extensions: !args.no_extensions,
        max_nesting_level: args.max_nesting_level.min(10),
        ..LayoutOptions::default()
    };
    if let Some(open_types) = &args.open_types {
        options.open_types.clone_from(open_types);
    }
    let layout = Layout::pathling(&args.resource_type, &options).ok_or_else(|| {
        Error::new(
            ErrorKind::Config,
            format!("{} is not a resource type of FHIR R4 (names are case-sensitive)", args.resource_type),
        )
    })?;
    if EXCLUDED_TYPES.contains(&args.resource_type.as_str()) {
        output.remark(&format!("{} has no table: Pathling's layout leaves it out", args.resource_type));
    }
    match args.format {
        Format::Tree => {
            let mut text = format!("{}\n", args.resource_type);
            tree(&layout.root, 1, &mut text);
            output.raw(text.as_bytes())
        }
        Format::Arrow => {
            let lines: Vec<String> = arrow_schema(&layout)
                .fields()
                .iter()
                .map(|field| format!("{}: {}", field.name(), field.data_type()))
                .collect();
            output.line(&lines.join("\n"))
        }
        Format::Delta => {
            let schema = delta_upsert::delta_schema(&arrow_schema(&layout))?;
            let json = serde_json::to_string_pretty(&schema).context(ErrorKind::Internal, "the schema")?;
            output.line(&json)
        }
    }
}

fn tree(group: &Group, depth: usize, text: &mut String) {
    for field in &group.fields {
        let (name, below) = type_name(field);
        text.push_str(&format!("{}{}: {name}\n", "  ".repeat(depth), field.name));
        if let Some(below) = below {
            tree(below, depth + 1, text);
        }
    }
}

fn type_name(field: &Field) -> (String, Option<&Group>) {
    let (name, below) = match &field.node {
        Node::Boolean => ("boolean", None),
        Node::Integer => ("int", None),
        Node::Decimal => ("decimal(32,6)", None),
        Node::Unscaled => ("decimal(38,0)", None),
        Node::Instant => ("timestamp", None),
        Node::Binary => ("binary", None),
        Node::String => ("string", None),
        Node::Group(group) => ("struct", Some(&**group)),
        Node::Extensions(group) => return ("map<int, array<struct>>".into(), Some(group)),
        Node::Foreign(data_type) => return (data_type.to_string(), None),
    };
    (if field.repeats { format!("array<{name}>") } else { name.to_owned() }, below)
}
