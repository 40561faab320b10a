//! Checkpoint files: `.pth` (read without executing anything), safetensors, GGUF, atomic writing.
//!
//! [`Checkpoint::open`] memory-maps a file (or the files of a Hugging Face folder) and lists its tensors under their
//! official names; nothing is copied until a tensor is read. This crate computes nothing but what stored values stand for.

mod atomic;
mod blocks;
pub mod coded;
pub mod gguf;
mod huggingface;
pub mod llama;
mod pickle;
mod pth;
mod safetensors;
mod tensor;
#[cfg(test)]
mod tests;
mod web_rwkv;
mod zip;

pub use atomic::{AtomicFile, abandon_writes, writable, write_atomic};
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
    /// Which of the checkpoint's files.
    file: usize,
}

impl Entry {
    fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// A matrix seen with rows and columns exchanged.
    fn transposed(self) -> Option<Entry> {
        let [rows, cols] = self.shape[..] else { return None };
        let strides = match &self.strides {
            None => vec![1, cols],
            Some(s) => vec![s[1], s[0]],
        };
        Some(Entry { shape: vec![cols, rows], strides: Some(strides), ..self })
    }

    /// Row `i` of a contiguous tensor of `rows` rows, as a vector.
    fn row(&self, i: usize, rows: usize) -> Option<Entry> {
        if self.shape.first() != Some(&rows) || self.strides.is_some() {
            return None;
        }
        let len = self.elements() / rows;
        if !len.is_multiple_of(self.dtype.block()) {
            return None;
        }
        let size = len / self.dtype.block() * self.dtype.size();
        let start = self.start + i * size;
        Some(Entry { shape: vec![len], start, end: start + size, ..self.clone() })
    }
}

/// The bytes of a file.
enum Bytes {
    Mapped(Mmap),
    /// Part of the program.
    Static(&'static [u8]),
}

impl std::ops::Deref for Bytes {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        match self {
            Bytes::Mapped(map) => map,
            Bytes::Static(bytes) => bytes,
        }
    }
}

/// A checkpoint, memory-mapped or part of the program: named tensors and metadata.
pub struct Checkpoint {
    path: PathBuf,
    maps: Vec<Bytes>,
    entries: BTreeMap<String, Entry>,
    /// Scales of the matrices in 8 or 4 bits.
    scales: BTreeMap<String, Entry>,
    metadata: BTreeMap<String, String>,
    /// Parts of files that have checksums, and the files.
    members: Vec<(usize, zip::Member)>,
    format: Format,
    naming: Naming,
}

/// The kind of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// PyTorch's zip archive.
    Pth,
    /// safetensors, one file or a folder of them.
    Safetensors,
    /// llama.cpp's container.
    Gguf,
}

impl std::fmt::Display for Format {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Format::Pth => ".pth",
            Format::Safetensors => "safetensors",
            Format::Gguf => "GGUF",
        })
    }
}

/// Whose tensor names and layouts a file has. [`Checkpoint`] shows all of them as the official ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// The official trainer's: `blocks.N.att...`.
    Official,
    /// Hugging Face / flash-linear-attention's: `model.layers.N.attn...`, low-rank matrices transposed.
    HuggingFace,
    /// web-rwkv's and ai00's (`.st`): the official names, low-rank matrices transposed.
    WebRwkv,
    /// llama.cpp's: `blk.N.time_mix...`, low-rank matrices transposed, the token-shift weights of a layer in one tensor.
    LlamaCpp,
}

impl std::fmt::Display for Naming {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Naming::Official => "official",
            Naming::HuggingFace => "huggingface",
            Naming::WebRwkv => "web-rwkv",
            Naming::LlamaCpp => "llama.cpp",
        })
    }
}

/// Key of [`Checkpoint::metadata`] under which the `config.json` of a Hugging Face folder is found.
pub const CONFIG_JSON: &str = "config.json";

impl Checkpoint {
    /// Opens a `.pth`, safetensors or GGUF file (the kind is told by its content), or a Hugging Face folder with
    /// `model.safetensors`, or with the shards that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// When a file cannot be read or is damaged; the message says where.
    pub fn open(path: &Path) -> Result<Checkpoint, Error> {
        let folder = path.is_dir();
        let files = if folder { shards(path)? } else { vec![path.to_path_buf()] };
        let mut ckpt = Checkpoint::empty(path);
        for file in &files {
            ckpt.add(file, map(file)?)?;
        }
        if folder && let Some(text) = read_text(&path.join(CONFIG_JSON))? {
            ckpt.metadata.insert(CONFIG_JSON.into(), text);
        }
        ckpt.finish()
    }

    /// A `.pth`, safetensors or GGUF file that is part of the program; `name` stands for it in messages.
    ///
    /// # Errors
    /// When it is damaged.
    pub fn from_static(name: &str, bytes: &'static [u8]) -> Result<Checkpoint, Error> {
        let path = Path::new(name);
        let mut ckpt = Checkpoint::empty(path);
        ckpt.add(path, Bytes::Static(bytes))?;
        ckpt.finish()
    }

    fn empty(path: &Path) -> Checkpoint {
        Checkpoint {
            path: path.into(),
            maps: Vec::new(),
            entries: BTreeMap::new(),
            scales: BTreeMap::new(),
            metadata: BTreeMap::new(),
            members: Vec::new(),
            format: Format::Safetensors,
            naming: Naming::Official,
        }
    }

    /// Adds a file's tensors and metadata.
    fn add(&mut self, file: &Path, bytes: Bytes) -> Result<(), Error> {
        self.format = format(&bytes);
        let (entries, metadata) = match self.format {
            Format::Pth => pth::read(&bytes).map(|(entries, members)| {
                self.members.extend(members.into_iter().map(|m| (self.maps.len(), m)));
                (entries, BTreeMap::new())
            }),
            Format::Gguf => gguf::read(&bytes),
            Format::Safetensors => safetensors::read(&bytes),
        }
        .map_err(|reason| {
            // A pickle at the top is the format that PyTorch wrote before 1.6.
            let old = matches!(*bytes, [0x80, 2..=5, ..]);
            let advice = "this is PyTorch's old format (before 1.6); load and save it again with a current torch";
            malformed(file, if old { advice.into() } else { reason })
        })?;
        for (name, entry) in entries {
            if self.entries.insert(name.clone(), Entry { file: self.maps.len(), ..entry }).is_some() {
                return Err(malformed(file, format!("tensor {name} is also in another file of this folder")));
            }
        }
        self.metadata.extend(metadata);
        self.maps.push(bytes);
        Ok(())
    }

    /// Sees what is in the files under the official names.
    fn finish(mut self) -> Result<Checkpoint, Error> {
        let wrong = |reason| malformed(&self.path, reason);
        self.scales = coded::scales(&mut self.entries, &self.metadata).map_err(wrong)?;
        let entries = std::mem::take(&mut self.entries);
        (self.naming, self.entries) = match () {
            _ if self.format == Format::Gguf => {
                (Naming::LlamaCpp, llama::to_official(entries, &self.metadata).map_err(wrong)?)
            }
            _ if huggingface::is(&entries) => (Naming::HuggingFace, huggingface::to_official(entries).map_err(wrong)?),
            _ if web_rwkv::is(&entries) => (Naming::WebRwkv, web_rwkv::to_official(entries)),
            _ => (Naming::Official, entries),
        };
        Ok(self)
    }

    /// Reads all of the file and compares it with its checksums, where it has any: a `.pth` file does.
    ///
    /// # Errors
    /// When something in it is not what was written.
    pub fn verify(&self) -> Result<(), Error> {
        match self.members.iter().find(|(file, member)| !member.is_whole(&self.maps[*file])) {
            Some((_, member)) => {
                let name = &member.name;
                Err(malformed(
                    &self.path,
                    format!("{name} in it is damaged, by its checksum: copy or download the file again"),
                ))
            }
            None => Ok(()),
        }
    }

    /// The file or folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The kind of file.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Whose names the file has.
    pub fn naming(&self) -> Naming {
        self.naming
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
    pub fn get(&self, name: &str) -> Option<TensorView<'_>> {
        let (name, entry) = self.entries.get_key_value(name)?;
        let scale = self.scales.get(name).map(|e| &self.maps[e.file][e.start..e.end]);
        Some(TensorView { name, entry, map: &self.maps[entry.file], scale })
    }

    /// Metadata strings of a safetensors file (`__metadata__`), for a folder also its [`CONFIG_JSON`]; those of a GGUF file as text, arrays by
    /// their length.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}

fn malformed(path: &Path, reason: String) -> Error {
    Error::Malformed { path: path.into(), reason }
}

/// A small text file, if it exists.
fn read_text(path: &Path) -> Result<Option<String>, Error> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io(path, "read", e)),
    }
}

/// The weight files of a Hugging Face folder.
fn shards(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let index = folder.join("model.safetensors.index.json");
    if let Some(text) = read_text(&index)? {
        #[derive(serde::Deserialize)]
        struct Index {
            weight_map: BTreeMap<String, String>,
        }
        let parsed: Index =
            serde_json::from_str(&text).map_err(|e| malformed(&index, format!("not an index of shards: {e}")))?;
        let mut names: Vec<String> = parsed.weight_map.into_values().collect();
        names.sort_unstable();
        names.dedup();
        // A shard lies in the folder itself; a name that leads elsewhere is not followed.
        if let Some(bad) = names.iter().find(|n| Path::new(n).file_name() != Some(n.as_ref())) {
            return Err(malformed(&index, format!("shard {bad:?} is not a file of this folder")));
        }
        return Ok(names.into_iter().map(|n| folder.join(n)).collect());
    }
    let single = folder.join("model.safetensors");
    match single.exists() {
        true => Ok(vec![single]),
        false => {
            let reason = "no model.safetensors in this folder; name the .pth, .safetensors or .gguf file itself";
            Err(malformed(folder, reason.into()))
        }
    }
}

fn map(path: &Path) -> Result<Bytes, Error> {
    let file = File::open(path).map_err(|e| Error::io(path, "open", e))?;
    // SAFETY: the map is read-only. Another process that truncates the file under us can kill this one with a bus
    // error, as with every memory-mapped reader; our own writers replace files instead of changing them.
    let map = unsafe { Mmap::map(&file) }.map_err(|e| Error::io(path, "memory-map", e))?;
    Ok(Bytes::Mapped(map))
}

/// The kind of a file, by its first bytes.
fn format(bytes: &[u8]) -> Format {
    match bytes {
        [b'P', b'K', ..] => Format::Pth,
        _ if bytes.starts_with(gguf::MAGIC) => Format::Gguf,
        _ => Format::Safetensors,
    }
}
