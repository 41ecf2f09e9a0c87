//! FHIR R4 as data: `model/r4.json.gz`, made by `model/compact.py` from HL7's StructureDefinitions (CC0).

use std::collections::HashMap;
use std::io::Read;
use std::sync::LazyLock;

use serde::Deserialize;

/// The definitions of FHIR R4 4.0.1.
pub struct Model {
    /// Definition by path: a type (`Patient`, `HumanName`) or a block (`Patient.contact`).
    definitions: HashMap<String, Definition>,
    resource_types: Vec<String>,
}

/// A type or a block: elements in definition order.
pub struct Definition {
    /// The elements.
    pub elements: Vec<Element>,
}

/// One element of a definition.
pub struct Element {
    /// Name without path and without `[x]`.
    pub name: String,
    /// True if it may repeat (`max` is not `1`).
    pub repeats: bool,
    /// True if its name ends in `[x]`.
    pub choice: bool,
    /// Type codes.
    pub types: Vec<String>,
    /// Path of the block whose definition it uses: its own, or that of its content reference.
    pub block: Option<String>,
}

/// Path, min, max, types, content reference.
type RawElement = (String, u32, String, Vec<String>, Option<String>);

#[derive(Deserialize)]
struct RawType {
    kind: String,
    r#abstract: bool,
    els: Vec<RawElement>,
}

static R4: LazyLock<Result<Model, String>> = LazyLock::new(|| {
    let packed: &[u8] = include_bytes!("r4.json.gz");
    let mut json = Vec::new();
    flate2::read::GzDecoder::new(packed).read_to_end(&mut json).map_err(|error| error.to_string())?;
    let types: HashMap<String, RawType> = serde_json::from_slice(&json).map_err(|error| error.to_string())?;
    Ok(Model::new(types))
});

impl Model {
    /// FHIR R4.
    ///
    /// # Panics
    /// Where the data that is compiled in cannot be read, which the tests rule out.
    pub fn r4() -> &'static Model {
        match &*R4 {
            Ok(model) => model,
            Err(error) => panic!("the compiled-in FHIR model cannot be read: {error}"),
        }
    }

    fn new(types: HashMap<String, RawType>) -> Model {
        let mut definitions: HashMap<String, Definition> = HashMap::new();
        let mut resource_types = Vec::new();
        for (name, raw) in types {
            if raw.kind == "resource" && !raw.r#abstract {
                resource_types.push(name.clone());
            }
            let paths: std::collections::HashSet<&str> =
                raw.els.iter().filter_map(|el| el.0.rsplit_once('.').map(|(parent, _)| parent)).collect();
            definitions.entry(name.clone()).or_insert(Definition { elements: Vec::new() });
            for (path, _, max, types, reference) in &raw.els {
                let Some((parent, last)) = path.rsplit_once('.') else { continue };
                let own_block = paths.contains(path.as_str()).then(|| path.clone());
                let element = Element {
                    name: last.trim_end_matches("[x]").to_owned(),
                    repeats: max != "1",
                    choice: last.ends_with("[x]"),
                    types: types.clone(),
                    block: own_block.or_else(|| reference.as_ref().map(|to| to.trim_start_matches('#').to_owned())),
                };
                definitions
                    .entry(parent.to_owned())
                    .or_insert(Definition { elements: Vec::new() })
                    .elements
                    .push(element);
            }
        }
        resource_types.sort_unstable();
        Model { definitions, resource_types }
    }

    /// Returns true if some element of FHIR R4 has this name; of a choice, without its type.
    pub fn is_element_name(&self, name: &str) -> bool {
        self.definitions.values().any(|definition| definition.elements.iter().any(|element| element.name == name))
    }

    /// Every concrete resource type, sorted.
    pub fn resource_types(&self) -> &[String] {
        &self.resource_types
    }

    /// Returns true if `name` is a concrete resource type.
    pub fn is_resource_type(&self, name: &str) -> bool {
        self.resource_types.binary_search_by(|known| known.as_str().cmp(name)).is_ok()
    }

    /// The definition at `path`, for a type or a block.
    pub fn definition(&self, path: &str) -> Option<&Definition> {
        self.definitions.get(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_model_is_whole() {
        let model = Model::r4();
        assert_eq!(model.resource_types().len(), 146);
        assert!(model.is_resource_type("Patient") && !model.is_resource_type("DomainResource"));
        let item = &model.definition("Questionnaire.item").unwrap().elements;
        let nested = item.iter().find(|e| e.name == "item").unwrap();
        assert_eq!(nested.block.as_deref(), Some("Questionnaire.item"));
    }
}
