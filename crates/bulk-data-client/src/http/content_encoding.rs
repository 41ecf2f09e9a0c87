//! Bytes that are packed: gzip, deflate or Zstandard, unpacked as they come.

use std::io::Write;

use foundation::error::{Error, ErrorKind, Result};

/// Unpacks as bytes come. Which way is told by the first bytes: servers send gzip files without saying so.
pub enum Unpack {
    /// As they are.
    Plain,
    /// gzip, of any number of members.
    Gzip(Box<flate2::write::MultiGzDecoder<Vec<u8>>>),
    /// zlib, which HTTP calls deflate.
    Deflate(Box<flate2::write::ZlibDecoder<Vec<u8>>>),
    /// Deflate without zlib's frame, which some servers send under that name.
    RawDeflate(Box<flate2::write::DeflateDecoder<Vec<u8>>>),
    /// Zstandard.
    Zstd(Box<Zstd>),
}

impl Unpack {
    /// Returns the coding that the first bytes of a file ask for, and `Content-Encoding` where they say nothing. A
    /// coding that nobody knows, such as `UTF-8` or the `aws-chunked` that stores keep by mistake, says nothing of
    /// bytes that can be read as they are.
    pub fn of(encoding: &str, first: &[u8]) -> Result<Self> {
        if first.starts_with(&[0x1f, 0x8b]) {
            return Ok(Unpack::Gzip(Box::new(flate2::write::MultiGzDecoder::new(Vec::new()))));
        }
        if first.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
            return Zstd::new()
                .map(|decoder| Unpack::Zstd(Box::new(decoder)))
                .map_err(|error| Error::new(ErrorKind::Internal, format!("zstd cannot be set up: {error}")));
        }
        let names = |coding: &str| codings(encoding).any(|named| named == coding);
        let is_text = first.is_empty()
            || first.starts_with(b"\xef\xbb\xbf")
            || first[0] == b'{'
            || first[0].is_ascii_whitespace();
        let is_zlib =
            first.len() >= 2 && first[0] & 0x0f == 8 && (u16::from(first[0]) << 8 | u16::from(first[1])) % 31 == 0;
        match () {
            () if names("deflate") && is_zlib => {
                Ok(Unpack::Deflate(Box::new(flate2::write::ZlibDecoder::new(Vec::new()))))
            }
            () if is_text => Ok(Unpack::Plain),
            () if names("deflate") => Ok(Unpack::RawDeflate(Box::new(flate2::write::DeflateDecoder::new(Vec::new())))),
            // Told apart from other bytes by their name only.
            () => match codings(encoding).find(|coding| UNREADABLE.contains(coding)) {
                Some(coding) => Err(Error::new(
                    ErrorKind::Server,
                    format!("the file has the unrequested Content-Encoding {coding}"),
                )),
                // As of `aws-chunked`: to read what lies between the frames would lose the lines that they cut.
                None if Self::is_unknown(encoding) => {
                    let why = format!("the file has Content-Encoding {encoding}, and does not begin as NDJSON does");
                    Err(Error::new(ErrorKind::Server, why).with_hint(
                        "the server, or the store that it links to, has to send the file without that coding",
                    ))
                }
                None => Ok(Unpack::Plain),
            },
        }
    }

    /// Returns true if a `Content-Encoding` names a coding that HTTP does not have.
    pub fn is_unknown(encoding: &str) -> bool {
        codings(encoding).any(|coding| !KNOWN.contains(&coding) && !UNREADABLE.contains(&coding))
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
                Unpack::RawDeflate(decoder) => decoder.write_all(piece).map_err(&broken)?,
                Unpack::Zstd(decoder) => {
                    decoder.push(piece, &mut sink, &broken)?;
                    continue;
                }
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
            Unpack::RawDeflate(decoder) => decoder.get_mut(),
            Unpack::Zstd(_) => return Ok(()),
        };
        sink(out)?;
        out.clear();
        Ok(())
    }

    /// The end of the bytes: what they still hold, and whether they are whole.
    pub fn end<E>(
        mut self,
        mut sink: impl FnMut(&[u8]) -> Result<(), E>,
        broken: impl Fn(std::io::Error) -> E,
    ) -> Result<(), E> {
        let cut = |error: std::io::Error| broken(std::io::Error::new(error.kind(), format!("cut short: {error}")));
        match &mut self {
            Unpack::Plain => {}
            Unpack::Gzip(decoder) => decoder.try_finish().map_err(cut)?,
            Unpack::Deflate(decoder) => decoder.try_finish().map_err(cut)?,
            Unpack::RawDeflate(decoder) => decoder.try_finish().map_err(cut)?,
            Unpack::Zstd(decoder) => decoder.end().map_err(cut)?,
        }
        self.drain(&mut sink)
    }
}

/// The codings of a `Content-Encoding`, in lower case as it is.
fn codings(encoding: &str) -> impl Iterator<Item = &str> {
    encoding.split(',').map(str::trim).filter(|coding| !coding.is_empty())
}

/// Codings that can be undone.
const KNOWN: [&str; 5] = ["identity", "gzip", "x-gzip", "deflate", "zstd"];

/// Codings that HTTP has and that cannot be.
const UNREADABLE: [&str; 4] = ["br", "compress", "x-compress", "dcb"];

/// Unpacks an answer that is in memory, to at most `most` bytes.
pub fn unpacked(encoding: &str, bytes: Vec<u8>, most: usize) -> Result<Vec<u8>> {
    let mut unpack = Unpack::of(encoding, &bytes)?;
    if let Unpack::Plain = unpack {
        return Ok(bytes);
    }
    let mut out = Vec::new();
    let mut sink = |bytes: &[u8]| {
        out.extend_from_slice(bytes);
        match out.len() > most {
            true => Err(Error::new(
                ErrorKind::Server,
                format!("response exceeds the {} MiB limit when unpacked", most >> 20),
            )),
            false => Ok(()),
        }
    };
    let broken =
        |error: std::io::Error| Error::new(ErrorKind::Server, format!("the response cannot be unpacked: {error}"));
    unpack.push(&bytes, &mut sink, broken)?;
    unpack.end(&mut sink, broken)?;
    Ok(out)
}

/// Window of 8 MiB at most, as for HTTP (RFC 9659): what unpacks holds it.
const WINDOW_LOG: u32 = 23;

/// Zstandard, told apart from the crate's own writer by knowing whether the last frame ended.
pub struct Zstd {
    decoder: zstd::stream::raw::Decoder<'static>,
    piece: Vec<u8>,
    open: bool,
}

impl Zstd {
    fn new() -> std::io::Result<Self> {
        let mut decoder = zstd::stream::raw::Decoder::new()?;
        decoder.set_parameter(zstd::stream::raw::DParameter::WindowLogMax(WINDOW_LOG))?;
        Ok(Self { decoder, piece: vec![0; 128 * 1024], open: false })
    }

    /// Gives out what is unpacked piece by piece: a few bytes may stand for gigabytes.
    fn push<E>(
        &mut self,
        bytes: &[u8],
        sink: &mut impl FnMut(&[u8]) -> Result<(), E>,
        broken: &impl Fn(std::io::Error) -> E,
    ) -> Result<(), E> {
        use zstd::stream::raw::{InBuffer, Operation, OutBuffer};
        let mut input = InBuffer::around(bytes);
        loop {
            let mut output = OutBuffer::around(self.piece.as_mut_slice());
            // 0 says that a frame has ended and all of it was given out.
            let hint = self.decoder.run(&mut input, &mut output).map_err(|error| {
                let wide = error.to_string().contains("too much memory");
                broken(if wide {
                    std::io::Error::other(format!(
                        "its window is larger than {} MiB (RFC 9659)",
                        1 << (WINDOW_LOG - 20)
                    ))
                } else {
                    error
                })
            })?;
            let got = output.pos();
            sink(&self.piece[..got])?;
            self.open = hint != 0;
            let done = input.pos() == bytes.len();
            // Asked once more after a frame's end, it would wait for another one.
            if done && (hint == 0 || got < self.piece.len()) {
                return Ok(());
            }
            if hint == 0 {
                self.decoder.reinit().map_err(broken)?;
            }
        }
    }

    fn end(&mut self) -> std::io::Result<()> {
        if self.open { Err(std::io::Error::other("the last frame did not end")) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn in_steps(packed: &[u8], step: usize) -> Result<(usize, usize), String> {
        let mut unpack = Unpack::of("", packed).unwrap();
        let (mut most, mut all) = (0, 0);
        let mut sink = |bytes: &[u8]| {
            (most, all) = (most.max(bytes.len()), all + bytes.len());
            Ok::<(), String>(())
        };
        for bytes in packed.chunks(step) {
            unpack.push(bytes, &mut sink, |error| error.to_string())?;
        }
        unpack.end(&mut sink, |error| error.to_string())?;
        Ok((all, most))
    }

    // Breaks if a file whose length is that of our buffer is taken for one that was cut, or a cut one for whole.
    #[test]
    fn zstandard_of_every_length_whole_and_cut() {
        for length in [0, 1, 131_071, 131_072, 131_073, 262_144, 1 << 21] {
            let bytes: Vec<u8> = (0..length).map(|at: usize| (at % 251) as u8).collect();
            let packed = zstd::encode_all(bytes.as_slice(), 3).unwrap();
            let twice = [packed.as_slice(), packed.as_slice()].concat();
            for step in [1, 7, 16_384, usize::MAX] {
                if step == 1 && length > 200_000 {
                    continue;
                }
                assert_eq!(in_steps(&packed, step).unwrap().0, length, "{length} by {step}");
                assert_eq!(in_steps(&twice, step).unwrap().0, 2 * length, "{length} twice by {step}");
            }
            in_steps(&packed[..packed.len() - 1], 7).unwrap_err();
        }
    }

    // Breaks if what unpacks is held whole, or a window of any size is.
    #[test]
    fn a_few_bytes_that_stand_for_many() {
        let packed = zstd::encode_all(std::io::Cursor::new(vec![b' '; 256 << 20]), 3).unwrap();
        assert!(packed.len() < 64 << 10);
        let (all, most) = in_steps(&packed, usize::MAX).unwrap();
        assert!(all == 256 << 20 && most <= 128 << 10, "{most} at once");
        let mut wide = zstd::Encoder::new(Vec::new(), 3).unwrap();
        wide.window_log(27).unwrap();
        wide.long_distance_matching(true).unwrap();
        std::io::Write::write_all(&mut wide, &vec![b'x'; 1 << 20]).unwrap();
        let error = in_steps(&wide.finish().unwrap(), usize::MAX).unwrap_err();
        assert!(error.contains("8 MiB"), "{error}");
    }

    // Breaks if a coding that nobody knows keeps a plain file out, or a packed one is taken for plain.
    #[test]
    fn the_bytes_tell_how_they_are_packed() {
        let text = b"{\"resourceType\":\"Patient\"}\n".as_slice();
        let gzip = {
            let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(text).unwrap();
            gzip.finish().unwrap()
        };
        let zlib = {
            let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::fast());
            zlib.write_all(text).unwrap();
            zlib.finish().unwrap()
        };
        let raw = {
            let mut raw = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::fast());
            raw.write_all(text).unwrap();
            raw.finish().unwrap()
        };
        for encoding in
            ["", "identity", "aws-chunked", "utf-8", "gzip", "deflate", "br", "none, aws-chunked", "deflate, identity"]
        {
            assert_eq!(unpacked(encoding, text.to_vec(), 1000).unwrap(), text, "{encoding}");
            assert_eq!(unpacked(encoding, gzip.clone(), 1000).unwrap(), text, "{encoding}");
        }
        for encoding in ["deflate", "aws-chunked, deflate"] {
            assert_eq!(unpacked(encoding, zlib.clone(), 1000).unwrap(), text);
            assert_eq!(unpacked(encoding, raw.clone(), 1000).unwrap(), text);
        }
        assert!(unpacked("br", vec![0x1b, 0x20, 0x00], 1000).unwrap_err().to_string().contains("br"));
        assert!(unpacked("gzip", gzip, 3).unwrap_err().to_string().contains("limit"));
        assert!(Unpack::is_unknown("utf-8") && Unpack::is_unknown("gzip, aws-chunked"));
        assert!(!Unpack::is_unknown("gzip, br") && !Unpack::is_unknown(""));
    }
}
