//! A request for an export: the kick-off's parameters of STU 1 to 4 (Bulk Data "Kick-off Request").

use serde_json::{Value, json};
use url::Url;

use crate::export::options::{ExportOptions, ListStyle, Method, PARAMETERS};
use foundation::error::{Error, ErrorKind, Result};

/// Whose data is exported (K1).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Level {
    /// `[base]/$export`
    System,
    /// `[base]/Patient/$export`
    Patient,
    /// `[base]/Group/[id]/$export`
    Group(String),
}

/// A request for an export.
///
/// ```
/// use bulk_data_client::{ExportOptions, ExportRequest, Level};
///
/// let request = ExportRequest {
///     level: Level::Group("diabetes".into()),
///     types: vec!["Patient".into()],
///     since: None,
///     options: ExportOptions::default(),
/// };
/// let base = url::Url::parse("https://fhir.example.org/fhir/")?;
/// assert_eq!(request.url(&base)?.path(), "/fhir/Group/diabetes/$export");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct ExportRequest {
    /// Whose data.
    pub level: Level,
    /// `_type`; empty for all.
    pub types: Vec<String>,
    /// `_since`, microseconds since the epoch.
    pub since: Option<i64>,
    /// The rest.
    pub options: ExportOptions,
}

/// A parameter's values, and how FHIR types them.
struct Parameter<'a> {
    name: &'a str,
    values: Vec<String>,
    kind: &'static str,
    /// True if values may be joined by commas: a search may hold some.
    joins: bool,
}

impl ExportRequest {
    /// The kick-off's URL under `base`, without parameters.
    fn endpoint(&self, base: &Url) -> Result<Url> {
        let mut url = base.clone();
        let mut path = url
            .path_segments_mut()
            .map_err(|()| Error::new(ErrorKind::Config, "source.url cannot be a base of requests"))?;
        path.pop_if_empty();
        match &self.level {
            Level::System => {}
            Level::Patient => {
                path.push("Patient");
            }
            Level::Group(id) => {
                path.push("Group").push(id);
            }
        }
        path.push("$export");
        drop(path);
        Ok(url)
    }

    fn parameters(&self) -> Result<Vec<Parameter<'_>>> {
        let options = &self.options;
        let mut found = Vec::new();
        let mut add = |name, values: Vec<String>, kind, joins| {
            if !values.is_empty() {
                found.push(Parameter { name, values, kind, joins });
            }
        };
        add("_type", self.types.clone(), "valueString", true);
        if let Some(since) = self.since {
            let time = chrono::DateTime::from_timestamp_micros(since)
                .ok_or_else(|| Error::new(ErrorKind::Config, "since is out of range"))?;
            add("_since", vec![time.to_rfc3339_opts(chrono::SecondsFormat::AutoSi, true)], "valueInstant", false);
        }
        for parameter in PARAMETERS {
            let mut values = (parameter.values)(options);
            match parameter.name {
                // Of the types that this export is asked for: others may have one of their own.
                "_typeFilter" if !self.types.is_empty() => values.retain(|filter| {
                    let name = filter.split('?').next().unwrap_or_default();
                    self.types.iter().any(|requested| requested == name)
                }),
                "patient" => {
                    values.iter_mut().filter(|id| !id.contains('/')).for_each(|id| *id = format!("Patient/{id}"))
                }
                _ => {}
            }
            add(parameter.name, values, parameter.kind, parameter.joins);
        }
        for (name, value) in options.further() {
            add(name, vec![value.to_owned()], "valueString", false);
        }
        Ok(found)
    }

    /// The kick-off's parameters as the export log has them: values that may be joined as one text, others as a list.
    pub fn logged(&self) -> Result<Value> {
        let mut logged = serde_json::Map::new();
        for Parameter { name, mut values, joins, .. } in self.parameters()? {
            if let (Some(Value::Array(known)), false) = (logged.get_mut(name), joins) {
                known.extend(values.into_iter().map(Value::from));
                continue;
            }
            let value = match (values.len(), joins) {
                (1, _) if name != "_typeFilter" && !self.options.parameters.contains_key(name) => {
                    Value::from(values.remove(0))
                }
                (_, true) => Value::from(values.join(",")),
                (_, false) => Value::from(values),
            };
            logged.insert(name.to_owned(), value);
        }
        Ok(logged.into())
    }

    /// Returns true if the kick-off is a POST: where that is asked for, or for patients, whom a GET cannot name (K13).
    pub fn is_post(&self) -> bool {
        match self.options.method {
            Method::Auto => !self.options.patients.is_empty(),
            Method::Get => false,
            Method::Post => true,
        }
    }

    /// The URL of a GET under `base`.
    pub fn url(&self, base: &Url) -> Result<Url> {
        let mut url = self.endpoint(base)?;
        let parameters = self.parameters()?;
        if !parameters.is_empty() {
            let mut query = url::form_urlencoded::Serializer::new(String::new());
            for parameter in &parameters {
                if parameter.joins && self.options.lists == ListStyle::Comma {
                    query.append_pair(parameter.name, &parameter.values.join(","));
                } else {
                    query.extend_pairs(parameter.values.iter().map(|value| (parameter.name, value)));
                }
            }
            // A form's `+` for a space is none of a URL's; a `+` that was there is encoded.
            url.set_query(Some(&query.finish().replace('+', "%20")));
        }
        Ok(url)
    }

    /// The URL and the `Parameters` resource of a POST under `base`; every value is a parameter of its own.
    pub fn post(&self, base: &Url) -> Result<(Url, Value)> {
        let mut list = Vec::new();
        for parameter in self.parameters()? {
            for value in parameter.values {
                let value = match parameter.kind {
                    "valueReference" => json!({ "reference": value }),
                    "valueBoolean" => json!(value == "true"),
                    _ => json!(value),
                };
                list.push(json!({ "name": parameter.name, parameter.kind: value }));
            }
        }
        Ok((self.endpoint(base)?, json!({ "resourceType": "Parameters", "parameter": list })))
    }

    /// K3 to K6: what we prefer.
    pub fn prefer(&self) -> String {
        let mut prefer = "respond-async".to_owned();
        if self.options.separate_export_status {
            prefer.push_str(", separate-export-status");
        }
        if self.options.lenient {
            prefer.push_str(", handling=lenient");
        }
        prefer
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::options::OneOrMore;

    fn request(options: ExportOptions) -> ExportRequest {
        ExportRequest {
            level: Level::Group("a/b".into()),
            types: vec!["Patient".into(), "Condition".into()],
            since: Some(1_767_323_045_000_000),
            options,
        }
    }

    #[test]
    fn k1_k9_k11_kick_off_urls() {
        let base = Url::parse("https://h.example/fhir/").unwrap();
        let all = ExportRequest { level: Level::System, types: vec![], since: None, options: ExportOptions::default() };
        assert_eq!(all.url(&base).unwrap().as_str(), "https://h.example/fhir/$export");
        assert_eq!(
            request(ExportOptions::default()).url(&base).unwrap().as_str(),
            "https://h.example/fhir/Group/a%2Fb/$export?_type=Patient%2CCondition&_since=2026-01-02T03%3A04%3A05Z"
        );
    }

    #[test]
    fn k7_k10_k12_k14_k15_k18_k19_parameters_of_a_get_and_of_a_post() {
        let base = Url::parse("https://h.example/fhir/").unwrap();
        let options = ExportOptions {
            until: Some("2026-02-01T00:00:00+01:00".into()),
            elements: vec!["id".into(), "Patient.name".into()],
            type_filters: vec![
                "Patient?code=a,b&date=gt2020".into(),
                "Observation?not=asked".into(),
                "Condition?code=x y+z".into(),
            ],
            include_associated_data: vec!["LatestProvenanceResources".into()],
            organize_output_by: Some("Patient".into()),
            allow_partial_manifests: true,
            parameters: [("_x".into(), OneOrMore::One("1".into()))].into(),
            ..ExportOptions::default()
        };
        let query = |request: &ExportRequest| request.url(&base).unwrap().query().unwrap().to_owned();
        assert_eq!(
            query(&request(options.clone())),
            "_type=Patient%2CCondition&_since=2026-01-02T03%3A04%3A05Z&_until=2026-02-01T00%3A00%3A00%2B01%3A00&_elements=id%2CPatient.name\
             &_typeFilter=Patient%3Fcode%3Da%2Cb%26date%3Dgt2020&_typeFilter=Condition%3Fcode%3Dx%20y%2Bz\
             &includeAssociatedData=LatestProvenanceResources&organizeOutputBy=Patient&allowPartialManifests=true&_x=1"
        );
        let repeated = query(&request(ExportOptions { lists: ListStyle::Repeat, ..options.clone() }));
        assert!(repeated.starts_with("_type=Patient&_type=Condition&"), "{repeated}");
        let patients = ExportOptions { patients: vec!["7".into(), "Patient/8".into()], ..options };
        let request = request(patients);
        assert!(request.is_post());
        let (url, body) = request.post(&base).unwrap();
        assert_eq!(url.as_str(), "https://h.example/fhir/Group/a%2Fb/$export");
        let list = body["parameter"].as_array().unwrap();
        assert!(list.contains(&json!({"name": "_type", "valueString": "Condition"})));
        assert!(list.contains(&json!({"name": "patient", "valueReference": {"reference": "Patient/7"}})));
        assert!(list.contains(&json!({"name": "_typeFilter", "valueString": "Condition?code=x y+z"})));
        assert!(list.contains(&json!({"name": "allowPartialManifests", "valueBoolean": true})));
        assert!(list.contains(&json!({"name": "_since", "valueInstant": "2026-01-02T03:04:05Z"})));
    }

    // Breaks if a parameter is sent and the export log does not have it.
    #[test]
    fn the_export_log_has_every_parameter() {
        let options = ExportOptions {
            until: Some("2026-02-01T00:00:00Z".into()),
            elements: vec!["id".into(), "name".into()],
            type_filters: vec!["Patient?x=1".into()],
            patients: vec!["7".into()],
            include_associated_data: vec!["X".into()],
            organize_output_by: Some("Patient".into()),
            allow_partial_manifests: true,
            output_format: Some("ndjson".into()),
            parameters: [("_x".into(), OneOrMore::More(vec!["1".into(), "2".into()]))].into(),
            ..ExportOptions::default()
        };
        let request = request(options);
        let logged = request.logged().unwrap();
        for parameter in request.parameters().unwrap() {
            assert!(!logged[parameter.name].is_null(), "{}", parameter.name);
        }
        assert_eq!(logged["_type"], "Patient,Condition");
        assert_eq!((&logged["patient"], &logged["_elements"]), (&json!("Patient/7"), &json!("id,name")));
        assert_eq!((&logged["_typeFilter"], &logged["_x"]), (&json!(["Patient?x=1"]), &json!(["1", "2"])));
    }

    #[test]
    fn a_scope_is_what_narrows_and_not_how_it_is_written() {
        let options = ExportOptions { type_filters: vec!["B?x".into(), "A?y".into()], ..ExportOptions::default() };
        let turned = ExportOptions { type_filters: vec!["A?y".into(), "B?x".into()], ..ExportOptions::default() };
        assert_eq!(options.scope(), turned.scope());
        assert!(ExportOptions::default().scope().is_empty());
        // Tables keep the hash of it: written otherwise, every watermark would be lost.
        let all = ExportOptions {
            elements: vec!["id".into()],
            patients: vec!["7".into()],
            include_associated_data: vec!["X".into()],
            parameters: [("_x".into(), OneOrMore::One("1".into()))].into(),
            ..options
        };
        assert_eq!(all.scope(), "|elements=id|filters=A?y\u{1f}B?x|patients=7|with=X|_x=1");
    }
}
