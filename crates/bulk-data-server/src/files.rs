//! The embedded server's files, made as they are sent.

use axum::body::Body;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use bytes::Bytes;
use serde_json::json;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;

use crate::faults::Faults;
use crate::population::DEMO_TYPES;
use crate::server::{Job, Shared, Shop, outcome};

/// Bytes of a file are made and sent in pieces of about this size.
const PIECE: usize = 256 * 1024;

/// Sends a file.
pub(crate) async fn file(shop: Shop, Path((id, name)): Path<(usize, String)>, headers: HeaderMap) -> Response {
    send_file(shop, id, &name, &headers)
}

/// Sends the content that an Attachment links to: `Binary/100` has a hundred bytes, others are not there.
pub(crate) async fn binary(State((world, _)): Shop, Path(id): Path<String>) -> Response {
    let mut world = world.lock();
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

/// Sends a file from the other origin, which takes no token beside the signature in its links.
pub(crate) async fn elsewhere(shop: Shop, Path((id, name)): Path<(usize, String)>, headers: HeaderMap) -> Response {
    if headers.contains_key("authorization") {
        let body = "<Error><Code>InvalidArgument</Code><Message>Only one auth mechanism allowed</Message></Error>";
        return (StatusCode::BAD_REQUEST, [("content-type", "application/xml")], body).into_response();
    }
    send_file(shop, id, &name, &headers)
}

/// Counts a file while it is sent.
struct Sending(Shared);

impl Drop for Sending {
    fn drop(&mut self) {
        self.0.lock().sending -= 1;
    }
}

fn send_file(State((shared, _)): Shop, id: usize, name: &str, headers: &HeaderMap) -> Response {
    let (job, faults, per_file, sending) = {
        let mut world = shared.lock();
        world.seen.requested(id, name);
        let Some(Some(job)) = world.jobs.get(id).cloned() else {
            return outcome(StatusCode::NOT_FOUND, "not-found", "no such export");
        };
        world.sending += 1;
        world.seen.at_once = world.seen.at_once.max(world.sending);
        (job, world.faults.clone(), world.patients_per_file, Sending(shared.clone()))
    };
    let mut parts = name.split('.');
    let (kind, part) =
        (parts.next().unwrap_or_default().to_owned(), parts.next().and_then(|part| part.parse::<u32>().ok()));
    let Some(part) = part else {
        return outcome(StatusCode::NOT_FOUND, "not-found", "no such file");
    };
    let tag = format!("\"{id}-{name}\"");
    let range = headers
        .get("range")
        .and_then(|range| range.to_str().ok()?.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
    let same = headers.get("if-range").is_none_or(|wanted| wanted.as_bytes() == tag.as_bytes());
    let from: Option<usize> = range.filter(|_| faults.ranges && same);
    if from.is_some() {
        shared.lock().seen.ranges += 1;
    }
    let (pieces, body) = tokio::sync::mpsc::channel::<std::io::Result<Bytes>>(4);
    let (gzip, ranges) = (faults.gzip, faults.ranges);
    let work = async move {
        let writer = FileWriter { job, faults, pieces, skip: from.unwrap_or(0), packer: None };
        writer.write(&kind, part, per_file).await;
    };
    // The task ends by itself when the client goes away: its channel closes.
    flow::detach_response(work);
    // Counted until the client has its end, and not only until it is written.
    let sent = futures::stream::unfold((ReceiverStream::new(body), sending), |(mut body, sending)| async move {
        body.next().await.map(|piece| (piece, (body, sending)))
    });
    let mut answer = Response::new(Body::from_stream(sent));
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
    job: Job,
    faults: Faults,
    pieces: tokio::sync::mpsc::Sender<std::io::Result<Bytes>>,
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
                let issue = json!({"severity": "warning", "code": "not-supported", "diagnostics": format!("{name} was \
                    ignored")});
                text.push_str(&format!("{}\n", json!({"resourceType": "OperationOutcome", "issue": [issue]})));
            }
        } else if name == "deleted" {
            for id in &self.faults.also_deleted {
                text.push_str(&deletion(id));
            }
            for kind in self.job.kinds.clone() {
                for patient in 0..population.patients() {
                    population.for_each(kind, patient, |number, state| {
                        if state.deleted && since.is_some_and(|since| state.updated >= since) {
                            text.push_str(&deletion(&format!(
                                "{}/{}",
                                DEMO_TYPES[kind],
                                population.id(kind, patient, number)
                            )));
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
                let parameter =
                    json!([{"name": "Patient", "valueReference": {"reference": format!("Patient/{patient}")}}]);
                text.push_str(&format!("{}\n", json!({"resourceType": "Parameters", "parameter": parameter})));
                for kind in kinds {
                    population.for_each(*kind, patient, |number, state| {
                        if !state.deleted && since.is_none_or(|since| state.updated >= since) {
                            population.write(*kind, patient, number, state, text);
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
                population.for_each(kind, patient, |number, state| {
                    if !state.deleted && since.is_none_or(|since| state.updated >= since) {
                        population.write(kind, patient, number, state, &mut text);
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

    /// Returns false if the client is gone.
    async fn send(&mut self, bytes: &[u8]) -> bool {
        use std::io::Write;
        let bytes = match &mut self.packer {
            Some(packer) => {
                let _ = packer.write_all(bytes);
                std::mem::take(packer.get_mut())
            }
            None => bytes.to_vec(),
        };
        let skipped = self.skip.min(bytes.len());
        self.skip -= skipped;
        let bytes = Bytes::from(bytes).slice(skipped..);
        if bytes.is_empty() {
            return true;
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
