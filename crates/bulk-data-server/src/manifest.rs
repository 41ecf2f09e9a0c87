//! Manifests of the embedded server.

use chrono::SecondsFormat;
use serde_json::{Value, json};

use crate::faults::Faults;
use crate::population::DEMO_TYPES;
use crate::server::Job;

/// Another name of the same host is another origin: where files are that need no token.
pub(crate) fn elsewhere(base: &str) -> String {
    base.replace("127.0.0.1", "localhost").replace("/fhir", "/elsewhere")
}

/// The manifest of a job, or a page of it.
pub(crate) fn manifest(
    job: &Job,
    faults: &Faults,
    per_file: u32,
    base: &str,
    (id, page): (usize, usize),
    protected: bool,
) -> Value {
    let (mut output, mut deleted) = (Vec::new(), false);
    let links = job.links;
    let url = |name: &str| match faults.signed_links {
        true => format!("{}/{id}/{name}?expires={links}&signature=secret", elsewhere(base)),
        false => format!("{base}/files/{id}/{name}?expires={links}"),
    };
    if job.organized {
        let parts = job.population.patients().div_ceil(per_file);
        output.extend((0..parts).map(|part| {
            let mut file = json!({"url": url(&format!("organized.{part}.ndjson"))});
            if part + 1 < parts {
                file["continuesInFile"] = url(&format!("organized.{}.ndjson", part + 1)).into();
            }
            file
        }));
    }
    for kind in job.kinds.iter().filter(|_| !job.organized) {
        let name = DEMO_TYPES[*kind];
        for (part, first) in (0..job.population.patients()).step_by(per_file as usize).enumerate() {
            let mut count = 0u64;
            for patient in first..(first + per_file).min(job.population.patients()) {
                job.population.for_each(*kind, patient, |_, state| {
                    let is_new = job.since.is_none_or(|since| state.updated >= since);
                    count += u64::from(is_new && !state.deleted);
                    deleted |= job.since.is_some() && is_new && state.deleted;
                });
            }
            if count > 0 {
                let url = url(&format!("{name}.{part}.ndjson"));
                output.push(json!({"type": name, "url": url, "count": count}));
            }
        }
    }
    let list = |there: bool, kind: &str, name: &str| -> Vec<Value> {
        there.then(|| json!({"type": kind, "url": url(name)})).into_iter().collect()
    };
    let deleted = list(deleted || !faults.also_deleted.is_empty(), "Bundle", "deleted.0.ndjson");
    let errors = list(!faults.errors.is_empty() || !job.ignored.is_empty(), "OperationOutcome", "errors.0.ndjson");
    let mut manifest = json!({ "transactionTime": job.time.to_rfc3339_opts(SecondsFormat::Millis, true),
        "requiresAccessToken": protected });
    if faults.page_files > 0 && job.paged {
        let pages = output.len().div_ceil(faults.page_files).max(1);
        output = output.into_iter().skip(page * faults.page_files).take(faults.page_files).collect();
        if page + 1 < pages {
            manifest["link"] = json!([{ "relation": "next", "url": format!("{base}/jobs/{id}/{}", page + 1) }]);
        }
    }
    if job.organized {
        manifest["outputOrganizedBy"] = "Patient".into();
    }
    let last = manifest.get("link").is_none();
    manifest["output"] = output.into();
    manifest["deleted"] = if last { deleted.into() } else { json!([]) };
    let errors = if last { Value::from(errors) } else { json!([]) };
    if faults.stu4 {
        manifest["outcome"] = errors;
        manifest["manifestType"] = "complete".into();
    } else {
        manifest["request"] = format!("{base}/$export").into();
        manifest["error"] = errors;
    }
    manifest
}

/// Distorts a manifest as the faults say.
pub(crate) fn distort(manifest: &mut Value, faults: &Faults) {
    let organized = manifest.get("outputOrganizedBy").is_some();
    if let Some(output) = manifest.get_mut("output").and_then(Value::as_array_mut) {
        for count in output.iter_mut().filter_map(|file| file.get_mut("count")) {
            *count = (count.as_u64().unwrap_or(0) + faults.count_off_by).into();
        }
        // Each time the manifest is asked for, its links have another number.
        let number = output
            .first()
            .and_then(|file| file["url"].as_str()?.split("expires=").nth(1)?.split('&').next()?.parse().ok());
        if faults.reordered && number.is_some_and(|number: usize| number.is_multiple_of(2)) {
            output.reverse();
        }
    }
    if !faults.sloppy_manifest {
        return;
    }
    for list in ["output", "deleted", "error", "outcome"] {
        for file in manifest.get_mut(list).and_then(Value::as_array_mut).into_iter().flatten() {
            // A relative link, and for the next file its name alone.
            let path = |url: &Value| Some(url::Url::parse(url.as_str()?).ok()?[url::Position::BeforePath..].to_owned());
            if let Some(relative) = path(&file["url"]) {
                file["url"] = relative.into();
            }
            if let Some(next) = path(&file["continuesInFile"]) {
                let name = next.rsplit('/').next().unwrap_or_default();
                file["continuesInFile"] = name.split('?').next().unwrap_or_default().into();
            }
        }
    }
    if let Some(members) = manifest.as_object_mut() {
        members.remove("error");
        members.remove("requiresAccessToken");
        if !organized {
            members.insert("outputOrganizedBy".to_owned(), "".into());
        }
    }
}
