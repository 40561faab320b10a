//! safetensors: u64 header length, JSON header, data.

use crate::{AtomicFile, Dtype, Entry, Error, Source};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

/// The format's own limit.
const MAX_HEADER: usize = 100_000_000;

pub(crate) type Contents = (BTreeMap<String, Entry>, BTreeMap<String, String>);

/// Reads and checks the header.
pub(crate) fn read(file: &[u8]) -> Result<Contents, String> {
    let Some((len, rest)) = file.split_first_chunk::<8>() else {
        return Err("neither a .pth nor a GGUF nor a safetensors file (it is shorter than 8 bytes)".into());
    };
    let len = u64::from_le_bytes(*len);
    let len = usize::try_from(len).ok().filter(|&l| l <= MAX_HEADER && l <= rest.len()).ok_or_else(|| {
        format!(
            "neither a .pth nor a GGUF nor a complete safetensors file (header of {len} bytes in a file of {})",
            file.len()
        )
    })?;
    let (header, data) = rest.split_at(len);
    let header: serde_json::Map<String, Value> =
        serde_json::from_slice(header).map_err(|e| format!("not a safetensors file: bad header: {e}"))?;
    let (mut entries, mut metadata) = (BTreeMap::new(), BTreeMap::new());
    let mut ranges = Vec::new();
    for (name, value) in header {
        if name == "__metadata__" {
            metadata = serde_json::from_value(value).map_err(|e| format!("bad __metadata__: {e}"))?;
            continue;
        }
        let field = |key: &str| value.get(key).ok_or_else(|| format!("tensor {name}: no {key:?} in the header"));
        let dtype = field("dtype")?.as_str().and_then(Dtype::from_name);
        let dtype = dtype.ok_or_else(|| format!("tensor {name}: unknown dtype {}", value["dtype"]))?;
        let list = |key: &str| -> Result<Vec<usize>, String> {
            serde_json::from_value(field(key)?.clone()).map_err(|e| format!("tensor {name}: bad {key:?}: {e}"))
        };
        let shape = list("shape")?;
        let offsets = list("data_offsets")?;
        let [start, end] = offsets[..] else { return Err(format!("tensor {name}: data_offsets must be two numbers")) };
        let bytes = shape.iter().try_fold(dtype.size(), |n, &d| n.checked_mul(d));
        if start > end || end > data.len() {
            return Err(format!(
                "tensor {name} lies at bytes {start}..{end} of {}: the file is truncated or damaged",
                data.len()
            ));
        }
        if bytes != Some(end - start) {
            return Err(format!("tensor {name}: shape {shape:?} of {dtype} does not fit {} bytes", end - start));
        }
        ranges.push((start, end));
        let base = 8 + len;
        entries.insert(name, Entry { dtype, shape, strides: None, start: base + start, end: base + end, file: 0 });
    }
    ranges.sort_unstable();
    if ranges.windows(2).any(|w| w[0].1 > w[1].0) {
        return Err("tensors overlap in the file: it is damaged".into());
    }
    Ok((entries, metadata))
}

/// Writes a safetensors file atomically, tensor by tensor.
///
/// # Errors
/// When a tensor's values don't fit its shape or writing fails; an existing file is then untouched.
pub fn write_safetensors(
    path: &Path, tensors: &[Source<'_>], metadata: &BTreeMap<String, String>,
) -> Result<(), Error> {
    let mut header = serde_json::Map::new();
    if !metadata.is_empty() {
        header.insert("__metadata__".into(), serde_json::json!(metadata));
    }
    let mut at = 0;
    for t in tensors {
        if t.dtype.block() != 1 {
            let reason = format!("a safetensors file cannot hold {}: use F32, F16 or BF16", t.dtype);
            return Err(Error::Tensor { name: t.name.clone(), reason });
        }
        let end = at + t.bytes();
        let entry = serde_json::json!({ "dtype": t.dtype.name(), "shape": t.shape, "data_offsets": [at, end] });
        if header.insert(t.name.clone(), entry).is_some() {
            return Err(Error::Tensor { name: t.name.clone(), reason: "two tensors have this name".into() });
        }
        at = end;
    }
    let mut header = serde_json::to_string(&header).unwrap_or_default();
    // Data starts at a multiple of 8.
    while !header.len().is_multiple_of(8) {
        header.push(' ');
    }
    let mut file = AtomicFile::create(path)?;
    let io = |e| Error::io(path, "write", e);
    file.write_all(&(header.len() as u64).to_le_bytes()).map_err(io)?;
    file.write_all(header.as_bytes()).map_err(io)?;
    for t in tensors {
        t.write(|bytes| file.write_all(bytes))?.map_err(io)?;
    }
    file.commit()
}
