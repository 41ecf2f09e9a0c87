//! Bytes → chunks of whole lines, and bytes that come a second time.

use std::sync::Arc;

use bytes::Bytes;
use tokio::runtime::Handle;
use tokio::sync::OwnedSemaphorePermit;
use twox_hash::XxHash3_128;

use super::{Broken, Download};
use crate::error::{Error, ErrorKind};
use crate::messages::{Chunk, ExportFile};

/// Bytes of a line that is too long that are kept for the quarantine.
const KEPT_OF_OVERSIZED: usize = 64 * 1024;
/// From here on a line is long: of those, one is gathered at a time, whatever the number of downloads.
const LONG: usize = 4 << 20;
/// A line that is so many times too long has no end.
const NO_END: u64 = 16;

/// Line end of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum LineEnds {
    /// No line has ended yet.
    Unknown,
    /// LF, or CR and LF.
    Lf,
    /// CR alone, or mixed with others.
    Cr,
}

/// Makes an LF of each CR between two objects: JSON has none there, so the line is two, whatever ends the others.
fn part_at_carriage_returns(chunk: &mut [u8]) {
    let is_between = |at: usize| {
        let (before, behind) = (chunk[..at].trim_ascii_end(), chunk[at + 1..].trim_ascii_start());
        chunk.get(at + 1).is_some_and(|next| *next != b'\n') && before.ends_with(b"}") && behind.starts_with(b"{")
    };
    let ends: Vec<usize> = memchr::memchr_iter(b'\r', chunk).filter(|at| is_between(*at)).collect();
    ends.into_iter().for_each(|at| chunk[at] = b'\n');
}

/// A hash of bytes that come in pieces of any size.
#[derive(Debug, Default)]
struct RunningHash {
    blocks: u128,
    rest: Vec<u8>,
}

impl RunningHash {
    const BLOCK: usize = 64 * 1024;

    fn add(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let take = (Self::BLOCK - self.rest.len()).min(bytes.len());
            self.rest.extend_from_slice(&bytes[..take]);
            bytes = &bytes[take..];
            if self.rest.len() == Self::BLOCK {
                self.blocks = self.with_rest();
                self.rest.clear();
            }
        }
    }

    fn with_rest(&self) -> u128 {
        XxHash3_128::oneshot_with_seed(self.blocks as u64 ^ (self.blocks >> 64) as u64, &self.rest)
    }
}

/// Cuts bytes into chunks of whole lines and sends them on.
pub(super) struct Lines<'a> {
    stage: &'a Download,
    handle: &'a Handle,
    file: Arc<ExportFile>,
    buffer: Vec<u8>,
    /// Bytes of the buffer that are known to have no line end: a line of 200 MB is not to be searched at every piece of
    /// it.
    searched: usize,
    /// Line end; where it is CR, each becomes LF in the buffer.
    ends: LineEnds,
    /// Bytes of the buffer that were looked at for it.
    looked: usize,
    /// Lines sent.
    pub lines: u64,
    /// Bytes before the buffer.
    offset: u64,
    /// Hash of every byte that was passed on, to know it again.
    passed: RunningHash,
    /// Bytes that were read before the file broke off, and their hash; and how far they were met again.
    known: Option<(u64, u128, RunningHash, u64)>,
    /// Bytes of the file that were read.
    pub read: u64,
    /// Length so far of a line that is too long, while it lasts.
    oversized: Option<u64>,
    began: bool,
    /// Held while a long line is gathered.
    long: Option<OwnedSemaphorePermit>,
}

impl<'a> Lines<'a> {
    pub(crate) fn new(stage: &'a Download, handle: &'a Handle, file: Arc<ExportFile>) -> Self {
        Self {
            stage,
            handle,
            file,
            buffer: Vec::new(),
            searched: 0,
            ends: LineEnds::Unknown,
            looked: 0,
            lines: 0,
            offset: 0,
            passed: RunningHash::default(),
            known: None,
            read: 0,
            oversized: None,
            began: false,
            long: None,
        }
    }

    /// The file broke off: while it waits for its next try, another's long line may be gathered.
    pub(crate) fn pause(&mut self) {
        self.long = None;
    }

    /// The file is read from its start again, or for the first time.
    pub(crate) fn again(&mut self) {
        if self.read > 0 {
            self.known = Some((self.read, self.passed.with_rest(), RunningHash::default(), 0));
        }
    }

    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<(), Broken> {
        let mut bytes = bytes;
        if let Some((length, hash, again, met)) = &mut self.known {
            let take = usize::try_from(*length - *met).unwrap_or(usize::MAX).min(bytes.len());
            again.add(&bytes[..take]);
            *met += take as u64;
            bytes = &bytes[take..];
            if *met < *length {
                return Ok(());
            }
            if again.with_rest() != *hash {
                let error = Error::new(
                    ErrorKind::Server,
                    "the file changed while it was read again; its rows cannot be trusted",
                );
                return Err(Broken::Never(error));
            }
            self.known = None;
        }
        if bytes.is_empty() {
            return Ok(());
        }
        self.passed.add(bytes);
        self.read += bytes.len() as u64;
        if self.read > self.stage.settings.max_file.0 {
            let why =
                format!("the file has more than stages.download.max_file ({} bytes)", self.stage.settings.max_file.0);
            return Err(Broken::Never(Error::new(ErrorKind::Data, why)));
        }
        let chunk_bytes = self.stage.settings.chunk.bytes();
        while !bytes.is_empty() {
            if self.oversized.is_some() {
                bytes = self.skip(bytes)?;
                continue;
            }
            if self.buffer.len() >= LONG.max(chunk_bytes) && self.long.is_none() {
                let permit = self.stage.long_lines.clone().acquire_owned();
                // Never closed.
                self.long = self.handle.block_on(self.stage.stop.or(permit)).ok_or(Broken::Stopped)?.ok();
            }
            let room = chunk_bytes.saturating_sub(self.buffer.len()).max(64 * 1024).min(bytes.len());
            self.buffer.extend_from_slice(&bytes[..room]);
            bytes = &bytes[room..];
            if !self.began && self.buffer.len() >= 3 {
                self.began = true;
                if self.buffer.starts_with(b"\xef\xbb\xbf") {
                    self.buffer.drain(..3);
                    self.offset = 3;
                }
            }
            self.unify_line_ends();
            if self.buffer.len() >= chunk_bytes {
                let end = memchr::memrchr(b'\n', &self.buffer[self.searched..]).map(|at| self.searched + at + 1);
                self.searched = self.buffer.len() - end.unwrap_or(0);
                match end {
                    Some(end) => self.send(end)?,
                    None if self.buffer.len() > self.stage.max_line => self.begin_oversized(),
                    None => {}
                }
            }
        }
        Ok(())
    }

    /// Finds out how the file's lines end, and makes each CR of one that ends them so an LF. A CR between two values of
    /// a line that ends with LF is white space.
    fn unify_line_ends(&mut self) {
        while self.ends == LineEnds::Unknown {
            let Some(at) = memchr::memchr2(b'\r', b'\n', &self.buffer[self.looked..]).map(|at| self.looked + at) else {
                self.looked = self.buffer.len();
                return;
            };
            let (before, behind) = (self.buffer[..at].trim_ascii_end(), self.buffer[at + 1..].trim_ascii_start());
            if self.buffer[at] == b'\n' {
                if before.is_empty() {
                    self.looked = at + 1;
                } else {
                    self.ends = LineEnds::Lf;
                }
            } else if behind.is_empty() {
                // What follows is still to come.
                self.looked = at;
                return;
            } else if self.buffer[at + 1] == b'\n' || !before.ends_with(b"}") || !behind.starts_with(b"{") {
                self.looked = at + 1;
            } else {
                self.ends = LineEnds::Cr;
                self.looked = 0;
            }
        }
        if self.ends == LineEnds::Cr {
            for byte in &mut self.buffer[self.looked..] {
                if *byte == b'\r' {
                    *byte = b'\n';
                }
            }
            self.looked = self.buffer.len();
        }
    }

    /// Sends the first `end` bytes of the buffer: whole lines. A line within them may be too long by itself.
    fn send(&mut self, end: usize) -> Result<(), Broken> {
        let rest = self.buffer.split_off(end);
        let mut chunk = std::mem::replace(&mut self.buffer, rest);
        self.looked = self.looked.saturating_sub(end);
        self.buffer.reserve(self.stage.settings.chunk.bytes().saturating_sub(self.buffer.len()));
        if chunk.is_empty() {
            return Ok(());
        }
        part_at_carriage_returns(&mut chunk);
        let lines = memchr::memchr_iter(b'\n', &chunk).count() as u64 + u64::from(chunk.last() != Some(&b'\n'));
        let length = chunk.len() as u64;
        chunk.shrink_to_fit();
        self.pass_on(Bytes::from(chunk), lines, None)?;
        self.long = None;
        self.offset += length;
        Ok(())
    }

    fn pass_on(&mut self, bytes: Bytes, lines: u64, oversized: Option<u64>) -> Result<(), Broken> {
        let chunk =
            Chunk { file: self.file.clone(), first_line: self.lines + 1, offset: self.offset, bytes, oversized };
        self.lines += lines;
        self.handle.block_on(self.stage.chunks.send(chunk)).map_err(|_| Broken::Stopped)
    }

    fn send_oversized(&mut self, line: &[u8], length: u64) -> Result<(), Broken> {
        let kept = Bytes::copy_from_slice(&line[..line.len().min(KEPT_OF_OVERSIZED)]);
        self.pass_on(kept, 1, Some(length))
    }

    /// The buffer is the beginning of a line that is too long: its beginning is kept, the rest passed over.
    fn begin_oversized(&mut self) {
        self.oversized = Some(self.buffer.len() as u64);
        (self.searched, self.looked) = (0, 0);
        self.long = None;
        self.buffer.truncate(KEPT_OF_OVERSIZED);
        self.buffer.shrink_to_fit();
    }

    fn skip<'b>(&mut self, bytes: &'b [u8]) -> Result<&'b [u8], Broken> {
        let end = match self.ends {
            LineEnds::Lf => memchr::memchr(b'\n', bytes),
            LineEnds::Cr | LineEnds::Unknown => memchr::memchr2(b'\r', b'\n', bytes),
        };
        let length = self.oversized.unwrap_or(0) + end.unwrap_or(bytes.len()) as u64;
        let Some(end) = end else {
            if length > (self.stage.max_line as u64).saturating_mul(NO_END) {
                let why = format!("line {} has more than {length} bytes and no end", self.lines + 1);
                return Err(Broken::Never(Error::new(ErrorKind::Data, why)));
            }
            self.oversized = Some(length);
            return Ok(&[]);
        };
        self.oversized = None;
        let kept = std::mem::take(&mut self.buffer);
        self.looked = 0;
        self.send_oversized(&kept, length)?;
        self.offset += length + 1;
        Ok(&bytes[end + 1..])
    }

    /// Sends what is left: the last line may lack its end.
    pub(crate) fn end(&mut self) -> Result<(), Broken> {
        if let Some((length, _, _, met)) = &self.known
            && met < length
        {
            let error = Error::new(ErrorKind::Server, "the file is shorter than when it was read before");
            return Err(Broken::Never(error));
        }
        if let Some(length) = self.oversized.take() {
            let kept = std::mem::take(&mut self.buffer);
            return self.send_oversized(&kept, length);
        }
        if self.buffer.is_empty() { Ok(()) } else { self.send(self.buffer.len()) }
    }
}
