//! Bytes that are packed: gzip, deflate or Zstandard, unpacked as they come.

use std::io::Write;

use crate::error::{Error, ErrorKind, Result};

/// Unpacks as bytes come. Which way is told by the first bytes: servers send gzip files without saying so.
pub enum Unpack {
    /// As they are.
    Plain,
    /// gzip, of any number of members.
    Gzip(Box<flate2::write::MultiGzDecoder<Vec<u8>>>),
    /// zlib, which HTTP calls deflate.
    Deflate(Box<flate2::write::ZlibDecoder<Vec<u8>>>),
    /// Zstandard.
    Zstd(Box<Zstd>),
}

impl Unpack {
    /// What the first bytes of a file ask for, and `Content-Encoding` where they say nothing.
    pub fn of(encoding: &str, first: &[u8]) -> Result<Self> {
        if first.starts_with(&[0x1f, 0x8b]) {
            return Ok(Unpack::Gzip(Box::new(flate2::write::MultiGzDecoder::new(Vec::new()))));
        }
        if first.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
            return Zstd::new()
                .map(|decoder| Unpack::Zstd(Box::new(decoder)))
                .map_err(|error| Error::new(ErrorKind::Internal, format!("zstd cannot be set up: {error}")));
        }
        match encoding {
            "" | "identity" | "gzip" | "x-gzip" => Ok(Unpack::Plain),
            "deflate" => Ok(Unpack::Deflate(Box::new(flate2::write::ZlibDecoder::new(Vec::new())))),
            other => {
                Err(Error::new(ErrorKind::Server, format!("the file has Content-Encoding {other}, which was not asked for")))
            }
        }
    }

    /// Unpacks more bytes into `sink`; `broken` says what it means that they cannot be.
    pub fn push<E>(
        &mut self,
        bytes: &[u8],
        mut sink: impl FnMut(&[u8]) -> Result<(), E>,
        broken: impl Fn(std::io::Error) -> E,
    ) -> Result<(), E> {
        if let Unpack::Plain = self {
            return sink(bytes);
        }
        // In pieces: a small packed piece may be a large unpacked one.
        for piece in bytes.chunks(16 * 1024) {
            match self {
                Unpack::Plain => {}
                Unpack::Gzip(decoder) => decoder.write_all(piece).map_err(&broken)?,
                Unpack::Deflate(decoder) => decoder.write_all(piece).map_err(&broken)?,
                Unpack::Zstd(decoder) => decoder.write_all(piece).map_err(&broken)?,
            }
            self.drain(&mut sink)?;
        }
        Ok(())
    }

    fn drain<E>(&mut self, sink: &mut impl FnMut(&[u8]) -> Result<(), E>) -> Result<(), E> {
        let out = match self {
            Unpack::Plain => return Ok(()),
            Unpack::Gzip(decoder) => decoder.get_mut(),
            Unpack::Deflate(decoder) => decoder.get_mut(),
            Unpack::Zstd(decoder) => &mut decoder.out,
        };
        sink(out)?;
        out.clear();
        Ok(())
    }

    /// The end of the bytes: what they still hold, and whether they are whole.
    pub fn end<E>(mut self, mut sink: impl FnMut(&[u8]) -> Result<(), E>, broken: impl Fn(std::io::Error) -> E) -> Result<(), E> {
        let cut = |error: std::io::Error| broken(std::io::Error::new(error.kind(), format!("cut short: {error}")));
        match &mut self {
            Unpack::Plain => {}
            Unpack::Gzip(decoder) => decoder.try_finish().map_err(cut)?,
            Unpack::Deflate(decoder) => decoder.try_finish().map_err(cut)?,
            Unpack::Zstd(decoder) => decoder.end().map_err(cut)?,
        }
        self.drain(&mut sink)
    }
}

/// Zstandard, told apart from the crate's own writer by knowing whether the last frame ended.
pub struct Zstd {
    decoder: zstd::stream::raw::Decoder<'static>,
    out: Vec<u8>,
    open: bool,
}

impl Zstd {
    fn new() -> std::io::Result<Self> {
        Ok(Self { decoder: zstd::stream::raw::Decoder::new()?, out: Vec::new(), open: false })
    }

    fn write_all(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        use zstd::stream::raw::{InBuffer, Operation, OutBuffer};
        let mut input = InBuffer::around(bytes);
        let mut piece = vec![0; 128 * 1024];
        loop {
            let mut output = OutBuffer::around(piece.as_mut_slice());
            // 0 says that a frame has ended and all of it was given out.
            let hint = self.decoder.run(&mut input, &mut output)?;
            let got = output.pos();
            self.out.extend_from_slice(&piece[..got]);
            self.open = hint != 0;
            if input.pos() == bytes.len() && got < piece.len() {
                return Ok(());
            }
            if hint == 0 && input.pos() < bytes.len() {
                self.decoder.reinit()?;
            }
        }
    }

    fn end(&mut self) -> std::io::Result<()> {
        if self.open { Err(std::io::Error::other("the last frame did not end")) } else { Ok(()) }
    }
}
