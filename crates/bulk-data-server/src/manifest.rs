//! What the embedded server's exports consist of.

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
    let url = |name: &str| match (faults.sloppy_manifest, faults.signed_links) {
        (true, _) => format!("/fhir/files/{id}/{name}?expires={links}"),
        (false, true) => format!("{}/{id}/{name}?expires={links}&signature=secret", elsewhere(base)),
        (false, false) => format!("{base}/files/{id}/{name}?expires={links}"),
    };
    if job.organized {
        let parts = job.population.patients().div_ceil(per_file);
        output.extend((0..parts).map(|part| {
            let mut file = json!({"url": url(&format!("organized.{part}.ndjson"))});
            if part + 1 < parts {
                let next = format!("organized.{}.ndjson", part + 1);
                file["continuesInFile"] = if faults.sloppy_manifest { next } else { url(&next) }.into();
            }
            file
        }));
    }
    for kind in job.kinds.iter().filter(|_| !job.organized) {
        let name = DEMO_TYPES[*kind];
        for (part, first) in (0..job.population.patients()).step_by(per_file as usize).enumerate() {
            let mut count = 0u64;
            for patient in first..(first + per_file).min(job.population.patients()) {
                job.population.for_each(*kind, patient, |_, fate| {
                    let is_new = job.since.is_none_or(|since| fate.updated >= since);
                    count += u64::from(is_new && !fate.deleted);
                    deleted |= job.since.is_some() && is_new && fate.deleted;
                });
            }
            if count > 0 {
                let url = url(&format!("{name}.{part}.ndjson"));
                output.push(json!({"type": name, "url": url, "count": count + faults.count_off_by}));
            }
        }
    }
    let list = |there: bool, kind: &str, name: &str| -> Vec<Value> {
        there.then(|| json!({"type": kind, "url": url(name)})).into_iter().collect()
    };
    let deleted = list(deleted || !faults.also_deleted.is_empty(), "Bundle", "deleted.0.ndjson");
    let errors = list(!faults.errors.is_empty() || !job.ignored.is_empty(), "OperationOutcome", "errors.0.ndjson");
    let mut manifest =
        json!({ "transactionTime": job.time.to_rfc3339_opts(SecondsFormat::Millis, true), "requiresAccessToken": protected });
    if faults.page_files > 0 && job.paged {
        let pages = output.len().div_ceil(faults.page_files).max(1);
        output = output.into_iter().skip(page * faults.page_files).take(faults.page_files).collect();
        if page + 1 < pages {
            manifest["link"] = json!([{ "relation": "next", "url": format!("{base}/jobs/{id}/{}", page + 1) }]);
        }
    }
    if faults.reordered && job.links.is_multiple_of(2) {
        output.reverse();
    }
    if job.organized || faults.sloppy_manifest {
        manifest["outputOrganizedBy"] = if job.organized { "Patient" } else { "" }.into();
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
    if faults.sloppy_manifest
        && let Some(members) = manifest.as_object_mut()
    {
        members.remove("error");
        members.remove("requiresAccessToken");
    }
    manifest
}
