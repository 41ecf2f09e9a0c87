//! The columns of a resource type, as a tree: Pathling's layout (its `EncoderBuilder`, `SchemaConverter`).

pub(crate) mod arrow_schema;
pub(crate) mod member_index;
pub(crate) mod present_columns;

use std::collections::HashMap;
use std::sync::Arc;

use crate::layout::member_index::MemberIndex;
use crate::model::{Element, Model};

/// Types that the layout excludes: their lines are counted and reported.
pub const EXCLUDED_TYPES: [&str; 4] = ["Bundle", "Parameters", "StructureDefinition", "StructureMap"];

/// Options of a layout. The names and meanings are Pathling's.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct LayoutOptions {
    /// `_fid` columns and the `_extension` map.
    pub extensions: bool,
    /// Number of times that a definition may nest in itself.
    pub max_nesting_level: usize,
    /// Types that a `value[x]` of type `*` may have.
    pub open_types: Vec<String>,
    /// A last column `_source` with the resource exactly as it came.
    pub source_json: bool,
    /// True if tables that exist get the columns that they lack.
    pub add_columns: bool,
}

impl Default for LayoutOptions {
    fn default() -> Self {
        // FhirEncoders.STANDARD_OPEN_TYPES
        let open = [
            "boolean",
            "code",
            "date",
            "dateTime",
            "decimal",
            "integer",
            "string",
            "Coding",
            "CodeableConcept",
            "Address",
            "Identifier",
            "Reference",
        ];
        Self {
            extensions: true,
            max_nesting_level: 3,
            open_types: open.iter().map(|name| (*name).to_owned()).collect(),
            source_json: false,
            add_columns: false,
        }
    }
}

/// The layout of one resource type.
#[derive(Debug)]
pub struct Layout {
    /// The type.
    pub resource_type: Arc<str>,
    /// Its columns.
    pub root: Arc<Group>,
}

/// A struct: fields in the table's order, and what the encoder looks up in them.
#[derive(Debug, PartialEq)]
pub struct Group {
    /// FHIR path, for reports of what was lost: `Patient.contact`.
    pub path: String,
    /// The fields.
    pub fields: Vec<Field>,
    /// Fields that JSON members fill, in order: members of a resource mostly come in it.
    pub members: Vec<usize>,
    /// The names of `members`; aliases come last.
    pub(crate) names: MemberIndex,
    /// For each field, the one derived from it (`_scale`, `_versioned`).
    pub derived: Vec<Option<usize>>,
    /// The `_fid` field.
    pub fid: Option<usize>,
    /// The fields `_value_canonicalized` and `_code_canonicalized`.
    pub canonical: Option<(usize, usize)>,
}

impl Group {
    /// A group of `fields` at `path`.
    pub fn new(path: String, fields: Vec<Field>) -> Self {
        let place = |source: Source| fields.iter().position(|field| field.source == source);
        let mut members: Vec<usize> = (0..fields.len()).filter(|at| fields[*at].source == Source::Member).collect();
        let mut names: Vec<&str> = members.iter().map(|at| fields[*at].name.as_str()).collect();
        for (at, field) in fields.iter().enumerate() {
            members.extend(field.aliases.iter().map(|_| at));
            names.extend(field.aliases.iter().map(String::as_str));
        }
        let names = MemberIndex::new(names.into_iter());
        let has_derived = fields.iter().any(|field| matches!(field.source, Source::Scale | Source::Versioned));
        let derived = fields.iter().map(|field| {
            if !has_derived {
                return None;
            }
            let of = |suffix: &str, source| {
                let name = format!("{}{suffix}", field.name);
                fields.iter().position(|other| other.source == source && other.name == name)
            };
            of("_scale", Source::Scale).or_else(|| of("_versioned", Source::Versioned))
        });
        let (derived, fid) = (derived.collect(), place(Source::Fid));
        let named =
            |name: &str| fields.iter().position(|field| field.source == Source::Canonical && field.name == name);
        let canonical = named("_value_canonicalized").zip(named("_code_canonicalized"));
        Self { path, members, names, derived, fid, canonical, fields }
    }
}

/// A column, at any depth.
#[derive(Debug, Clone, PartialEq)]
pub struct Field {
    /// The column's name.
    pub name: String,
    /// True if it is an array of [`Field::node`].
    pub repeats: bool,
    /// The type.
    pub node: Node,
    /// Source of its value.
    pub source: Source,
    /// Names of other JSON members that it takes in as well: `valuePositiveInt` for `valueInteger`, where the choice
    /// has no column of its own for it.
    pub aliases: Vec<String>,
    /// True if readers filter by it (ids, dates, codes, references), so that files keep statistics of it.
    pub filtered: bool,
}

/// Source of a column's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// The JSON member of the column's name.
    Member,
    /// `_versioned`: derived from the id before it.
    Versioned,
    /// `_scale`: digits after the point of the decimal before it.
    Scale,
    /// `_value_canonicalized` and `_code_canonicalized` of a Quantity.
    Canonical,
    /// `_fid`: number of the composite within its row.
    Fid,
    /// `_extension`: the map of the row's extensions by `_fid`.
    Extensions,
    /// `_source`: the line itself.
    Json,
    /// A column of an existing table that nothing here fills.
    Foreign,
}

/// The type of a column.
#[derive(Debug, Clone, PartialEq)]
pub enum Node {
    /// boolean
    Boolean,
    /// int
    Integer,
    /// decimal(32,6)
    Decimal,
    /// decimal(38,0), the unscaled number of a canonical quantity
    Unscaled,
    /// timestamp
    Instant,
    /// binary
    Binary,
    /// string
    String,
    /// struct
    Group(Arc<Group>),
    /// map<int, array<struct>>
    Extensions(Arc<Group>),
    /// Any other type, of a column that only an existing table has.
    Foreign(arrow::datatypes::DataType),
}

/// HAPI's abstract `MetadataResource` declares elements that some subclasses do not define; they are
/// columns all the same, right after `text`.
const METADATA_RESOURCE: [(&str, &[&str]); 10] = [
    ("ChargeItemDefinition", &["name"]),
    ("CompartmentDefinition", &["title", "jurisdiction"]),
    ("EffectEvidenceSynthesis", &["experimental"]),
    ("Evidence", &["experimental"]),
    ("EvidenceVariable", &["experimental"]),
    ("ExampleScenario", &["title", "description"]),
    ("GraphDefinition", &["title"]),
    ("NamingSystem", &["url", "version", "title", "experimental"]),
    ("RiskEvidenceSynthesis", &["experimental"]),
    ("SearchParameter", &["title"]),
];

/// Types whose HAPI class has subclasses that are types too.
const SUBCLASSES: [(&str, &[&str]); 4] = [
    ("string", &["code", "markdown"]),
    ("uri", &["canonical", "id", "oid", "url", "uuid"]),
    ("integer", &["positiveInt", "unsignedInt"]),
    ("Quantity", &["Age", "Count", "Distance", "Duration"]),
];

/// Types whose HAPI class is a subclass of its `Quantity`: they carry the canonical columns.
const QUANTITIES: [&str; 7] = ["Quantity", "Age", "Count", "Distance", "Duration", "SimpleQuantity", "MoneyQuantity"];

fn is_primitive(code: &str) -> bool {
    code.starts_with(|c: char| c.is_ascii_lowercase())
}

fn capitalised(code: &str) -> String {
    let mut letters = code.chars();
    letters.next().map_or_else(String::new, |first| first.to_ascii_uppercase().to_string() + letters.as_str())
}

/// The name of HAPI's class for a type: choices are sorted by it.
fn hapi_class(code: &str) -> String {
    if is_primitive(code) { capitalised(code) + "Type" } else { code.to_owned() }
}

fn field(name: impl Into<String>, repeats: bool, node: Node, source: Source) -> Field {
    Field { name: name.into(), repeats, node, source, aliases: Vec::new(), filtered: false }
}

struct Builder<'a> {
    model: &'a Model,
    options: &'a LayoutOptions,
    /// Number of times that each definition is on the current path.
    on_path: HashMap<String, usize>,
}

impl Layout {
    /// Pathling's layout of `resource_type`; `None` where R4 has no such type.
    pub fn pathling(resource_type: &str, options: &LayoutOptions) -> Option<Layout> {
        let model = Model::r4();
        if !model.is_resource_type(resource_type) {
            return None;
        }
        let mut builder = Builder { model, options, on_path: HashMap::new() };
        let mut fields = builder.fields(resource_type, resource_type);
        if options.extensions {
            // The map's values nest nothing: nested extensions are entries of their own.
            let extension = builder.group("Extension", format!("{resource_type}.extension"));
            fields.push(field("_extension", false, Node::Extensions(Arc::new(extension)), Source::Extensions));
        }
        if options.source_json {
            fields.push(field("_source", false, Node::String, Source::Json));
        }
        let root = Group::new(resource_type.to_owned(), fields);
        Some(Layout { resource_type: resource_type.into(), root: Arc::new(root) })
    }
}

impl Builder<'_> {
    fn group(&mut self, definition: &str, path: String) -> Group {
        let fields = self.fields(definition, &path);
        Group::new(path, fields)
    }

    fn fields(&mut self, definition: &str, path: &str) -> Vec<Field> {
        *self.on_path.entry(definition.to_owned()).or_default() += 1;
        let mut fields = Vec::new();
        let elements = self.model.definition(definition).map_or(&[][..], |found| &found.elements);
        for element in elements {
            let skipped = matches!(element.name.as_str(), "contained" | "extension" | "modifierExtension")
                || definition == "ValueSet.expansion.contains" && element.name == "contains";
            if !skipped {
                self.element(definition, path, element, &mut fields);
            }
            if element.name == "text" && self.model.is_resource_type(definition) {
                self.metadata_resource(definition, path, &mut fields);
            }
        }
        if QUANTITIES.contains(&definition) {
            let value = Group::new(
                format!("{path}._value_canonicalized"),
                vec![
                    field("value", false, Node::Unscaled, Source::Canonical),
                    field("scale", false, Node::Integer, Source::Canonical),
                ],
            );
            fields.push(field("_value_canonicalized", false, Node::Group(Arc::new(value)), Source::Canonical));
            fields.push(field("_code_canonicalized", false, Node::String, Source::Canonical));
        }
        if self.options.extensions {
            fields.push(field("_fid", false, Node::Integer, Source::Fid));
        }
        if let Some(count) = self.on_path.get_mut(definition) {
            *count -= 1;
        }
        fields
    }

    fn metadata_resource(&mut self, resource_type: &str, path: &str, fields: &mut Vec<Field>) {
        let names = METADATA_RESOURCE.iter().find(|(name, _)| *name == resource_type).map_or(&[][..], |row| row.1);
        for name in names {
            // Types as MetadataResource itself declares them.
            let (code, repeats) = match *name {
                "experimental" => ("boolean", false),
                "jurisdiction" => ("CodeableConcept", true),
                _ => ("string", false),
            };
            self.typed(path, name, repeats, code, fields);
        }
    }

    fn element(&mut self, definition: &str, path: &str, element: &Element, fields: &mut Vec<Field>) {
        let name = &element.name;
        if let Some(block) = &element.block {
            if self.on_path.get(block).copied().unwrap_or(0) <= self.options.max_nesting_level {
                let group = self.group(block, format!("{path}.{name}"));
                fields.push(field(name, element.repeats, Node::Group(Arc::new(group)), Source::Member));
            }
        } else if element.choice {
            // The definitions spell `*` out as all of the 50 types that it stands for; no other choice has half as
            // many.
            let open = element.types.len() > 25;
            let types = if open { &self.options.open_types } else { &element.types };
            let mut codes: Vec<&str> = types.iter().map(String::as_str).collect();
            codes.sort_by_key(|code| hapi_class(code));
            codes.dedup();
            let codes: Vec<String> = codes.into_iter().map(str::to_owned).collect();
            for code in &codes {
                let at = fields.len();
                self.typed(path, &(name.clone() + &capitalised(code)), false, code, fields);
                // An open choice of a subclass of one of its types: HAPI's class of the value decides, so Pathling's
                // column of the type has it. Where the subclass has a column of its own, the value is only there.
                let subclasses = SUBCLASSES.iter().find(|(class, _)| class == code).map_or(&[][..], |row| row.1);
                if let (true, Some(field)) = (open, fields.get_mut(at)) {
                    let without_column =
                        subclasses.iter().filter(|subclass| !codes.iter().any(|code| code == **subclass));
                    field.aliases = without_column.map(|subclass| name.clone() + &capitalised(subclass)).collect();
                }
            }
        } else if let Some(code) = element.types.first() {
            // `Resource.id` is typed string in the definitions, through an extension; in HAPI it is an id.
            let code = if name == "id" && self.model.is_resource_type(definition) { "id" } else { code };
            self.typed(path, name, element.repeats, code, fields);
        }
    }

    fn typed(&mut self, path: &str, name: &str, repeats: bool, code: &str, fields: &mut Vec<Field>) {
        let filtered =
            matches!(code, "id" | "date" | "dateTime" | "instant" | "code") || name == "reference" && code == "string";
        let leaf = |node| Field { filtered, ..field(name, repeats, node, Source::Member) };
        match code {
            "boolean" => fields.push(leaf(Node::Boolean)),
            "integer" | "positiveInt" | "unsignedInt" => fields.push(leaf(Node::Integer)),
            "decimal" => {
                fields.push(leaf(Node::Decimal));
                fields.push(field(format!("{name}_scale"), repeats, Node::Integer, Source::Scale));
            }
            "instant" => fields.push(leaf(Node::Instant)),
            "base64Binary" => fields.push(leaf(Node::Binary)),
            "id" => {
                fields.push(leaf(Node::String));
                fields.push(field(format!("{name}_versioned"), repeats, Node::String, Source::Versioned));
            }
            code if is_primitive(code) => fields.push(leaf(Node::String)),
            "Resource" => {}
            code => {
                let depth = self.on_path.get(code).copied().unwrap_or(0);
                // A Reference is never included below another.
                let limit = if code == "Reference" { 0 } else { self.options.max_nesting_level };
                if depth <= limit {
                    let group = self.group(code, format!("{path}.{name}"));
                    fields.push(field(name, repeats, Node::Group(Arc::new(group)), Source::Member));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The columns at a path of `resource_type`, by name.
    fn names(resource_type: &str, path: &[&str], options: &LayoutOptions) -> Option<Vec<String>> {
        let mut group = Layout::pathling(resource_type, options)?.root;
        for step in path {
            let field = group.fields.iter().find(|field| field.name == *step)?.clone();
            match field.node {
                Node::Group(inner) | Node::Extensions(inner) => group = inner,
                _ => return None,
            }
        }
        Some(group.fields.iter().map(|field| field.name.clone()).collect())
    }

    // SchemaProcessor.includeElement: a definition may be on its own path as often as the level says, a Reference
    // never.
    #[test]
    fn nesting_stops_at_the_level() {
        for level in [0, 1, 3, 5] {
            let options = LayoutOptions { max_nesting_level: level, ..Default::default() };
            let deepest = vec!["item"; level + 1];
            let items = names("QuestionnaireResponse", &deepest, &options).unwrap();
            assert!(
                items.contains(&"answer".to_owned()) && !items.contains(&"item".to_owned()),
                "level {level}: {items:?}"
            );
            let identifier = names("QuestionnaireResponse", &["subject", "identifier"], &options).unwrap();
            assert!(!identifier.contains(&"assigner".to_owned()), "level {level}: {identifier:?}");
            let assigner = names("QuestionnaireResponse", &["identifier", "assigner", "identifier"], &options);
            // Level 0 leaves no second Identifier below the first.
            assert_eq!(assigner.is_some(), level > 0, "level {level}");
        }
    }

    // Open choices have the types that are asked for, in the order of HAPI's classes, with their partners.
    #[test]
    fn open_types_in_hapis_order_with_partners() {
        let open_types = ["uri", "Quantity", "decimal", "id", "CodeableConcept", "code"].map(str::to_owned).to_vec();
        let options = LayoutOptions { open_types, ..Default::default() };
        let input = names("Task", &["input"], &options).unwrap();
        let expected = [
            "id",
            "type",
            "valueCode",
            "valueCodeableConcept",
            "valueDecimal",
            "valueDecimal_scale",
            "valueId",
            "valueId_versioned",
            "valueQuantity",
            "valueUri",
            "_fid",
        ];
        assert_eq!(input, expected);
        let quantity = names("Task", &["input", "valueQuantity"], &options).unwrap();
        assert!(
            quantity.ends_with(&["_value_canonicalized".into(), "_code_canonicalized".into(), "_fid".into()]),
            "{quantity:?}"
        );
        let none = LayoutOptions { open_types: Vec::new(), ..Default::default() };
        assert_eq!(names("Patient", &["_extension"], &none).unwrap(), ["id", "url", "_fid"]);
    }
}
