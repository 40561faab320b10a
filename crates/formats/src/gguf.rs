//! GGUF, llama.cpp's container: metadata, names of tensors with their shapes, types and places, then data.
//!
//! Numbers are little-endian, strings are a u64 length and bytes. Dimensions come innermost first; here they are turned round.

use crate::safetensors::Contents;
use crate::{AtomicFile, Dtype, Entry, Error, Source};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

pub(crate) const MAGIC: &[u8; 4] = b"GGUF";
/// Where tensors begin unless the metadata says otherwise: at multiples of this.
const ALIGNMENT: usize = 32;
/// Types of metadata values: the unsigned and signed numbers of 8, 16 and 32 bits, f32, bool, string, array, those of 64 bits, f64.
const U32: u32 = 4;
const I32: u32 = 5;
const F32: u32 = 6;
const STRING: u32 = 8;
const ARRAY: u32 = 9;

/// Reads and checks everything before the data. Nothing is allocated by a number that the file gives.
pub(crate) fn read(file: &[u8]) -> Result<Contents, String> {
    let mut r = Reader { file, at: MAGIC.len() };
    match r.u32()? {
        2 | 3 => {}
        v if v.swap_bytes() < 16 && v >= 1 << 16 => {
            return Err("a GGUF file in big-endian order; only little-endian ones load".into());
        }
        v => return Err(format!("GGUF version {v}; versions 2 and 3 load")),
    }
    let (tensors, pairs) = (r.u64()?, r.u64()?);
    let mut metadata = BTreeMap::new();
    for _ in 0..pairs {
        let key = r.name()?;
        let kind = r.u32()?;
        let value = r.value(kind, 0).map_err(|e| format!("metadata {key}: {e}"))?;
        if metadata.insert(key.clone(), value).is_some() {
            return Err(format!("metadata {key} occurs twice"));
        }
    }
    let alignment = match metadata.get("general.alignment") {
        None => ALIGNMENT,
        Some(text) => {
            let power = text.parse().ok().filter(|a: &usize| a.is_power_of_two() && *a <= 1 << 20);
            power.ok_or_else(|| format!("general.alignment is {text}: the file is damaged"))?
        }
    };
    let mut infos = Vec::new();
    for _ in 0..tensors {
        let name = r.name()?;
        let info = r.tensor().map_err(|e| format!("tensor {name}: {e}"))?;
        infos.push((name, info));
    }
    let data = r.at.next_multiple_of(alignment);
    let mut entries = BTreeMap::new();
    let mut ranges = Vec::new();
    for (name, Info { shape, dtype, offset }) in infos {
        let bytes = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
        let bytes = bytes.and_then(|n| (n / dtype.block()).checked_mul(dtype.size()));
        let start = usize::try_from(offset).ok().and_then(|o| o.checked_add(data));
        let end = start.zip(bytes).and_then(|(start, bytes)| start.checked_add(bytes));
        let (Some(start), Some(end)) = (start, end.filter(|&end| end <= file.len())) else {
            return Err(format!(
                "tensor {name}, {dtype} {shape:?} from byte {offset} of the data on, is not all in the file: it is truncated or damaged"
            ));
        };
        ranges.push((start, end));
        if entries.insert(name.clone(), Entry { dtype, shape, strides: None, start, end, file: 0 }).is_some() {
            return Err(format!("tensor {name} occurs twice"));
        }
    }
    ranges.sort_unstable();
    if ranges.windows(2).any(|w| w[0].1 > w[1].0) {
        return Err("tensors overlap in the file: it is damaged".into());
    }
    Ok((entries, metadata))
}

struct Info {
    shape: Vec<usize>,
    dtype: Dtype,
    offset: u64,
}

struct Reader<'a> {
    file: &'a [u8],
    at: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: u64) -> Result<&'a [u8], String> {
        let rest = &self.file[self.at..];
        let len = usize::try_from(len).ok().filter(|&l| l <= rest.len());
        let len = len.ok_or("the file ends before its tensors begin: it is truncated or damaged")?;
        self.at += len;
        Ok(&rest[..len])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N as u64)?);
        Ok(out)
    }

    fn u32(&mut self) -> Result<u32, String> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, String> {
        self.array().map(u64::from_le_bytes)
    }

    fn string(&mut self) -> Result<&'a [u8], String> {
        let len = self.u64()?;
        self.take(len)
    }

    /// Of a tensor or of a metadata value.
    fn name(&mut self) -> Result<String, String> {
        let bytes = self.string()?;
        let text = std::str::from_utf8(bytes).map_err(|_| "a name is no text: the file is damaged")?;
        Ok(text.to_string())
    }

    /// A metadata value as text; an array is passed over and gives its length.
    fn value(&mut self, kind: u32, depth: usize) -> Result<String, String> {
        Ok(match kind {
            0 => u8::from_le_bytes(self.array()?).to_string(),
            1 => i8::from_le_bytes(self.array()?).to_string(),
            2 => u16::from_le_bytes(self.array()?).to_string(),
            3 => i16::from_le_bytes(self.array()?).to_string(),
            U32 => self.u32()?.to_string(),
            I32 => i32::from_le_bytes(self.array()?).to_string(),
            F32 => f32::from_le_bytes(self.array()?).to_string(),
            7 => (self.array::<1>()? != [0]).to_string(),
            STRING => String::from_utf8_lossy(self.string()?).into_owned(),
            ARRAY => {
                let (of, len) = (self.u32()?, self.u64()?);
                match of {
                    0 | 1 | 7 => drop(self.take(len)?),
                    2 | 3 => drop(self.take(len.saturating_mul(2))?),
                    U32 | I32 | F32 => drop(self.take(len.saturating_mul(4))?),
                    10..=12 => drop(self.take(len.saturating_mul(8))?),
                    STRING => (0..len).try_for_each(|_| self.string().map(drop))?,
                    ARRAY if depth < 4 => (0..len).try_for_each(|_| self.value(ARRAY, depth + 1).map(drop))?,
                    _ => return Err(format!("an array of type {of}: the file is damaged")),
                }
                format!("[{len} values]")
            }
            10 => self.u64()?.to_string(),
            11 => i64::from_le_bytes(self.array()?).to_string(),
            12 => f64::from_le_bytes(self.array()?).to_string(),
            _ => return Err(format!("type {kind}: the file is damaged")),
        })
    }

    fn tensor(&mut self) -> Result<Info, String> {
        let rank = self.u32()?;
        if rank > 4 {
            return Err(format!("{rank} dimensions: the file is damaged"));
        }
        let mut shape = Vec::new();
        for _ in 0..rank {
            shape.push(usize::try_from(self.u64()?).map_err(|_| "its shape is impossible")?);
        }
        shape.reverse();
        let dtype = dtype(self.u32()?)?;
        if !shape.last().unwrap_or(&1).is_multiple_of(dtype.block()) {
            return Err(format!(
                "rows of {shape:?} are no multiple of the {} values of a block of {dtype}",
                dtype.block()
            ));
        }
        Ok(Info { shape, dtype, offset: self.u64()? })
    }
}

/// Numbers of the types of tensors that can be read.
const TYPES: [(u32, Dtype); 16] = [
    (0, Dtype::F32),
    (1, Dtype::F16),
    (2, Dtype::Q4_0),
    (3, Dtype::Q4_1),
    (6, Dtype::Q5_0),
    (7, Dtype::Q5_1),
    (8, Dtype::Q8_0),
    (12, Dtype::Q4K),
    (13, Dtype::Q5K),
    (14, Dtype::Q6K),
    (24, Dtype::I8),
    (25, Dtype::I16),
    (26, Dtype::I32),
    (27, Dtype::I64),
    (28, Dtype::F64),
    (30, Dtype::BF16),
];

fn dtype(number: u32) -> Result<Dtype, String> {
    if let Some((_, dtype)) = TYPES.iter().find(|(n, _)| *n == number) {
        return Ok(*dtype);
    }
    let name = match number {
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        39 => "MXFP4",
        _ => return Err(format!("it has the unknown type {number}")),
    };
    Err(format!("it is quantised as {name}, which cannot be read: use F32, F16, BF16, Q8_0, Q6_K, Q5_K, Q4_K or Q4_0"))
}

/// A metadata value to be written.
#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    /// A whole number.
    U32(u32),
    /// A number.
    F32(f32),
    /// A string.
    Text(String),
    /// An array of strings.
    Texts(Vec<String>),
    /// An array of whole numbers.
    I32s(Vec<i32>),
}

/// Metadata to be written, in this order.
pub type Metadata = Vec<(String, Value)>;

/// Writes a GGUF file (version 3) atomically, tensor by tensor.
///
/// # Errors
/// When a tensor's values don't fit its shape, its type is none of the format or writing fails; an existing file is then untouched.
pub fn write_gguf(path: &Path, tensors: &[Source<'_>], metadata: &[(String, Value)]) -> Result<(), Error> {
    let mut head = MAGIC.to_vec();
    head.extend(3u32.to_le_bytes());
    head.extend((tensors.len() as u64).to_le_bytes());
    head.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        text(&mut head, key);
        match value {
            Value::U32(v) => head.extend([U32.to_le_bytes(), v.to_le_bytes()].concat()),
            Value::F32(v) => head.extend([F32.to_le_bytes(), v.to_le_bytes()].concat()),
            Value::Text(v) => {
                head.extend(STRING.to_le_bytes());
                text(&mut head, v);
            }
            Value::Texts(list) => {
                array(&mut head, STRING, list.len());
                list.iter().for_each(|v| text(&mut head, v));
            }
            Value::I32s(list) => {
                array(&mut head, I32, list.len());
                list.iter().for_each(|v| head.extend(v.to_le_bytes()));
            }
        }
    }
    let mut at = 0usize;
    for t in tensors {
        let error = |reason| Error::Tensor { name: t.name.clone(), reason };
        let number = TYPES.iter().find(|(_, dtype)| *dtype == t.dtype).map(|(n, _)| *n);
        let number = number.ok_or_else(|| error(format!("a GGUF file cannot hold {}", t.dtype)))?;
        if !t.shape.last().unwrap_or(&1).is_multiple_of(t.dtype.block()) {
            return Err(error(format!(
                "rows of {:?} are no multiple of the {} values of a block of {}",
                t.shape,
                t.dtype.block(),
                t.dtype
            )));
        }
        text(&mut head, &t.name);
        head.extend((t.shape.len() as u32).to_le_bytes());
        t.shape.iter().rev().for_each(|&d| head.extend((d as u64).to_le_bytes()));
        head.extend(number.to_le_bytes());
        head.extend((at as u64).to_le_bytes());
        at = (at + t.bytes()).next_multiple_of(ALIGNMENT);
    }
    head.resize(head.len().next_multiple_of(ALIGNMENT), 0);
    let mut file = AtomicFile::create(path)?;
    let io = |e| Error::io(path, "write", e);
    file.write_all(&head).map_err(io)?;
    for t in tensors {
        t.write(|bytes| file.write_all(bytes))?.map_err(io)?;
        file.write_all(&[0; ALIGNMENT][..t.bytes().next_multiple_of(ALIGNMENT) - t.bytes()]).map_err(io)?;
    }
    file.commit()
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}

fn array(out: &mut Vec<u8>, of: u32, len: usize) {
    out.extend(ARRAY.to_le_bytes());
    out.extend(of.to_le_bytes());
    out.extend((len as u64).to_le_bytes());
}
