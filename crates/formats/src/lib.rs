//! Checkpoint files: `.pth` (read without executing anything), safetensors, atomic writing.
//!
//! [`Checkpoint::open`] memory-maps a file and lists its tensors under their official names; nothing is copied until a
//! tensor is read. This crate knows nothing of models.

mod atomic;
mod pickle;
mod pth;
mod safetensors;
mod tensor;
#[cfg(test)]
mod tests;
mod zip;

pub use atomic::{AtomicFile, write_atomic};
pub use pth::write_pth;
pub use safetensors::write_safetensors;
pub use tensor::{Dtype, Source, TensorView};

use memmap2::Mmap;
use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};

/// Why a file could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system said no.
    #[error("{path}: {action}: {cause}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What was being done.
        action: &'static str,
        /// The reason.
        cause: std::io::Error,
    },
    /// The file is not what it should be.
    #[error("{path}: {reason}", path = path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong and what to do.
        reason: String,
    },
    /// A tensor and its use don't fit.
    #[error("tensor {name}: {reason}")]
    Tensor {
        /// The tensor.
        name: String,
        /// What is wrong.
        reason: String,
    },
}

impl Error {
    fn io(path: &Path, action: &'static str, cause: std::io::Error) -> Error {
        Error::Io { path: path.into(), action, cause }
    }
}

/// Where a tensor lies in the mapped file.
#[derive(Clone, Debug, PartialEq)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    /// Strides in elements; `None` if contiguous.
    strides: Option<Vec<usize>>,
    /// Byte range of the storage from the tensor's first element on.
    start: usize,
    end: usize,
}

impl Entry {
    fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// A memory-mapped checkpoint: named tensors and metadata.
pub struct Checkpoint {
    path: PathBuf,
    map: Mmap,
    entries: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
}

impl Checkpoint {
    /// Opens a `.pth` or safetensors file; the kind is told by its content.
    ///
    /// # Errors
    /// When the file cannot be read or is damaged; the message says where.
    pub fn open(path: &Path) -> Result<Checkpoint, Error> {
        let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
        if file.metadata().is_ok_and(|m| m.is_dir()) {
            let reason = "this is a folder; name the .pth or .safetensors file in it".into();
            return Err(Error::Malformed { path: path.into(), reason });
        }
        // SAFETY: the map is read-only. Another process that truncates the file under us can kill this one with a bus
        // error, as with every memory-mapped reader; our own writers replace files instead of changing them.
        let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, "memory-map", e))?;
        let malformed = |reason: String| Error::Malformed { path: path.into(), reason };
        let (entries, metadata) = if map.starts_with(b"PK") {
            (pth::read(&map).map_err(malformed)?, BTreeMap::new())
        } else {
            safetensors::read(&map).map_err(|reason| {
                // A pickle at the top is the format that PyTorch wrote before 1.6.
                let old = matches!(map[..], [0x80, 2..=5, ..]);
                let advice = "this is PyTorch's old format (before 1.6); load and save it again with a current torch";
                malformed(if old { advice.into() } else { reason })
            })?
        };
        Ok(Checkpoint { path: path.into(), map, entries, metadata })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.entries.get(name).map(|e| &e.shape[..])
    }

    /// A tensor, if there is one of that name.
    ///
    /// # Errors
    /// Never today; kept for formats that check a tensor when it is first used.
    pub fn get(&self, name: &str) -> Result<Option<TensorView<'_>>, Error> {
        let Some((name, entry)) = self.entries.get_key_value(name) else { return Ok(None) };
        Ok(Some(TensorView { name, entry, map: &self.map }))
    }

    /// Metadata strings of a safetensors file (`__metadata__`).
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}
