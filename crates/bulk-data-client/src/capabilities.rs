//! A server's own description (T15, "Server Capability Documentation"): its CapabilityStatement, read for what an
//! export needs. Servers say less than they can, so what is missing is remarked on, and refuses nothing.

use serde_json::Value;

use crate::export::options::ExportOptions;
use crate::export::request::Level;

/// A server's CapabilityStatement.
#[derive(Debug, Clone)]
pub struct Capabilities {
    statement: Value,
}

fn list<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value.get(key).and_then(Value::as_array).into_iter().flatten()
}

fn text<'a>(value: &'a Value, key: &str) -> &'a str {
    value.get(key).and_then(Value::as_str).unwrap_or_default()
}

impl Capabilities {
    /// A statement as it came.
    pub fn new(statement: Value) -> Self {
        Self { statement }
    }

    /// Returns true if it is one of FHIR, by its own words; its software's name and version where it tells.
    pub fn software(&self) -> Option<String> {
        let software = self.statement.get("software")?;
        Some(format!("{} {}", text(software, "name"), text(software, "version")).trim().to_owned())
    }

    /// Returns, in words, parts of a pipeline's request that the statement does not name.
    pub fn remarks(&self, level: &Level, options: &ExportOptions) -> Vec<String> {
        if text(&self.statement, "resourceType") != "CapabilityStatement" {
            return vec!["its metadata is not a CapabilityStatement".to_owned()];
        }
        let mut remarks = Vec::new();
        let version = text(&self.statement, "fhirVersion");
        if !version.is_empty() && !version.starts_with("4.0") {
            remarks.push(format!("it speaks FHIR {version}, and the tables are of R4 (4.0)"));
        }
        if !self.exports(level) {
            remarks.push("its CapabilityStatement does not name $export at this level".to_owned());
        }
        for filter in &options.type_filters {
            let (name, query) = filter.split_once('?').unwrap_or((filter, ""));
            let Some(known) = self.search_parameters(name) else { continue };
            for parameter in query.split('&').map(|part| part.split(['=', ':', '.']).next().unwrap_or_default()) {
                if !parameter.starts_with('_') && !known.contains(&parameter) {
                    remarks.push(format!(
                        "its CapabilityStatement does not name the search parameter {parameter} of {name}"
                    ));
                }
            }
        }
        remarks
    }

    fn exports(&self, level: &Level) -> bool {
        let names = |holder: &Value| {
            list(holder, "operation").any(|operation| {
                let name = text(operation, "name").trim_start_matches('$');
                name.ends_with("export") || text(operation, "definition").contains("export")
            })
        };
        let of_bulk_data =
            list(&self.statement, "instantiates").filter_map(Value::as_str).any(|url| url.contains("bulkdata"));
        let own = match level {
            Level::System => "",
            Level::Patient => "Patient",
            Level::Group(_) => "Group",
        };
        let mut rests = list(&self.statement, "rest");
        of_bulk_data
            || rests.any(|rest| {
                names(rest) || list(rest, "resource").any(|resource| text(resource, "type") == own && names(resource))
            })
    }

    /// Search parameters that a type has; `None` where the statement names none.
    fn search_parameters(&self, resource_type: &str) -> Option<Vec<&str>> {
        let resources = list(&self.statement, "rest").flat_map(|rest| list(rest, "resource"));
        let mut of_type = resources.filter(|resource| text(resource, "type") == resource_type);
        let named: Vec<&str> = list(of_type.next()?, "searchParam").map(|parameter| text(parameter, "name")).collect();
        Some(named).filter(|named| !named.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn t15_what_a_statement_does_not_name_is_remarked_on() {
        let statement = json!({"resourceType": "CapabilityStatement", "fhirVersion": "4.0.1",
            "rest": [{"mode": "server",
            "resource": [{"type": "Group", "operation": [{"name": "export", "definition": "x"}]},
                         {"type": "Observation", "searchParam": [{"name": "code"}]}, {"type": "Patient"}]}]});
        let capabilities = Capabilities::new(statement);
        let group = Level::Group("g".into());
        let filters = |filter: &str| ExportOptions { type_filters: vec![filter.into()], ..ExportOptions::default() };
        assert!(capabilities.remarks(&group, &filters("Observation?code:in=x&_lastUpdated=gt2020")).is_empty());
        assert!(capabilities.remarks(&group, &filters("Patient?anything=x")).is_empty(), "it says nothing of Patient");
        assert!(
            capabilities.remarks(&group, &filters("Observation?kode=x"))[0]
                .contains("search parameter kode of Observation")
        );
        assert!(capabilities.remarks(&Level::System, &ExportOptions::default())[0].contains("$export"));
        let other = Capabilities::new(json!({"resourceType": "CapabilityStatement", "fhirVersion": "5.0.0",
            "instantiates": ["http://hl7.org/fhir/uv/bulkdata/CapabilityStatement/bulk-data"]}));
        assert_eq!(
            other.remarks(&Level::System, &ExportOptions::default()),
            ["it speaks FHIR 5.0.0, and the tables are of R4 (4.0)"]
        );
        assert_eq!(Capabilities::new(json!([])).remarks(&group, &ExportOptions::default()).len(), 1);
    }
}
