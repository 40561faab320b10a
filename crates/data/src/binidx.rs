//! The official data format: `PREFIX.bin` holds the token ids of all documents, `PREFIX.idx` where each begins.
//!
//! `.idx`, little-endian: "MMIDIDX\0\0", u64 version 1, u8 type (8: u16, 4: i32), u64 number of documents n, u64 n + 1, then
//! n i32 lengths in tokens, n i64 offsets in bytes, n + 1 i64 document numbers (0 to n).

use crate::Error;
use anser_formats::AtomicFile;
use memmap2::Mmap;
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

const MAGIC: &[u8; 9] = b"MMIDIDX\0\0";

/// `PREFIX.bin`, `PREFIX.idx` or what else stands beside them; a prefix given with either ending is understood.
pub(crate) fn file(prefix: &Path, ending: &str) -> PathBuf {
    let text = prefix.as_os_str().to_string_lossy();
    let bare = text.strip_suffix(".bin").or(text.strip_suffix(".idx")).unwrap_or(&text);
    PathBuf::from(format!("{bare}.{ending}"))
}

/// A memory-mapped data set.
pub struct Binidx {
    bin: Mmap,
    /// Bytes of a token: 2 or 4.
    size: usize,
    /// First token of each document, and the number of tokens.
    starts: Vec<usize>,
}

impl Binidx {
    /// Opens `PREFIX.bin` and `PREFIX.idx`.
    ///
    /// # Errors
    /// When a file is missing, is damaged, or the two don't belong together.
    pub fn open(prefix: &Path) -> Result<Binidx, Error> {
        let (idx, bin) = (file(prefix, "idx"), file(prefix, "bin"));
        let bytes = std::fs::read(&idx).map_err(|e| Error::io(&idx, e))?;
        let bad = |reason: &str| Error::malformed(&idx, reason);
        let rest =
            bytes.strip_prefix(MAGIC).ok_or_else(|| bad("not a binidx index (it doesn't begin with MMIDIDX)"))?;
        let truncated = || bad("the index is truncated; build the data set again");
        let (version, rest) = rest.split_first_chunk::<8>().ok_or_else(truncated)?;
        let (&dtype, rest) = rest.split_first().ok_or_else(truncated)?;
        if u64::from_le_bytes(*version) != 1 {
            return Err(bad("unknown version of the index; this program reads 1"));
        }
        let size = match dtype {
            8 => 2,
            4 => 4,
            _ => return Err(bad(&format!("tokens of type {dtype}; this program reads 8 (u16) and 4 (i32)"))),
        };
        let (n, rest) = rest.split_first_chunk::<8>().ok_or_else(truncated)?;
        let rest = rest.get(8..).ok_or_else(truncated)?;
        let n = usize::try_from(u64::from_le_bytes(*n)).ok().filter(|&n| n <= rest.len() / 12).ok_or_else(truncated)?;
        let (lengths, rest) = rest.split_at(4 * n);
        let mut starts = Vec::with_capacity(n + 1);
        let mut total = 0usize;
        for (length, offset) in lengths.as_chunks::<4>().0.iter().zip(rest.as_chunks::<8>().0) {
            if i64::from_le_bytes(*offset) != (total * size) as i64 {
                return Err(bad("documents don't lie one after the other; build the data set again"));
            }
            starts.push(total);
            let length =
                usize::try_from(i32::from_le_bytes(*length)).map_err(|_| bad("a document of negative length"))?;
            total += length;
        }
        starts.push(total);
        let opened = File::open(&bin).map_err(|e| Error::io(&bin, e))?;
        // SAFETY: the map is read-only; a process that truncates the file under us can end this one, as with every
        // memory-mapped reader. Our own writer replaces files.
        let map = unsafe { Mmap::map(&opened) }.map_err(|e| Error::io(&bin, e))?;
        if map.len() != total * size {
            let reason = format!("{} bytes, but its index says {}: build the data set again", map.len(), total * size);
            return Err(Error::malformed(&bin, reason));
        }
        Ok(Binidx { bin: map, size, starts })
    }

    /// Number of tokens.
    pub fn len(&self) -> usize {
        self.bin.len() / self.size
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.bin.is_empty()
    }

    /// First token of each document, and at the end the number of tokens.
    pub fn starts(&self) -> &[usize] {
        &self.starts
    }

    /// Reads `out.len()` tokens from the `start`-th on.
    ///
    /// # Panics
    /// When there are not that many.
    pub fn read(&self, start: usize, out: &mut [u32]) {
        let bytes = &self.bin[start * self.size..(start + out.len()) * self.size];
        match self.size {
            2 => out.iter_mut().zip(bytes.as_chunks::<2>().0).for_each(|(o, b)| *o = u16::from_le_bytes(*b).into()),
            _ => out.iter_mut().zip(bytes.as_chunks::<4>().0).for_each(|(o, b)| *o = u32::from_le_bytes(*b)),
        }
    }
}

/// Writes a data set of u16 tokens; its files appear when it is finished.
pub struct BinidxWriter {
    bin: AtomicFile,
    idx: AtomicFile,
    path: PathBuf,
    lengths: Vec<i32>,
    open: usize,
}

impl BinidxWriter {
    /// Begins `PREFIX.bin` and `PREFIX.idx`.
    ///
    /// # Errors
    /// When a file cannot be made.
    pub fn create(prefix: &Path) -> Result<BinidxWriter, Error> {
        let (idx, bin) = (file(prefix, "idx"), file(prefix, "bin"));
        let (bin, idx) = (AtomicFile::create(&bin)?, AtomicFile::create(&idx)?);
        Ok(BinidxWriter { bin, idx, path: file(prefix, "bin"), lengths: Vec::new(), open: 0 })
    }

    /// Adds tokens to the open document.
    ///
    /// # Errors
    /// When a token is above 65535, or writing fails.
    pub fn push(&mut self, tokens: &[u32]) -> Result<(), Error> {
        let mut bytes = Vec::with_capacity(2 * tokens.len());
        for &t in tokens {
            let t = u16::try_from(t).map_err(|_| Error::malformed(&self.path, format!("token {t} is above 65535")))?;
            bytes.extend(t.to_le_bytes());
        }
        self.open += tokens.len();
        self.bin.write_all(&bytes).map_err(|e| Error::io(&self.path, e))
    }

    /// Ends the open document.
    ///
    /// # Errors
    /// When it has more tokens than the format can say.
    pub fn end_document(&mut self) -> Result<(), Error> {
        let length = i32::try_from(self.open).map_err(|_| {
            Error::malformed(&self.path, format!("a document of {} tokens; the format holds 2^31 - 1", self.open))
        })?;
        self.lengths.push(length);
        self.open = 0;
        Ok(())
    }

    /// Writes the index and gives both files their names: (documents, tokens).
    ///
    /// # Errors
    /// When writing fails; older files of that name are then as they were.
    pub fn finish(mut self) -> Result<(usize, usize), Error> {
        if self.open > 0 {
            self.end_document()?;
        }
        let n = self.lengths.len();
        let mut head = MAGIC.to_vec();
        head.extend(1u64.to_le_bytes());
        head.push(8);
        head.extend((n as u64).to_le_bytes());
        head.extend((n as u64 + 1).to_le_bytes());
        self.lengths.iter().for_each(|l| head.extend(l.to_le_bytes()));
        let mut total = 0;
        for &l in &self.lengths {
            head.extend((2 * total as i64).to_le_bytes());
            total += l as usize;
        }
        (0..=n as i64).for_each(|i| head.extend(i.to_le_bytes()));
        self.idx.write_all(&head).map_err(|e| Error::io(&self.path.with_extension("idx"), e))?;
        self.bin.commit()?;
        self.idx.commit()?;
        Ok((n, total))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_the_official_ones_and_damage_is_told() {
        let folder = std::env::temp_dir().join(format!("anser-binidx-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let prefix = folder.join("my.data");
        let mut w = BinidxWriter::create(&prefix).unwrap();
        w.push(&[1, 2]).unwrap();
        w.push(&[3, 0]).unwrap();
        w.end_document().unwrap();
        w.push(&[65535, 0]).unwrap();
        w.end_document().unwrap();
        assert!(w.push(&[65536]).is_err());
        assert_eq!(w.finish().unwrap(), (2, 6));
        let idx = std::fs::read(folder.join("my.data.idx")).unwrap();
        // Laid out by hand from the format's description.
        let mut want = b"MMIDIDX\x00\x00\x01\0\0\0\0\0\0\0\x08\x02\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0".to_vec();
        want.extend(b"\x04\0\0\0\x02\0\0\0\0\0\0\0\0\0\0\0\x08\0\0\0\0\0\0\0");
        want.extend(b"\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0");
        assert_eq!(idx, want);
        let bin = std::fs::read(folder.join("my.data.bin")).unwrap();
        assert_eq!(bin, [1, 0, 2, 0, 3, 0, 0, 0, 255, 255, 0, 0]);
        for name in ["my.data", "my.data.bin", "my.data.idx"] {
            let b = Binidx::open(&folder.join(name)).unwrap();
            assert_eq!((b.len(), b.starts()), (6, &[0, 4, 6][..]));
            let mut t = [0; 3];
            b.read(2, &mut t);
            assert_eq!(t, [3, 0, 65535]);
        }
        let open = || Binidx::open(&prefix).err().map(|e| e.to_string());
        for cut in 0..idx.len() - 24 {
            std::fs::write(folder.join("my.data.idx"), &idx[..cut]).unwrap();
            assert!(open().is_some(), "index cut at {cut}");
        }
        std::fs::write(folder.join("my.data.idx"), &idx).unwrap();
        std::fs::write(folder.join("my.data.bin"), &bin[..10]).unwrap();
        assert!(open().unwrap().contains("10 bytes, but its index says 12"));
        std::fs::remove_file(folder.join("my.data.bin")).unwrap();
        assert!(open().unwrap().contains("my.data.bin"));
        std::fs::remove_dir_all(folder).unwrap();
    }
}
