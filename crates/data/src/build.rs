use crate::binidx::file;
use crate::documents::{Piece, read};
use crate::{BinidxWriter, Error};
use anser_formats::write_atomic;
use anser_tokenizer::Tokenizer;
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

/// What was built.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Built {
    /// Name of the tokenizer.
    pub tokenizer: String,
    /// Documents.
    pub documents: usize,
    /// Tokens, each document's end counted.
    pub tokens: usize,
    /// Bytes of text.
    pub bytes: u64,
}

impl Built {
    /// What [`build`] wrote beside the data set, if it did.
    pub fn read(prefix: &Path) -> Option<Built> {
        serde_json::from_slice(&std::fs::read(file(prefix, "json")).ok()?).ok()
    }
}

/// Tokenizes the documents of `inputs` into the binidx data set `PREFIX.bin`, `PREFIX.idx`, with [`Built`] in `PREFIX.json`.
/// After each document comes token 0. A text file is one document of any length; a line of a .jsonl file may have
/// `max_line` bytes. Empty documents are left out. `progress` gets the bytes read of all files together; when it breaks,
/// nothing is written and the result is `None`.
///
/// # Errors
/// When a file cannot be read, is not UTF-8 or not what its name says, when there is no text at all, or writing fails.
pub fn build(
    inputs: &[PathBuf], prefix: &Path, tokenizer: &Tokenizer, max_line: usize,
    mut progress: impl FnMut(u64) -> ControlFlow<()>,
) -> Result<Option<Built>, Error> {
    let mut out = BinidxWriter::create(prefix)?;
    let (mut before, mut bytes) = (0, 0);
    for path in inputs {
        let mut document = Document { text: String::new(), length: 0 };
        let result = read(path, max_line, |piece, read| {
            match piece {
                Piece::Text(text) => {
                    bytes += text.len() as u64;
                    document.push(text, tokenizer, &mut out)?;
                }
                Piece::End => document.end(tokenizer, &mut out)?,
            }
            Ok(progress(before + read))
        })?;
        if result.is_break() {
            return Ok(None);
        }
        before += std::fs::metadata(path).map_or(0, |m| m.len());
    }
    if bytes == 0 {
        return Err(Error::Empty);
    }
    let (documents, tokens) = out.finish()?;
    let built = Built { tokenizer: tokenizer.name().into(), documents, tokens, bytes };
    let json = serde_json::to_vec(&built).unwrap_or_default();
    write_atomic(&file(prefix, "json"), |f| f.write_all(&json))?;
    Ok(Some(built))
}

/// A document on its way: what of its text may still become part of a longer token.
struct Document {
    text: String,
    length: usize,
}

impl Document {
    fn push(&mut self, text: &str, tokenizer: &Tokenizer, out: &mut BinidxWriter) -> Result<(), Error> {
        self.length += text.len();
        self.text += text;
        let mut tokens = tokenizer.encode(self.text.as_bytes());
        // The longest match is certain for tokens that begin so far from the end that the longest token would fit.
        let mut open = 0;
        while open < tokenizer.max_token_len() {
            let Some(last) = tokens.pop() else { break };
            open += tokenizer.token(last).map_or(0, <[u8]>::len);
        }
        // A token may end inside a character; the text kept must not begin there.
        let mut keep = self.text.len() - open;
        while !self.text.is_char_boundary(keep) {
            let Some(last) = tokens.pop() else { break };
            keep -= tokenizer.token(last).map_or(0, <[u8]>::len);
        }
        out.push(&tokens)?;
        self.text.drain(..keep);
        Ok(())
    }

    fn end(&mut self, tokenizer: &Tokenizer, out: &mut BinidxWriter) -> Result<(), Error> {
        if self.length > 0 {
            out.push(&tokenizer.encode(self.text.as_bytes()))?;
            out.push(&[tokenizer.end_of_document()])?;
            out.end_document()?;
        }
        *self = Document { text: String::new(), length: 0 };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Binidx;

    fn folder(name: &str) -> PathBuf {
        let path = std::env::temp_dir().join(format!("anser-build-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        path
    }

    fn tokens(prefix: &Path) -> Vec<u32> {
        let b = Binidx::open(prefix).unwrap();
        let mut out = vec![0; b.len()];
        b.read(0, &mut out);
        out
    }

    #[test]
    fn every_kind_of_file_gives_the_same_tokens() {
        let folder = folder("kinds");
        // Longer than a piece, with characters of 1 to 4 bytes at the seams.
        let text: String = (0..300_000).map(|i| ["die ", "Gänse", " 雁", "🪿", "  \n"][i * i % 5]).collect();
        assert!(text.len() > 1 << 20);
        let lines =
            format!("{}\n\n{}\n", serde_json::json!({"text": "one"}), serde_json::json!({"n": 1, "text": text}));
        let gz = |bytes: &[u8]| {
            let mut e = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            e.write_all(bytes).unwrap();
            e.finish().unwrap()
        };
        let xz = |bytes: &[u8]| {
            let mut e = lzma_rust2::XzWriter::new(Vec::new(), lzma_rust2::XzOptions::with_preset(0)).unwrap();
            e.write_all(bytes).unwrap();
            e.finish().unwrap()
        };
        let zst = |bytes: &[u8]| ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest);
        let (first, second) = lines.split_at(lines.find("\n\n").unwrap());
        let skipped = b"\x50\x2a\x4d\x18\x03\0\0\0abc";
        let world = Tokenizer::world();
        let whole = world.encode(text.as_bytes());
        let want: Vec<u32> = [world.encode(b"one"), vec![0], whole.clone(), vec![0]].concat();
        for (name, bytes) in [
            ("a.jsonl", lines.clone().into_bytes()),
            ("a.jsonl.gz", gz(lines.as_bytes())),
            ("a.jsonl.xz", xz(lines.as_bytes())),
            ("a.jsonl.zst", zst(lines.as_bytes())),
            ("joined.jsonl.gz", [gz(first.as_bytes()), gz(second.as_bytes())].concat()),
            ("joined.jsonl.xz", [xz(first.as_bytes()), xz(second.as_bytes())].concat()),
            ("joined.jsonl.zst", [zst(first.as_bytes()), skipped.to_vec(), zst(b""), zst(second.as_bytes())].concat()),
        ] {
            std::fs::write(folder.join(name), bytes).unwrap();
            let mut seen = 0;
            let go = |n: u64| {
                seen = n;
                ControlFlow::Continue(())
            };
            let built = build(&[folder.join(name)], &folder.join("out"), &world, 1 << 30, go).unwrap().unwrap();
            assert_eq!((built.documents, built.tokens), (2, want.len()), "{name}");
            assert!(tokens(&folder.join("out")) == want, "{name}");
            for prefix in ["out", "out.bin", "out.idx"] {
                assert_eq!(Built::read(&folder.join(prefix)).unwrap(), built);
            }
            assert_eq!(seen, std::fs::metadata(folder.join(name)).unwrap().len());
        }
        std::fs::write(folder.join("one.txt"), "one").unwrap();
        std::fs::write(folder.join("b.txt.gz"), gz(text.as_bytes())).unwrap();
        std::fs::write(folder.join("empty.txt"), "").unwrap();
        let inputs = ["one.txt", "empty.txt", "b.txt.gz"].map(|n| folder.join(n));
        build(&inputs, &folder.join("out"), &world, 10, |_| ControlFlow::Continue(())).unwrap();
        assert!(tokens(&folder.join("out")) == want);
        let bytes = Tokenizer::bytes();
        build(&inputs, &folder.join("out"), &bytes, 10, |_| ControlFlow::Continue(())).unwrap();
        assert!(tokens(&folder.join("out")).len() == text.len() + 5);
        // Stopped: the data set before is as it was, nothing else is left.
        let stopped = build(&inputs, &folder.join("out"), &world, 10, |_| ControlFlow::Break(())).unwrap();
        assert!(stopped.is_none() && tokens(&folder.join("out")).len() == text.len() + 5);
        assert!(std::fs::read_dir(&folder).unwrap().all(|f| !f.unwrap().path().to_string_lossy().ends_with(".tmp")));
        std::fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn bad_files_are_named() {
        let folder = folder("bad");
        let run = |name: &str, bytes: &[u8]| {
            std::fs::write(folder.join(name), bytes).unwrap();
            let go = |_| ControlFlow::Continue(());
            let e = build(&[folder.join(name)], &folder.join("out"), &Tokenizer::world(), 40, go);
            e.unwrap_err().to_string()
        };
        assert!(run("a.txt", b"abc\xffdef").contains("a.txt: not UTF-8 at byte 3"));
        assert!(run("cut.txt", "é".as_bytes().split_at(1).0).contains("not UTF-8 at byte 0"));
        assert!(run("b.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}").contains("line 2"));
        assert!(run("c.jsonl", b"{\"txt\": \"a\"}").contains("\"text\" string"));
        assert!(run("d.jsonl", format!("{{\"text\": \"{}\"}}", "x".repeat(40)).as_bytes()).contains("split it"));
        assert!(run("e.txt", b"").contains("no text"));
        assert!(run("f.jsonl", b"\n\n").contains("no text"));
        assert!(run("g.gz", b"no gzip").contains("g.gz") && run("h.xz", b"no xz").contains("h.xz"));
        assert!(run("i.zst", b"no zstd").contains("i.zst: not a zstd file"));
        assert!(run("j.zst", b"").contains("j.zst: not a zstd file"));
        assert_eq!(
            std::fs::read_dir(&folder).unwrap().filter(|f| f.as_ref().unwrap().path().ends_with("out.bin")).count(),
            0
        );
        std::fs::remove_dir_all(folder).unwrap();
    }
}
