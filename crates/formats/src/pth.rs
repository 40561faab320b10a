//! PyTorch's zip format: `NAME/data.pkl` describes the tensors, `NAME/data/KEY` holds their storages.

use crate::pickle::{self, PickledTensor, Value};
use crate::{AtomicFile, Dtype, Entry, Error, Source, zip};
use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;

/// The tensors of a `.pth` file, and the members of the archive, of which each has a checksum.
pub(crate) fn read(file: &[u8]) -> Result<(BTreeMap<String, Entry>, Vec<zip::Member>), String> {
    let members = zip::members(file)?;
    let pickle = members.iter().find(|m| m.name.ends_with("/data.pkl") || m.name == "data.pkl");
    let pickle = pickle.ok_or("a zip archive without data.pkl: not a PyTorch file")?;
    let root = pickle.name.strip_suffix("data.pkl").unwrap_or_default();
    let storages: HashMap<&str, (usize, usize)> = members
        .iter()
        .filter_map(|m| Some((m.name.strip_prefix(root)?.strip_prefix("data/")?, (m.start, m.end))))
        .collect();
    let mut entries = BTreeMap::new();
    for (name, tensor) in tensors(&pickle::load(&file[pickle.start..pickle.end])?)? {
        let entry = entry(&tensor, &storages).map_err(|reason| format!("tensor {name}: {reason}"))?;
        if entries.insert(name.clone(), entry).is_some() {
            return Err(format!("tensor {name} occurs twice"));
        }
    }
    Ok((entries, members))
}

/// The named tensors of a dictionary, or of the one inside it called "state_dict" or "model".
fn tensors(root: &Value) -> Result<Vec<(String, std::rc::Rc<PickledTensor>)>, String> {
    let Value::Dict(items, _) = root else { return Err("the file holds no dictionary of tensors".into()) };
    let mut found = Vec::new();
    for (key, value) in items.iter() {
        match (key, value) {
            (Value::Text(name), Value::Tensor(t)) => found.push((name.to_string(), t.clone())),
            (Value::Text(name), Value::Dict(..)) if matches!(&**name, "state_dict" | "model") => return tensors(value),
            _ => {}
        }
    }
    if found.is_empty() {
        return Err("the file holds no tensors".into());
    }
    Ok(found)
}

fn entry(t: &PickledTensor, storages: &HashMap<&str, (usize, usize)>) -> Result<Entry, String> {
    let &(start, end) = storages.get(&*t.storage).ok_or("its data is missing from the archive")?;
    let size = t.dtype.size();
    let overflow = || "its shape is impossible".to_string();
    let elements = t.shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d)).ok_or_else(overflow)?;
    // One past the last element it reaches.
    let reach = match elements {
        0 => 0,
        _ => {
            let last =
                t.shape.iter().zip(&t.strides).try_fold(0usize, |at, (&d, &s)| at.checked_add((d - 1).checked_mul(s)?));
            last.and_then(|l| l.checked_add(1)).ok_or_else(overflow)?
        }
    };
    let from = t.offset.checked_mul(size).and_then(|o| o.checked_add(start)).ok_or_else(overflow)?;
    let to = reach.checked_mul(size).and_then(|r| r.checked_add(from)).ok_or_else(overflow)?;
    if to > end {
        return Err(format!("shape {:?} needs more data than the archive holds for it", t.shape));
    }
    // A broadcast tensor (stride 0) could claim any number of elements: its file would be smaller than itself.
    if elements > reach {
        return Err("its elements overlap; save a contiguous copy".into());
    }
    let mut expected = 1;
    let mut contiguous = true;
    for (&d, &s) in t.shape.iter().zip(&t.strides).rev() {
        contiguous &= d == 1 || s == expected;
        expected *= d;
    }
    let strides = (!contiguous && elements > 0).then(|| t.strides.clone());
    Ok(Entry { dtype: t.dtype, shape: t.shape.clone(), strides, start: from, end: to, file: 0 })
}

/// Writes a `.pth` file that `torch.load` and the official `rwkv` package read, atomically and tensor by tensor.
///
/// # Errors
/// When a tensor's values don't fit its shape, one is larger than 4 GiB or writing fails; an existing file is then untouched.
pub fn write_pth(path: &Path, tensors: &[Source<'_>]) -> Result<(), Error> {
    let mut zip = ZipWriter { file: AtomicFile::create(path)?, at: 0, directory: Vec::new(), members: 0, path };
    let pickle = pickled(tensors)?;
    zip.member("archive/data.pkl", |out| Ok(out(&pickle)))?;
    zip.member("archive/byteorder", |out| Ok(out(b"little")))?;
    for (i, t) in tensors.iter().enumerate() {
        if t.bytes() >= u32::MAX as usize {
            return Err(Error::Tensor { name: t.name.clone(), reason: "larger than 4 GiB; write safetensors".into() });
        }
        zip.member(&format!("archive/data/{i}"), |out| t.write(out))?;
    }
    zip.member("archive/version", |out| Ok(out(b"3\n")))?;
    zip.finish()
}

/// The protocol-2 pickle of an OrderedDict of tensors.
fn pickled(tensors: &[Source<'_>]) -> Result<Vec<u8>, Error> {
    fn text(p: &mut Vec<u8>, s: &str) {
        p.push(b'X');
        p.extend((s.len() as u32).to_le_bytes());
        p.extend(s.as_bytes());
    }
    fn int(p: &mut Vec<u8>, v: usize) {
        match i32::try_from(v) {
            Ok(v) => {
                p.push(b'J');
                p.extend(v.to_le_bytes());
            }
            Err(_) => {
                p.extend([0x8a, 8]);
                p.extend((v as u64).to_le_bytes());
            }
        }
    }
    let mut p = b"\x80\x02ccollections\nOrderedDict\n)R(".to_vec();
    for (i, t) in tensors.iter().enumerate() {
        let class = match t.dtype {
            Dtype::F32 => "FloatStorage",
            Dtype::F16 => "HalfStorage",
            Dtype::BF16 => "BFloat16Storage",
            other => {
                let reason = format!("cannot be written as {other}: use F32, F16 or BF16");
                return Err(Error::Tensor { name: t.name.clone(), reason });
            }
        };
        text(&mut p, &t.name);
        p.extend(b"ctorch._utils\n_rebuild_tensor_v2\n((");
        text(&mut p, "storage");
        p.extend(format!("ctorch\n{class}\n").bytes());
        text(&mut p, &i.to_string());
        text(&mut p, "cpu");
        int(&mut p, t.shape.iter().product());
        p.extend(b"tQ");
        int(&mut p, 0);
        p.push(b'(');
        t.shape.iter().for_each(|&d| int(&mut p, d));
        p.extend(b"t(");
        (0..t.shape.len()).for_each(|d| int(&mut p, t.shape[d + 1..].iter().product()));
        // requires_grad, no hooks (an empty OrderedDict).
        p.extend(b"t\x89ccollections\nOrderedDict\n)RtR");
    }
    p.extend(b"u.");
    Ok(p)
}

struct ZipWriter<'a> {
    file: AtomicFile,
    at: u64,
    directory: Vec<u8>,
    members: u64,
    path: &'a Path,
}

/// Contents go out in pieces.
type Piece<'a> = &'a mut dyn FnMut(&[u8]) -> std::io::Result<()>;

impl ZipWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.at += bytes.len() as u64;
        self.file.write_all(bytes).map_err(|e| Error::io(self.path, "write", e))
    }

    /// One stored member whose contents start at a multiple of 64. Its checksum follows it (a data descriptor), so
    /// that the contents are produced once.
    fn member(
        &mut self, name: &str, contents: impl FnOnce(Piece<'_>) -> Result<std::io::Result<()>, Error>,
    ) -> Result<(), Error> {
        let start = self.at;
        let head = 30 + name.len() as u64 + 4;
        let pad = (start + head).next_multiple_of(64) - start - head;
        let extra = [&b"FB"[..], &(pad as u16).to_le_bytes(), &vec![0; pad as usize]].concat();
        let mut local = b"PK\x03\x04\x14\0\x08\0\0\0\0\0\0\0".to_vec();
        local.extend([0; 12]);
        local.extend((name.len() as u16).to_le_bytes());
        local.extend((extra.len() as u16).to_le_bytes());
        local.extend(name.as_bytes());
        local.extend(extra);
        self.write(&local)?;
        let (mut crc, mut size) = (crc32fast::Hasher::new(), 0u32);
        let file = &mut self.file;
        contents(&mut |bytes| {
            crc.update(bytes);
            size += bytes.len() as u32;
            file.write_all(bytes)
        })?
        .map_err(|e| Error::io(self.path, "write", e))?;
        self.at += size as u64;
        let sums = [crc.finalize().to_le_bytes(), size.to_le_bytes(), size.to_le_bytes()].concat();
        self.write(&[b"PK\x07\x08", &sums[..]].concat())?;

        let wide = start >= u32::MAX as u64;
        let extra = if wide { [&[1, 0, 8, 0][..], &start.to_le_bytes()].concat() } else { Vec::new() };
        let d = &mut self.directory;
        d.extend(if wide { b"PK\x01\x02\x2d\0\x2d\0" } else { b"PK\x01\x02\x14\0\x14\0" });
        d.extend(b"\x08\0\0\0\0\0\0\0");
        d.extend(sums);
        d.extend((name.len() as u16).to_le_bytes());
        d.extend((extra.len() as u16).to_le_bytes());
        d.extend([0; 10]);
        d.extend(u32::try_from(start).unwrap_or(u32::MAX).to_le_bytes());
        d.extend(name.as_bytes());
        d.extend(extra);
        self.members += 1;
        Ok(())
    }

    fn finish(mut self) -> Result<(), Error> {
        let (start, size, n) = (self.at, self.directory.len() as u64, self.members);
        let directory = std::mem::take(&mut self.directory);
        self.write(&directory)?;
        if start + size >= u32::MAX as u64 || n >= u16::MAX as u64 {
            let record = self.at;
            let mut r = b"PK\x06\x06".to_vec();
            r.extend(44u64.to_le_bytes());
            r.extend([45, 0, 45, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
            [n, n, size, start].iter().for_each(|v| r.extend(v.to_le_bytes()));
            r.extend(b"PK\x06\x07\0\0\0\0");
            r.extend(record.to_le_bytes());
            r.extend(1u32.to_le_bytes());
            self.write(&r)?;
        }
        let n = u16::try_from(n).unwrap_or(u16::MAX);
        let mut end = b"PK\x05\x06\0\0\0\0".to_vec();
        end.extend(n.to_le_bytes());
        end.extend(n.to_le_bytes());
        end.extend(u32::try_from(size).unwrap_or(u32::MAX).to_le_bytes());
        end.extend(u32::try_from(start).unwrap_or(u32::MAX).to_le_bytes());
        end.extend([0, 0]);
        self.write(&end)?;
        self.file.commit()
    }
}
