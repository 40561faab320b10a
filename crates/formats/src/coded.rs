//! Matrices in 8, 5 or 4 bits, in safetensors files.
//!
//! A matrix `<name>` [out, in] is stored as codes beside `<name>.scale` F16, one scale for a group of inputs of an output:
//!
//! | | `<name>` | `<name>.scale` | element (o, i) | metadata |
//! | --- | --- | --- | --- | --- |
//! | int8 | I8 [out, in], -127 to 127 | [out, ceil(in / 64)] | `q[o, i] * scale[o, i / 64]` | `anser.int8 = "64"` |
//! | q4 | U8 [out, in / 2], in a multiple of 32 | [out, in / 32] | `VALUES[q[o, i]] * scale[o, i / 32]` | `anser.q4 = "32"` |
//! | q5 | U8 [out, in / 32, 20] | [out, in / 32] | `(q[o, i] - 16) * scale[o, i / 32]` | `anser.q5 = "32"` |
//!
//! Of a byte of q4 the low half is the code of the even input, the high half of the odd one after it; [`VALUES`] says what the 16 codes stand for. The 20 bytes of
//! q5 are 16 with the low four bits of codes likewise, then 32 bits, the high ones, that of the first input lowest. A file may have matrices of
//! all kinds; everything else is floats. [`crate::Checkpoint`] shows a pair as one tensor, whose values it gives multiplied.

use crate::{Dtype, Entry, Error, Source, TensorView};
use half::f16;
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

/// What the codes of 4 bits stand for, times the scale.
pub const VALUES: [i8; 16] = [-127, -101, -79, -61, -46, -32, -19, -7, 5, 17, 29, 42, 56, 72, 90, 112];
/// The byte that is no code of 8 bits, -128: whoever reads it has a damaged file.
pub const NO_CODE: u8 = 0x80;
const SCALE: &str = ".scale";

/// A kind of coded matrices: its type in [`crate::Checkpoint`], that of its codes in the file, the key of the metadata that says so, and the inputs that share a scale.
struct Kind {
    dtype: Dtype,
    stored: Dtype,
    key: &'static str,
    group: usize,
}

const KINDS: [Kind; 3] = [
    Kind { dtype: Dtype::I8, stored: Dtype::I8, key: "anser.int8", group: 64 },
    Kind { dtype: Dtype::Q4, stored: Dtype::U8, key: "anser.q4", group: 32 },
    Kind { dtype: Dtype::Q5, stored: Dtype::U8, key: "anser.q5", group: 32 },
];

fn kind(dtype: Dtype) -> &'static Kind {
    KINDS.iter().find(|k| k.dtype == dtype).unwrap_or(&KINDS[0])
}

/// The keys and values of the metadata of a file with matrices of these types, and nothing for other ones.
pub fn metadata(types: &[Dtype]) -> impl Iterator<Item = (String, String)> {
    KINDS.iter().filter(|k| types.contains(&k.dtype)).map(|k| (k.key.into(), k.group.to_string()))
}

/// Whether the metadata speaks of coded matrices under this key.
pub fn is_key(key: &str) -> bool {
    KINDS.iter().any(|k| k.key == key)
}

/// A coded matrix as its file has it.
#[derive(Clone, Copy)]
pub struct Coded<'a> {
    /// [`Dtype::I8`], [`Dtype::Q4`] or [`Dtype::Q5`].
    pub dtype: Dtype,
    inputs: usize,
    codes: &'a [u8],
    scales: &'a [[u8; 2]],
}

impl<'a> Coded<'a> {
    pub(crate) fn new(dtype: Dtype, inputs: usize, codes: &'a [u8], scales: &'a [u8]) -> Coded<'a> {
        Coded { dtype, inputs, codes, scales: scales.as_chunks().0 }
    }

    /// The codes of output `o`, one a byte or two, and the scales of its groups in f16, little-endian.
    pub fn row(&self, o: usize) -> (&'a [u8], &'a [[u8; 2]]) {
        let bytes = self.inputs / self.dtype.block() * self.dtype.size();
        let groups = self.inputs.div_ceil(kind(self.dtype).group);
        (&self.codes[o * bytes..(o + 1) * bytes], &self.scales[o * groups..(o + 1) * groups])
    }

    /// `out.len()` elements from the `start`-th on.
    pub(crate) fn read(&self, start: usize, out: &mut [f32]) {
        let (inputs, group) = (self.inputs, kind(self.dtype).group);
        let per_row = inputs.div_ceil(group);
        let mut done = 0;
        while done < out.len() {
            let at = start + done;
            let (row, col) = (at / inputs, at % inputs);
            // To the end of the group or of the row.
            let n = (group - col % group).min(inputs - col).min(out.len() - done);
            let scale = f16::from_le_bytes(self.scales[row * per_row + col / group]).to_f32();
            for (i, o) in (at..at + n).zip(&mut out[done..done + n]) {
                *o = scale
                    * match self.dtype {
                        Dtype::Q4 => VALUES[usize::from(half(self.codes, i))].into(),
                        Dtype::Q5 => {
                            let of = &self.codes[i / 32 * 20..][..20];
                            let high = of[16 + i % 32 / 8] >> (i % 8) & 1;
                            f32::from((half(of, i % 32) | high << 4) as i8 - 16)
                        }
                        _ if self.codes[i] == NO_CODE => f32::NAN,
                        _ => f32::from(self.codes[i] as i8),
                    };
            }
            done += n;
        }
    }
}

/// Code `i` of two a byte.
fn half(codes: &[u8], i: usize) -> u8 {
    codes[i / 2] >> (i % 2 * 4) & 15
}

/// Codes of a matrix as bytes, and the scales.
pub type Codes = (Vec<u8>, Vec<f16>);

/// The two tensors in which the matrix `t` [out, in] is stored as `dtype`, I8, Q4 or Q5; `code` gives codes and scales of its values in the layout of files. A matrix that is
/// coded so already is copied.
pub fn sources<'a>(
    t: TensorView<'a>, dtype: Dtype, code: impl Fn(&[f32]) -> Codes + 'a,
) -> Result<[Source<'a>; 2], Error> {
    let Kind { stored, group, .. } = *kind(dtype);
    let &[out, inputs] = t.shape() else {
        let reason = format!("{:?} is no matrix and cannot be coded", t.shape());
        return Err(Error::Tensor { name: t.name().into(), reason });
    };
    // Both tensors come of the same work: the scales wait for their turn.
    let waiting: Rc<RefCell<Option<Vec<f16>>>> = Rc::default();
    let work = move || -> Result<Codes, Error> {
        let (codes, scales) = match t.coded().filter(|c| c.dtype == dtype) {
            Some(c) => (c.codes.to_vec(), c.scales.iter().map(|s| f16::from_le_bytes(*s)).collect()),
            None => code(&t.to_f32_vec()?),
        };
        t.release();
        Ok((codes, scales))
    };
    let work = Rc::new(work);
    let (codes, later) = ((work.clone(), waiting.clone()), (work, waiting));
    let codes = move || {
        let (bytes, scales) = codes.0()?;
        *codes.1.borrow_mut() = Some(scales);
        let number = |b: &u8| if stored == Dtype::I8 { f32::from(*b as i8) } else { f32::from(*b) };
        Ok(Cow::Owned(bytes.iter().map(number).collect()))
    };
    let scales = move || {
        let waiting = later.1.borrow_mut().take();
        let scales = if let Some(scales) = waiting { scales } else { later.0()?.1 };
        Ok(Cow::Owned(scales.iter().map(|s| s.to_f32()).collect()))
    };
    let name = format!("{}{SCALE}", t.name());
    let shape = vec![out, inputs.div_ceil(group)];
    let codes = Source {
        name: t.name().into(),
        shape: match dtype {
            Dtype::Q5 => vec![out, inputs / 32, 20],
            _ => vec![out, inputs / dtype.block()],
        },
        dtype: stored,
        values: Box::new(codes),
    };
    Ok([codes, Source { name, shape, dtype: Dtype::F16, values: Box::new(scales) }])
}

/// Takes the scales out of the tensors of a file that has coded matrices: by the names of their matrices, which become such of their own types and shapes.
pub(crate) fn scales(
    entries: &mut BTreeMap<String, Entry>, metadata: &BTreeMap<String, String>,
) -> Result<BTreeMap<String, Entry>, String> {
    let mut scales = BTreeMap::new();
    for Kind { dtype, stored, key, group } in KINDS {
        match metadata.get(key) {
            None => continue,
            Some(said) if *said == group.to_string() => {}
            Some(other) => {
                return Err(format!(
                    "{key}: its matrices have groups of {other}; this program reads groups of {group}"
                ));
            }
        }
        // Codes of 4 and 5 bits are told apart by their dimensions.
        let dimensions = if dtype == Dtype::Q5 { 3 } else { 2 };
        let other = |e: &Entry| stored == Dtype::U8 && e.shape.len() != dimensions;
        let mine = entries.iter().filter(|(_, e)| e.dtype == stored && !other(e));
        let names: Vec<String> = mine.map(|(n, _)| n.clone()).collect();
        for name in names {
            let scale = entries.remove(&format!("{name}{SCALE}"));
            let scale = scale.ok_or_else(|| format!("tensor {name}{SCALE} is missing: the file is incomplete"))?;
            let Some(entry) = entries.get_mut(&name) else {
                return Err(format!("tensor {name} is the scale of another one: the file is damaged"));
            };
            // The file has as many bytes, so that these are no overflows.
            let (out, inputs) = match (dtype, &entry.shape[..]) {
                (Dtype::Q5, &[out, groups, 20]) => (out, groups * group),
                (Dtype::I8 | Dtype::Q4, &[out, width]) => (out, width * dtype.block()),
                (_, shape) => {
                    return Err(format!("tensor {name} of {stored} has dimensions {shape:?} and is no matrix"));
                }
            };
            if scale.dtype != Dtype::F16 || scale.shape != [out, inputs.div_ceil(group)] {
                let (found, shape) = (scale.dtype, &scale.shape);
                return Err(format!("tensor {name}{SCALE} is {found} {shape:?} and does not fit its matrix"));
            }
            if dtype == Dtype::Q4 && !inputs.is_multiple_of(group) {
                return Err(format!("tensor {name} has {inputs} inputs: in 4 bits they are a multiple of {group}"));
            }
            (entry.dtype, entry.shape) = (dtype, vec![out, inputs]);
            scales.insert(name, scale);
        }
    }
    Ok(scales)
}

/// Why a tensor of whole numbers without scales is no weight.
pub(crate) fn missing(name: &str) -> Error {
    let reason = "it holds I8 and the file does not say anser.int8; weights must be floating-point numbers";
    Error::Tensor { name: name.into(), reason: reason.into() }
}
