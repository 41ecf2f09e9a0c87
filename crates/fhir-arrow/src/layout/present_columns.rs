//! Which columns of a layout hold anything.

use arrow::datatypes::{DataType, Field as ArrowField, Schema};

use crate::layout::arrow_schema::{list_type, map_type};
use crate::layout::{Field, Group, Node};

/// Which columns a file has, of those that its rows leave empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ColumnPruning {
    /// A top-level column is there with all that is within it, or not at all. Spark before 4.1 takes a group for null
    /// where the file has none of those of its columns that a query asks for (SPARK-53535).
    #[default]
    TopLevel,
    /// Only what a row fills, at every depth.
    Nested,
    /// Every column.
    None,
}

/// Which columns of a layout hold anything, as a tree beside the layout's. Rows that were encoded apart
/// are written with the union, so that they fit into one file.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PresentColumns {
    /// Places of the fields of a struct that are here, ascending.
    pub(crate) children: Vec<(usize, PresentColumns)>,
}

impl PresentColumns {
    /// Every field of `group`, at every depth.
    pub(crate) fn all(group: &Group) -> Self {
        let below = |field: &Field| match &field.node {
            Node::Group(group) | Node::Extensions(group) => Self::all(group),
            _ => Self::default(),
        };
        Self { children: group.fields.iter().map(below).enumerate().collect() }
    }

    /// Adds what `columns` asks for beyond what is filled. `group` is the layout's root.
    pub(crate) fn complete(&mut self, group: &Group, columns: ColumnPruning) {
        match columns {
            ColumnPruning::Nested => {
                for (index, inner) in &mut self.children {
                    // DataFusion adapts structs and lists whose files lack fields to the table's type, but not maps
                    // ("Cannot cast column"), so the values of the map are always written whole.
                    if let Node::Extensions(group) = &group.fields[*index].node {
                        *inner = Self::all(group);
                    }
                }
            }
            ColumnPruning::None => *self = Self::all(group),
            ColumnPruning::TopLevel => {
                for (index, inner) in &mut self.children {
                    if let Node::Group(group) | Node::Extensions(group) = &group.fields[*index].node {
                        *inner = Self::all(group);
                    }
                }
            }
        }
    }

    /// The Arrow schema of a file with these columns of `group`.
    pub(crate) fn schema(&self, group: &Group) -> Schema {
        let fields = self.children.iter().map(|(index, inner)| {
            let field = &group.fields[*index];
            ArrowField::new(&field.name, filled_type(field, inner), true)
        });
        Schema::new(fields.collect::<Vec<_>>())
    }

    /// Of each leaf column of `group` that is here, in Parquet's order: whether readers filter by it.
    pub(crate) fn filtered(&self, group: &Group) -> Vec<bool> {
        let mut out = Vec::new();
        self.mark_filtered(group, &mut out);
        out
    }

    fn mark_filtered(&self, group: &Group, out: &mut Vec<bool>) {
        for (index, inner) in &self.children {
            let field = &group.fields[*index];
            match &field.node {
                Node::Group(group) => inner.mark_filtered(group, out),
                Node::Extensions(group) => {
                    out.push(false);
                    inner.mark_filtered(group, out);
                }
                Node::Foreign(data_type) => out.resize(out.len() + leaf_count(data_type), false),
                _ => out.push(field.filtered),
            }
        }
    }

    /// Adds what `other` has; whether anything was new.
    pub fn merge(&mut self, other: &PresentColumns) -> bool {
        let mut grew = false;
        for (index, theirs) in &other.children {
            match self.children.binary_search_by_key(index, |child| child.0) {
                Ok(at) => grew |= self.children[at].1.merge(theirs),
                Err(at) => {
                    self.children.insert(at, (*index, theirs.clone()));
                    grew = true;
                }
            }
        }
        grew
    }
}

fn leaf_count(data_type: &DataType) -> usize {
    match data_type {
        DataType::Struct(fields) => fields.iter().map(|field| leaf_count(field.data_type())).sum(),
        DataType::List(item) | DataType::LargeList(item) | DataType::Map(item, _) => leaf_count(item.data_type()),
        _ => 1,
    }
}

/// The Arrow type of `field` with only the columns of `filled`.
pub(crate) fn filled_type(field: &Field, filled: &PresentColumns) -> DataType {
    let structs = |group: &Group| {
        let fields = filled.children.iter().map(|(index, inner)| {
            let field = &group.fields[*index];
            ArrowField::new(&field.name, filled_type(field, inner), true)
        });
        DataType::Struct(fields.collect())
    };
    let single = match &field.node {
        Node::Group(group) => structs(group),
        Node::Extensions(group) => return map_type(structs(group)),
        leaf => leaf.data_type(),
    };
    if field.repeats { list_type(single) } else { single }
}
