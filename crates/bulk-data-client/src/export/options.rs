//! Parameters of a kick-off beside types and time: each parameter once, with its documentation, its name in the
//! request, its FHIR type and its part in the scope of watermarks.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// A value of an option as values of a parameter.
trait Values {
    fn values(&self) -> Vec<String>;
}

impl Values for Option<String> {
    fn values(&self) -> Vec<String> {
        self.iter().cloned().collect()
    }
}

impl Values for Vec<String> {
    fn values(&self) -> Vec<String> {
        self.clone()
    }
}

impl Values for bool {
    fn values(&self) -> Vec<String> {
        if *self { vec!["true".to_owned()] } else { Vec::new() }
    }
}

/// A parameter of the kick-off that [`ExportOptions`] sets. The request, the scope of watermarks, `explain` and the
/// export log all read the list of them.
pub(crate) struct OptionParameter {
    pub name: &'static str,
    /// Its member of `Parameters.parameter` in a POST.
    pub kind: &'static str,
    /// True if values may be joined by commas: a search may hold some.
    pub joins: bool,
    /// The name that it has in a watermark's scope, where it changes the answer. Tables keep it: it must not change.
    pub scope: Option<&'static str>,
    /// The key in [`ExportOptions`].
    pub key: &'static str,
    /// True if resources that there are may be missing from the answer: what is missing is not gone then.
    pub narrows: bool,
    pub values: fn(&ExportOptions) -> Vec<String>,
}

macro_rules! options {
    ($($(#[$doc:meta])* $key:ident: $type:ty => $name:literal, $kind:literal, joins: $joins:literal,
        scope: $scope:expr, narrows: $narrows:literal;)+) => {
        /// Parameters beside types and time.
        #[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
        #[serde(default)]
        pub struct ExportOptions {
            $($(#[$doc])* pub $key: $type,)+
            /// Further parameters of the kick-off.
            pub parameters: BTreeMap<String, OneOrMore>,
            /// Method of the kick-off; `auto`: POST where a parameter needs it, else GET.
            pub method: Method,
            /// Form of a parameter with several values; a POST always repeats it.
            pub lists: ListStyle,
            /// Lets the server ignore what it does not support (`Prefer: handling=lenient`). What it ignored is read
            /// back and reported.
            pub lenient: bool,
            /// Asks for the export's own status apart from the poll's (`Prefer: separate-export-status`, STU 3).
            pub separate_export_status: bool,
        }

        pub(crate) const PARAMETERS: &[OptionParameter] = &[$(OptionParameter {
            name: $name,
            kind: $kind,
            joins: $joins,
            scope: $scope,
            key: stringify!($key),
            narrows: $narrows,
            values: |options| Values::values(&options.$key),
        }),+];
    };
}

options! {
    /// Nothing that changed after this instant (`_until`, STU 3).
    #[cfg_attr(feature = "schema", schemars(schema_with = "instant_schema"))]
    #[serde(skip_serializing_if = "Option::is_none")]
    until: Option<String> => "_until", "valueInstant", joins: false, scope: None, narrows: true;
    /// Elements that resources are cut down to (`_elements`): `id`, or `Patient.id`. Tables keep complete resources
    /// over such ones.
    elements: Vec<String> => "_elements", "valueString", joins: true, scope: Some("elements"), narrows: true;
    // K15, K7: a search may have commas of its own, so each is a parameter.
    /// FHIR searches that resources must match (`_typeFilter`), unencoded: `Observation?category=laboratory`.
    type_filters: Vec<String> => "_typeFilter", "valueString", joins: false, scope: Some("filters"), narrows: true;
    /// Only the data of these patients (`patient`): `Patient/7`, or ids. Needs a POST, and level patient or group.
    patients: Vec<String> => "patient", "valueReference", joins: true, scope: Some("patients"), narrows: true;
    /// Resources that come along (`includeAssociatedData`): LatestProvenanceResources, RelevantProvenanceResources, or
    /// the server's own.
    include_associated_data: Vec<String> => "includeAssociatedData", "valueCode", joins: true,
        scope: Some("with"), narrows: false;
    /// A type by whose instances files are organised (`organizeOutputBy`, STU 3).
    #[serde(skip_serializing_if = "Option::is_none")]
    organize_output_by: Option<String> => "organizeOutputBy", "valueString", joins: false, scope: None, narrows: false;
    /// Lets the server page its manifest, and list files while it still works (`allowPartialManifests`, STU 3).
    allow_partial_manifests: bool => "allowPartialManifests", "valueBoolean", joins: false, scope: None, narrows: false;
    /// Format of the files (`_outputFormat`). Default: the parameter is not sent, since some servers refuse the usual
    /// value.
    #[serde(skip_serializing_if = "Option::is_none")]
    output_format: Option<String> => "_outputFormat", "valueString", joins: false, scope: None, narrows: false;
}

impl ExportOptions {
    /// Returns what narrows the answer, as a text that is the same for the same: part of a watermark's scope. Empty
    /// for the whole answer.
    pub fn scope(&self) -> String {
        let mut scope = String::new();
        for parameter in PARAMETERS {
            let mut values = (parameter.values)(self);
            if let Some(name) = parameter.scope.filter(|_| !values.is_empty()) {
                values.sort();
                scope.push_str(&format!("|{name}={}", values.join("\u{1f}")));
            }
        }
        for (name, value) in self.further() {
            scope.push_str(&format!("|{name}={value}"));
        }
        scope
    }

    /// Returns the keys that are set and may keep resources out of the answer that the server has. Further parameters
    /// may, since nobody knows what they mean.
    pub fn narrowing(&self) -> Vec<&'static str> {
        let set = PARAMETERS.iter().filter(|parameter| parameter.narrows && !(parameter.values)(self).is_empty());
        let further = self.further().next().is_some().then_some("parameters");
        set.map(|parameter| parameter.key).chain(further).collect()
    }

    /// Returns the further parameters, each with one value.
    pub(crate) fn further(&self) -> impl Iterator<Item = (&str, &str)> {
        self.parameters
            .iter()
            .flat_map(|(name, values)| values.values().iter().map(|value| (name.as_str(), value.as_str())))
    }
}

/// A value, or several.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(untagged)]
pub enum OneOrMore {
    /// One.
    One(String),
    /// Several: the parameter is repeated.
    More(Vec<String>),
}

impl OneOrMore {
    /// Returns the values.
    pub fn values(&self) -> &[String] {
        match self {
            OneOrMore::One(value) => std::slice::from_ref(value),
            OneOrMore::More(values) => values,
        }
    }
}

/// Method of the kick-off (K2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// POST where a parameter needs it, else GET.
    #[default]
    Auto,
    /// GET, with the parameters in the URL (STU 1 to 3).
    Get,
    /// POST, with the parameters in a `Parameters` resource (the only form of STU 4).
    Post,
}

/// Form of a parameter with several values in a GET (K7).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(rename_all = "kebab-case")]
pub enum ListStyle {
    /// `_type=Patient,Condition`; `_typeFilter` is always repeated, since a search may hold commas.
    #[default]
    Comma,
    /// `_type=Patient&_type=Condition`
    Repeat,
}

/// The schema of an instant.
#[cfg(feature = "schema")]
fn instant_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
    schemars::json_schema!({ "type": ["string", "null"], "format": "instant" })
}
