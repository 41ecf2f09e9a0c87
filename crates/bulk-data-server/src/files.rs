//! The embedded server's files, made as they are sent.

use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use bytes::Bytes;
use serde_json::json;

use crate::faults::Faults;
use crate::manifest::elsewhere as elsewhere_of;
use crate::population::DEMO_TYPES;
use crate::server::{Job, Shared, Shop, outcome, refuse};
use flow::locked;

/// Bytes of a file are made and sent in pieces of about this size.
const PIECE: usize = 256 * 1024;

/// What a link says behind its question mark.
#[derive(serde::Deserialize)]
pub(crate) struct Signed {
    /// Which links it is one of: each manifest gives out new ones.
    #[serde(default)]
    expires: usize,
}

/// A file, or where it is.
pub(crate) async fn file(
    shop: Shop,
    Path((id, name)): Path<(usize, String)>,
    Query(signed): Query<Signed>,
    headers: HeaderMap,
) -> Response {
    let links = signed.expires;
    let State((world, base)) = &shop;
    {
        let mut world = locked(world);
        world.seen.accepts("file", &headers);
        if let Some(refusal) = refuse(&world, &headers) {
            return refusal;
        }
        if world.faults.redirect {
            let to = format!("{}/{id}/{name}?expires={links}&signature=secret", elsewhere_of(base));
            return (StatusCode::TEMPORARY_REDIRECT, [("location", to)]).into_response();
        }
    }
    send_file(shop, (id, links), &name, &headers)
}

/// What an Attachment links to: `Binary/100` has a hundred bytes, others are not there.
pub(crate) async fn binary(State((world, _)): Shop, Path(id): Path<String>, headers: HeaderMap) -> Response {
    let mut world = locked(&world);
    if let Some(refusal) = refuse(&world, &headers) {
        return refusal;
    }
    world.seen.binaries.push(id.clone());
    let Ok(size) = id.parse::<usize>() else { return outcome(StatusCode::NOT_FOUND, "not-found", "no such Binary") };
    let content = match world.faults.binary.is_empty() {
        true => vec![b'x'; size.min(1 << 26)],
        false => world.faults.binary.clone(),
    };
    if world.faults.binaries_as_fhir {
        let data = base64::engine::general_purpose::STANDARD.encode(content);
        let binary = json!({"resourceType": "Binary", "id": id, "contentType": "text/plain", "data": data});
        return ([("content-type", "application/fhir+json")], binary.to_string()).into_response();
    }
    if world.faults.gzip {
        use std::io::Write;
        let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        // Writing into memory does not fail.
        let _ = packer.write_all(&content);
        let packed = packer.finish().unwrap_or_default();
        return ([("content-type", "text/plain"), ("content-encoding", "gzip")], packed).into_response();
    }
    ([("content-type", "text/plain")], content).into_response()
}

/// The files' other origin: it takes no token beside the signature in its links.
pub(crate) async fn elsewhere(
    shop: Shop,
    Path((id, name)): Path<(usize, String)>,
    Query(signed): Query<Signed>,
    headers: HeaderMap,
) -> Response {
    let links = signed.expires;
    if headers.contains_key("authorization") {
        locked(&shop.0.0).seen.leaked += 1;
        let body = "<Error><Code>InvalidArgument</Code><Message>Only one auth mechanism allowed</Message></Error>";
        return (StatusCode::BAD_REQUEST, [("content-type", "application/xml")], body).into_response();
    }
    send_file(shop, (id, links), &name, &headers)
}

/// Counts a file while it is sent.
struct Sending(Shared);

impl Drop for Sending {
    fn drop(&mut self) {
        locked(&self.0).sending -= 1;
    }
}

fn send_file(State((shared, _)): Shop, (id, links): (usize, usize), name: &str, headers: &HeaderMap) -> Response {
    let (job, faults, per_file, cut, sending) = {
        let mut world = locked(&shared);
        world.seen.files.push(name.to_owned());
        world.seen.jobs.push(id);
        let Some(Some(job)) = world.jobs.get(id).cloned() else {
            return outcome(StatusCode::NOT_FOUND, "not-found", "no such export");
        };
        if world.faults.links_end && links < 2 {
            return (StatusCode::FORBIDDEN, [("content-type", "application/xml")], "<Error>Request has expired</Error>")
                .into_response();
        }
        if world.faults.files_unavailable > 0 {
            world.faults.files_unavailable -= 1;
            return (StatusCode::SERVICE_UNAVAILABLE, "try again").into_response();
        }
        let cut = world.faults.files_cut > 0;
        world.faults.files_cut = world.faults.files_cut.saturating_sub(1);
        world.sending += 1;
        world.seen.at_once = world.seen.at_once.max(world.sending);
        (job, world.faults.clone(), world.patients_per_file, cut, Sending(shared.clone()))
    };
    let mut parts = name.split('.');
    let (kind, part) = (parts.next().unwrap_or_default().to_owned(), parts.next().and_then(|part| part.parse::<u32>().ok()));
    let missing = faults.missing_type.as_deref() == Some(kind.as_str()) || Faults::names(&faults.missing_files, name);
    let hangs = Faults::names(&faults.hanging_files, name);
    let Some(part) = part.filter(|_| !missing) else {
        return outcome(StatusCode::NOT_FOUND, "not-found", "no such file");
    };
    let tag = format!("\"{id}-{name}\"");
    let range =
        headers.get("range").and_then(|range| range.to_str().ok()?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    let same = headers.get("if-range").is_none_or(|wanted| wanted.as_bytes() == tag.as_bytes());
    let from: Option<usize> = range.filter(|_| faults.ranges && same);
    if from.is_some() {
        locked(&shared).seen.ranges += 1;
    }
    let (pieces, body) = tokio::sync::mpsc::channel::<std::io::Result<Bytes>>(4);
    let (gzip, ranges) = (faults.gzip, faults.ranges);
    let work = async move {
        let writer = FileWriter { _sending: sending, job, faults, pieces, cut, hangs, skip: from.unwrap_or(0), packer: None };
        writer.write(&kind, part, per_file).await;
    };
    // The task ends by itself when the client goes away: its channel closes.
    flow::detach_response(work);
    let stream = futures::stream::unfold(body, |mut body| async move { body.recv().await.map(|piece| (piece, body)) });
    let mut answer = Response::new(Body::from_stream(stream));
    let mut set = |name: &'static str, value: &str| {
        if let Ok(value) = HeaderValue::from_str(value) {
            answer.headers_mut().insert(name, value);
        }
    };
    set("content-type", "application/fhir+ndjson");
    if ranges {
        set("etag", &tag);
    }
    if let Some(from) = from {
        set("content-range", &format!("bytes {from}-/*"));
    }
    if gzip {
        set("content-encoding", "gzip");
    }
    if from.is_some() {
        *answer.status_mut() = StatusCode::PARTIAL_CONTENT;
    }
    answer
}

struct FileWriter {
    /// Goes before the pieces' sender does: whoever sees the file's end, and asks for the next, finds it sent.
    _sending: Sending,
    job: Job,
    faults: Faults,
    pieces: tokio::sync::mpsc::Sender<std::io::Result<Bytes>>,
    cut: bool,
    hangs: bool,
    /// Bytes that the client has.
    skip: usize,
    packer: Option<flate2::write::GzEncoder<Vec<u8>>>,
}

impl FileWriter {
    async fn write(mut self, name: &str, part: u32, per_file: u32) {
        if self.faults.gzip {
            self.packer = Some(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
        }
        if let Some(junk) = self.faults.junk.get(name).cloned()
            && !self.send(&junk).await
        {
            return;
        }
        let population = self.job.population.clone();
        let (first, since) = (part * per_file, self.job.since);
        let patients = first..(first + per_file).min(population.patients());
        let mut text = String::with_capacity(PIECE + 8192);
        if name == "errors" {
            text.push_str(&String::from_utf8_lossy(&self.faults.errors));
            for name in &self.job.ignored {
                let issue = json!({"severity": "warning", "code": "not-supported", "diagnostics": format!("{name} was ignored")});
                text.push_str(&format!("{}\n", json!({"resourceType": "OperationOutcome", "issue": [issue]})));
            }
        } else if name == "deleted" {
            for id in &self.faults.also_deleted {
                text.push_str(&deletion(id));
            }
            for kind in self.job.kinds.clone() {
                for patient in 0..population.patients() {
                    population.for_each(kind, patient, |number, fate| {
                        if fate.deleted && since.is_some_and(|since| fate.updated >= since) {
                            text.push_str(&deletion(&format!("{}/{}", DEMO_TYPES[kind], population.id(kind, patient, number))));
                        }
                    });
                }
            }
        } else if name == "organized" {
            // A patient's block: a header, and what is of the patient. The last patient's goes on in the next file.
            let kinds = self.job.kinds.clone();
            let (first_half, second_half) = kinds.split_at(kinds.len() / 2);
            let last = patients.end == population.patients();
            let block = |patient: u32, kinds: &[usize], text: &mut String| {
                let parameter = json!([{"name": "Patient", "valueReference": {"reference": format!("Patient/{patient}")}}]);
                text.push_str(&format!("{}\n", json!({"resourceType": "Parameters", "parameter": parameter})));
                for kind in kinds {
                    population.for_each(*kind, patient, |number, fate| {
                        if !fate.deleted && since.is_none_or(|since| fate.updated >= since) {
                            population.write(*kind, patient, number, fate, text);
                        }
                    });
                }
            };
            if let Some(before) = patients.start.checked_sub(1) {
                block(before, second_half, &mut text);
            }
            for patient in patients.clone() {
                let goes_on = patient + 1 == patients.end && !last;
                block(patient, if goes_on { first_half } else { &kinds }, &mut text);
            }
        } else if let Some(kind) = DEMO_TYPES.iter().position(|known| *known == name) {
            for patient in patients {
                population.for_each(kind, patient, |number, fate| {
                    if !fate.deleted && since.is_none_or(|since| fate.updated >= since) {
                        population.write(kind, patient, number, fate, &mut text);
                    }
                });
                if text.len() >= PIECE {
                    if !self.send(text.as_bytes()).await {
                        return;
                    }
                    text.clear();
                }
            }
        }
        if !self.send(text.as_bytes()).await {
            return;
        }
        if let Some(packer) = self.packer.take()
            && let Ok(rest) = packer.finish()
        {
            // The client may be gone; there is nobody to tell.
            let _ = self.pieces.send(Ok(rest.into())).await;
        }
    }

    /// Whether to go on.
    async fn send(&mut self, bytes: &[u8]) -> bool {
        use std::io::Write;
        let bytes = match &mut self.packer {
            Some(packer) => {
                let _ = packer.write_all(bytes);
                std::mem::take(packer.get_mut())
            }
            None => bytes.to_vec(),
        };
        if let Some(pause) = self.faults.slow {
            tokio::time::sleep(pause).await;
        }
        let skipped = self.skip.min(bytes.len());
        self.skip -= skipped;
        let mut bytes = Bytes::from(bytes).slice(skipped..);
        if bytes.is_empty() {
            return true;
        }
        if self.cut && bytes.len() > 1 {
            bytes.truncate(bytes.len() / 2);
            let _ = self.pieces.send(Ok(bytes)).await;
            // Long enough for what was sent to be on its way.
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            let _ = self.pieces.send(Err(std::io::Error::other("cut"))).await;
            return false;
        }
        if self.hangs {
            bytes.truncate(bytes.len() / 2);
            let _ = self.pieces.send(Ok(bytes)).await;
            self.pieces.closed().await;
            return false;
        }
        self.pieces.send(Ok(bytes)).await.is_ok()
    }
}

fn deletion(id: &str) -> String {
    let bundle = json!({
        "resourceType": "Bundle", "type": "transaction",
        "entry": [{"request": {"method": "DELETE", "url": id}}]
    });
    format!("{bundle}\n")
}
