//! Layout → Arrow schema, and conforming a layout to a table that exists.

use std::sync::Arc;

use arrow::datatypes::{DataType, Field as ArrowField, Fields, Schema, TimeUnit};

use super::layout::{Field, Group, Layout, LayoutOptions, Node, Source};
use crate::error::{Error, ErrorKind, Result};

/// Time zone of every timestamp column.
pub(super) const UTC: &str = "UTC";

impl Node {
    /// The Arrow type of a single value.
    pub(super) fn data_type(&self) -> DataType {
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
pub(super) fn map_type(item: DataType) -> DataType {
    let entries =
        Fields::from(vec![ArrowField::new("key", DataType::Int32, false), ArrowField::new("value", list_type(item), false)]);
    DataType::Map(Arc::new(ArrowField::new("key_value", DataType::Struct(entries), false)), false)
}

pub(super) fn list_type(item: DataType) -> DataType {
    DataType::List(Arc::new(ArrowField::new("element", item, true)))
}

fn group_fields(group: &Group) -> Fields {
    group.fields.iter().map(arrow_field).collect()
}

pub(super) fn arrow_field(field: &Field) -> ArrowField {
    let single = field.node.data_type();
    ArrowField::new(&field.name, if field.repeats { list_type(single) } else { single }, true)
}

/// The table's full schema.
pub fn arrow_schema(layout: &Layout) -> Schema {
    Schema::new(group_fields(&layout.root))
}

/// `layout` as an existing table with `table` for its schema takes it: the table's columns in the table's
/// order, filled where the layout knows them. What the table has no column for is counted as lost when
/// it is met. A column whose type we cannot write is an error that names it.
pub fn conform(layout: &Layout, table: &Schema) -> Result<Layout> {
    let root = conform_group(&layout.root, table.fields())?;
    let asked = |layout: &Group| layout.fields.iter().any(|field| field.source == Source::Json);
    if asked(&layout.root) && !asked(&root) {
        return Err(Error::new(
            ErrorKind::Table,
            "the table has no column `_source`, which source_json asks for: turn source_json off, or move the table's folder away and run again, which makes it anew",
        ));
    }
    if !root.fields.iter().any(|field| field.name == "id" && field.source == Source::Member) {
        return Err(Error::new(ErrorKind::Table, "the table has no column `id`, so rows cannot be matched"));
    }
    Ok(Layout { resource_type: layout.resource_type.clone(), root: Arc::new(root) })
}

/// The layout that rows of a type are written in: `options` say it, and a table that exists, `table` its columns, as far
/// as it goes. With `add_columns` that is a table to which the columns that it lacks are added.
pub fn layout_for(resource_type: &str, options: &LayoutOptions, table: Option<&Schema>) -> Result<Layout> {
    let layout = Layout::pathling(resource_type, options)
        .ok_or_else(|| Error::new(ErrorKind::Internal, format!("{resource_type} is no type of R4")))?;
    let full = arrow_schema(&layout);
    match table {
        Some(table) if *table != full => {
            let widened = if options.add_columns { widen(table, &full) } else { None };
            conform(&layout, widened.as_ref().unwrap_or(table)).map_err(|error| error.at(resource_type.to_owned()))
        }
        _ => Ok(layout),
    }
}

/// `table` with the columns of `ours` that it lacks behind its own, on every level; `None` where it lacks none. The values
/// of a map stay as they are: readers do not widen them.
pub fn widen(table: &Schema, ours: &Schema) -> Option<Schema> {
    let widened = Schema::new(widen_fields(table.fields(), ours.fields()));
    (widened.fields() != table.fields()).then_some(widened)
}

fn widen_fields(table: &Fields, ours: &Fields) -> Fields {
    let both = |field: &Arc<ArrowField>| {
        let our = ours.iter().find(|our| our.name() == field.name());
        our.map_or_else(|| field.clone(), |our| widen_field(field, our))
    };
    let lacking = ours.iter().filter(|our| !table.iter().any(|field| field.name() == our.name()));
    table.iter().map(both).chain(lacking.cloned()).collect()
}

fn widen_field(table: &Arc<ArrowField>, ours: &Arc<ArrowField>) -> Arc<ArrowField> {
    let data_type = match (table.data_type(), ours.data_type()) {
        (DataType::Struct(table), DataType::Struct(ours)) => DataType::Struct(widen_fields(table, ours)),
        (DataType::List(table), DataType::List(ours)) => DataType::List(widen_field(table, ours)),
        (other, _) => other.clone(),
    };
    Arc::new(table.as_ref().clone().with_data_type(data_type))
}

/// Whether columns that both have are of the same types.
pub fn same_types(table: &Fields, ours: &Fields) -> bool {
    fn same(table: &DataType, ours: &DataType) -> bool {
        match (table, ours) {
            (DataType::Struct(table), DataType::Struct(ours)) => same_types(table, ours),
            (DataType::List(table), DataType::List(ours)) => same(table.data_type(), ours.data_type()),
            (DataType::Map(_, _), DataType::Map(_, _)) => true,
            (table, ours) => same_type(table, ours),
        }
    }
    ours.iter().all(|our| table.find(our.name()).is_none_or(|(_, table)| same(table.data_type(), our.data_type())))
}

fn conform_group(group: &Arc<Group>, table: &Fields) -> Result<Group> {
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
            (Node::Group(inner), Some(DataType::Struct(items))) => Node::Group(Arc::new(conform_group(inner, items)?)),
            (Node::Extensions(inner), Some(DataType::Struct(items))) => Node::Extensions(Arc::new(conform_group(inner, items)?)),
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
    use crate::schema::LayoutOptions;

    fn patient(extensions: bool) -> Layout {
        Layout::pathling("Patient", &LayoutOptions { extensions, ..Default::default() }).unwrap()
    }

    #[test]
    fn conforming_to_ones_own_schema_changes_nothing() {
        let layout = patient(true);
        let conformed = conform(&layout, &arrow_schema(&layout)).unwrap();
        assert_eq!(conformed.root, layout.root);
    }

    #[test]
    fn a_table_without_extensions_and_with_a_column_of_its_own() {
        let table = arrow_schema(&patient(false));
        let mut fields: Vec<_> = table.fields().iter().cloned().collect();
        fields.push(Arc::new(ArrowField::new("loaded_by", DataType::Utf8, true)));
        let table = Schema::new(fields);
        let conformed = conform(&patient(true), &table).unwrap();
        assert_eq!(arrow_schema(&conformed), table);
    }

    #[test]
    fn a_column_of_another_type_is_named() {
        let table =
            Schema::new(vec![ArrowField::new("id", DataType::Utf8, true), ArrowField::new("active", DataType::Int32, true)]);
        let error = conform(&patient(true), &table).unwrap_err();
        assert!(error.to_string().contains("Patient.active"), "{error}");
    }
}
