//! Documents of a file: a text file is one, each line of a .jsonl file is one; either may be .xz, .zst or .gz.

use crate::Error;
use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use std::borrow::Cow;
use std::cell::Cell;
use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::ops::ControlFlow;
use std::path::Path;
use std::rc::Rc;

/// A piece of a document.
pub(crate) enum Piece<'a> {
    /// Valid UTF-8 on its own.
    Text(&'a str),
    /// The document ends here.
    End,
}

/// Bytes of text handed out at a time.
const PIECE: usize = 1 << 20;

#[derive(serde::Deserialize)]
struct Line<'a> {
    #[serde(borrow)]
    text: Cow<'a, str>,
}

/// Counts the bytes read from the file itself.
struct Counted {
    file: File,
    read: Rc<Cell<u64>>,
}

impl Read for Counted {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let n = self.file.read(buf)?;
        self.read.set(self.read.get() + n as u64);
        Ok(n)
    }
}

/// What all frames of a zstd file hold, of which there are several where files were joined or packed by several threads.
struct Frames<R> {
    file: R,
    frame: FrameDecoder,
    begun: bool,
}

impl<R: BufRead> Frames<R> {
    fn next(&mut self) -> Result<(), FrameDecoderError> {
        use FrameDecoderError::ReadFrameHeaderError as Header;
        match self.frame.reset(&mut self.file) {
            // Not text, but what some program wrote for itself.
            Err(Header(ReadFrameHeaderError::SkipFrame { length, .. })) => {
                let length = u64::from(length);
                match std::io::copy(&mut (&mut self.file).take(length), &mut std::io::sink()) {
                    Ok(n) if n == length => Ok(()),
                    _ => Err(FrameDecoderError::FailedToSkipFrame),
                }
            }
            done => done,
        }
    }
}

impl<R: BufRead> Read for Frames<R> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        let bad = |e: FrameDecoderError| std::io::Error::other(format!("not a zstd file, or a damaged one: {e}"));
        loop {
            if self.frame.can_collect() > 0 {
                return self.frame.read(buf);
            }
            if !self.frame.is_finished() {
                self.frame.decode_blocks(&mut self.file, BlockDecodingStrategy::UptoBlocks(1)).map_err(bad)?;
            } else if self.begun && self.file.fill_buf()?.is_empty() {
                return Ok(0);
            } else {
                self.begun = true;
                self.next().map_err(bad)?;
            }
        }
    }
}

/// Hands out the documents of `path` in pieces, with the bytes of the file that have been read. A text document is never
/// held whole; a line of a .jsonl file is, and may have `limit` bytes.
pub(crate) fn read(
    path: &Path, limit: usize, mut take: impl FnMut(Piece<'_>, u64) -> Result<ControlFlow<()>, Error>,
) -> Result<ControlFlow<()>, Error> {
    let io = |e: std::io::Error| Error::io(path, e);
    let file = File::open(path).map_err(io)?;
    if path.is_dir() {
        return Err(Error::malformed(path, "this is a folder; name the files in it"));
    }
    let read = Rc::new(Cell::new(0));
    let counted = BufReader::with_capacity(1 << 16, Counted { file, read: read.clone() });
    let name = path.to_string_lossy().to_ascii_lowercase();
    let (packed, name) = match name.rsplit_once('.') {
        Some((rest, ending @ ("xz" | "zst" | "gz"))) => (ending.to_string(), rest.to_string()),
        _ => (String::new(), name),
    };
    let unpacked: Box<dyn Read> = match packed.as_str() {
        "xz" => Box::new(lzma_rust2::XzReader::new(counted, true)),
        "zst" => Box::new(Frames { file: counted, frame: FrameDecoder::new(), begun: false }),
        "gz" => Box::new(flate2::bufread::MultiGzDecoder::new(counted)),
        _ => Box::new(counted),
    };
    let reader = BufReader::with_capacity(PIECE, unpacked);
    let take = |p: Piece<'_>| take(p, read.get());
    if name.ends_with(".jsonl") { lines(path, reader, limit, take) } else { text(path, reader, take) }
}

/// The documents of a file, whole: a text file is one, each line of a .jsonl file is one; either may be .xz, .zst or .gz.
///
/// # Errors
/// When the file cannot be read, is not UTF-8 or not what its name says.
pub fn documents(path: &Path) -> Result<Vec<String>, Error> {
    let (mut all, mut document) = (Vec::new(), String::new());
    let end = read(path, usize::MAX >> 1, |piece, _| {
        match piece {
            Piece::Text(text) => document.push_str(text),
            Piece::End => all.push(std::mem::take(&mut document)),
        }
        Ok(ControlFlow::Continue(()))
    });
    end.map(|_| all)
}

fn text(
    path: &Path, mut reader: impl BufRead, mut take: impl FnMut(Piece<'_>) -> Result<ControlFlow<()>, Error>,
) -> Result<ControlFlow<()>, Error> {
    let mut buffer = Vec::new();
    let mut at = 0;
    loop {
        let more = (&mut reader).take(PIECE as u64).read_to_end(&mut buffer).map_err(|e| Error::io(path, e))?;
        let valid = match std::str::from_utf8(&buffer) {
            Ok(_) => buffer.len(),
            // The rest of the character may come with the next piece.
            Err(e) if e.error_len().is_none() && more > 0 => e.valid_up_to(),
            Err(e) => return Err(not_utf8(path, &format!("at byte {}", at + e.valid_up_to()))),
        };
        let piece = std::str::from_utf8(&buffer[..valid]).unwrap_or_default();
        if take(Piece::Text(piece))?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
        at += valid;
        buffer.drain(..valid);
        if more == 0 {
            return take(Piece::End);
        }
    }
}

fn lines(
    path: &Path, mut reader: impl BufRead, limit: usize,
    mut take: impl FnMut(Piece<'_>) -> Result<ControlFlow<()>, Error>,
) -> Result<ControlFlow<()>, Error> {
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let n = (&mut reader).take(limit as u64 + 1).read_until(b'\n', &mut line).map_err(|e| Error::io(path, e))?;
        if n == 0 {
            break;
        }
        if n > limit {
            let reason = format!("line {number} is longer than {limit} bytes, which is what memory allows: split it");
            return Err(Error::malformed(path, reason));
        }
        if line.trim_ascii().is_empty() {
            continue;
        }
        if let Err(e) = std::str::from_utf8(&line) {
            return Err(not_utf8(path, &format!("in line {number} at byte {}", e.valid_up_to())));
        }
        let parsed: Line<'_> = serde_json::from_slice(&line).map_err(|e| {
            Error::malformed(path, format!("line {number}: {e}; each line must be an object with a \"text\" string"))
        })?;
        if take(Piece::Text(&parsed.text))?.is_break() || take(Piece::End)?.is_break() {
            return Ok(ControlFlow::Break(()));
        }
    }
    Ok(ControlFlow::Continue(()))
}

fn not_utf8(path: &Path, place: &str) -> Error {
    Error::malformed(path, format!("not UTF-8 {place}; convert the file (iconv -t UTF-8) or remove the bytes"))
}
