//! Layout → Arrow schema, and conforming a layout to a table that exists.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field as ArrowField, Fields, Schema, TimeUnit};

use crate::layout::{Field, Group, Layout, LayoutOptions, Node, Source};
use foundation::error::{Error, ErrorKind, Result};

/// Time zone of every timestamp column.
pub(crate) const UTC: &str = "UTC";

impl Node {
    /// The Arrow type of a single value.
    pub(crate) fn data_type(&self) -> DataType {
        match self {
            Node::Boolean => DataType::Boolean,
            Node::Integer => DataType::Int32,
            Node::Decimal => DataType::Decimal128(32, 6),
            Node::Unscaled => DataType::Decimal128(38, 0),
            Node::Instant => DataType::Timestamp(TimeUnit::Microsecond, Some(UTC.into())),
            Node::Binary => DataType::Binary,
            Node::String => DataType::Utf8,
            Node::Group(group) => DataType::Struct(group_fields(group)),
            Node::Extensions(group) => map_type(DataType::Struct(group_fields(group))),
            Node::Foreign(data_type) => data_type.clone(),
        }
    }
}

/// `map<int, array<item>>`, named and nullable as Spark writes it.
pub(crate) fn map_type(item: DataType) -> DataType {
    let entries = Fields::from(vec![
        ArrowField::new("key", DataType::Int32, false),
        ArrowField::new("value", list_type(item), false),
    ]);
    DataType::Map(Arc::new(ArrowField::new("key_value", DataType::Struct(entries), false)), false)
}

pub(crate) fn list_type(item: DataType) -> DataType {
    DataType::List(Arc::new(ArrowField::new("element", item, true)))
}

fn group_fields(group: &Group) -> Fields {
    group.fields.iter().map(arrow_field).collect()
}

pub(crate) fn arrow_field(field: &Field) -> ArrowField {
    let single = field.node.data_type();
    ArrowField::new(&field.name, if field.repeats { list_type(single) } else { single }, true)
}

/// The table's full schema.
pub fn arrow_schema(layout: &Layout) -> Schema {
    Schema::new(group_fields(&layout.root))
}

/// `layout` as an existing table with `table` for its schema takes it: the table's columns in the table's
/// order, filled where the layout knows them. What the table has no column for is counted as lost when
/// it is met, or with `add_columns` added behind the table's own, on every level but within maps: readers do not adapt
/// the values of a map. A column whose type we cannot write is an error that names it.
pub fn conform(layout: &Layout, table: &Schema, add_columns: bool) -> Result<Layout> {
    let root = conform_group(&layout.root, table.fields(), add_columns)?;
    let asked = |layout: &Group| layout.fields.iter().any(|field| field.source == Source::Json);
    if asked(&layout.root) && !asked(&root) {
        return Err(Error::new(
            ErrorKind::Table,
            "the table has no column `_source`, which source_json asks for: turn source_json off, or move the table's \
                folder away and run again, which creates a new table",
        ));
    }
    if !root.fields.iter().any(|field| field.name == "id" && field.source == Source::Member) {
        return Err(Error::new(ErrorKind::Table, "the table has no column `id`, so rows cannot be matched"));
    }
    Ok(Layout { resource_type: layout.resource_type.clone(), root: Arc::new(root) })
}

/// The layout that rows of a type are written in: `options` say it, and a table that exists, `table` its columns, as
/// far as it goes. With `add_columns` that is a table to which the columns that it lacks are added.
pub fn layout_for(resource_type: &str, options: &LayoutOptions, table: Option<&Schema>) -> Result<Layout> {
    let layout = Layout::pathling(resource_type, options)
        .ok_or_else(|| Error::new(ErrorKind::Internal, format!("{resource_type} is not a resource type of R4")))?;
    let full = arrow_schema(&layout);
    match table {
        Some(table) if *table != full => {
            conform(&layout, table, options.add_columns).map_err(|error| error.at(resource_type.to_owned()))
        }
        _ => Ok(layout),
    }
}

fn conform_group(group: &Arc<Group>, table: &Fields, add_columns: bool) -> Result<Group> {
    let mut fields = Vec::with_capacity(table.len());
    for theirs in table {
        let Some(ours) = group.fields.iter().find(|field| field.name == *theirs.name()) else {
            fields.push(Field {
                name: theirs.name().clone(),
                repeats: false,
                node: Node::Foreign(theirs.data_type().clone()),
                source: Source::Foreign,
                aliases: Vec::new(),
                filtered: false,
            });
            continue;
        };
        let node = match (&ours.node, item_type(ours, theirs.data_type())) {
            (Node::Group(inner), Some(DataType::Struct(items))) => {
                Node::Group(Arc::new(conform_group(inner, items, add_columns)?))
            }
            (Node::Extensions(inner), Some(DataType::Struct(items))) => {
                Node::Extensions(Arc::new(conform_group(inner, items, false)?))
            }
            (leaf, Some(item)) if same_type(&leaf.data_type(), item) => leaf.clone(),
            _ => {
                return Err(Error::new(
                    ErrorKind::Table,
                    format!(
                        "column {}.{} of the table has type {}, and fhirlake writes {}",
                        group.path,
                        theirs.name(),
                        theirs.data_type(),
                        arrow_field(ours).data_type()
                    ),
                ));
            }
        };
        fields.push(Field { node, ..ours.clone() });
    }
    if add_columns {
        let lacking = group.fields.iter().filter(|ours| table.find(&ours.name).is_none());
        fields.extend(lacking.cloned());
    }
    Ok(Group::new(group.path.clone(), fields))
}

/// The type of one item of the table's column, where its nesting is that of `ours`.
fn item_type<'a>(ours: &Field, theirs: &'a DataType) -> Option<&'a DataType> {
    let list_item = |list: &'a DataType| match list {
        DataType::List(item) | DataType::LargeList(item) => Some(item.data_type()),
        _ => None,
    };
    match (&ours.node, theirs) {
        (Node::Extensions(_), DataType::Map(entries, _)) => match entries.data_type() {
            DataType::Struct(entry) if entry.len() == 2 => list_item(entry[1].data_type()),
            _ => None,
        },
        (Node::Extensions(_), _) => None,
        (_, list) if ours.repeats => list_item(list),
        (_, single) => Some(single),
    }
}

fn same_type(ours: &DataType, theirs: &DataType) -> bool {
    match (ours, theirs) {
        (DataType::Utf8, DataType::Utf8 | DataType::LargeUtf8 | DataType::Utf8View) => true,
        (DataType::Binary, DataType::Binary | DataType::LargeBinary | DataType::BinaryView) => true,
        (DataType::Timestamp(_, Some(_)), DataType::Timestamp(_, Some(_))) => true,
        (ours, theirs) => ours == theirs,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::LayoutOptions;

    fn patient(extensions: bool) -> Layout {
        Layout::pathling("Patient", &LayoutOptions { extensions, ..Default::default() }).unwrap()
    }

    #[test]
    fn conforming_to_ones_own_schema_changes_nothing() {
        let layout = patient(true);
        let conformed = conform(&layout, &arrow_schema(&layout), false).unwrap();
        assert_eq!(conformed.root, layout.root);
    }

    #[test]
    fn a_table_without_extensions_and_with_a_column_of_its_own() {
        let table = arrow_schema(&patient(false));
        let mut fields: Vec<_> = table.fields().iter().cloned().collect();
        fields.push(Arc::new(ArrowField::new("loaded_by", DataType::Utf8, true)));
        let table = Schema::new(fields);
        let conformed = conform(&patient(true), &table, false).unwrap();
        assert_eq!(arrow_schema(&conformed), table);
        // With `add_columns` the columns that it lacks come behind its own.
        let widened = arrow_schema(&conform(&patient(true), &table, true).unwrap());
        let names: Vec<&str> =
            widened.fields().iter().skip(table.fields().len()).map(|field| field.name().as_str()).collect();
        assert_eq!(names, ["_fid", "_extension"]);
    }

    #[test]
    fn a_column_of_another_type_is_named() {
        let table = Schema::new(vec![
            ArrowField::new("id", DataType::Utf8, true),
            ArrowField::new("active", DataType::Int32, true),
        ]);
        let error = conform(&patient(true), &table, false).unwrap_err();
        assert!(error.to_string().contains("Patient.active"), "{error}");
    }
}
