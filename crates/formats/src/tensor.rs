use crate::coded::{self, Coded};
use crate::{Bytes, Entry, Error, blocks};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::fmt;

/// Element types that files hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    /// 64-bit float.
    F64,
    /// 32-bit float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// bfloat16.
    BF16,
    /// 64-bit integer.
    I64,
    /// 32-bit integer.
    I32,
    /// 16-bit integer.
    I16,
    /// 8-bit integer.
    I8,
    /// Unsigned byte.
    U8,
    /// Truth value, one byte.
    Bool,
    /// Two codes of 4 bits a byte, seen where a file has their scales ([`crate::coded`]).
    Q4,
    /// 32 codes of 5 bits in 20 bytes, likewise.
    Q5,
    /// llama.cpp's blocks of 32 or 256 values with common scales, in GGUF files; readers see floats.
    Q4_0,
    /// See [`Dtype::Q4_0`].
    Q4_1,
    /// See [`Dtype::Q4_0`].
    Q5_0,
    /// See [`Dtype::Q4_0`].
    Q5_1,
    /// See [`Dtype::Q4_0`]; the one that is written too.
    Q8_0,
    /// See [`Dtype::Q4_0`].
    Q4K,
    /// See [`Dtype::Q4_0`].
    Q5K,
    /// See [`Dtype::Q4_0`].
    Q6K,
}

impl Dtype {
    /// Elements of a block, the unit in which values are stored: 1 but for types of 4 and 5 bits and llama.cpp's.
    pub fn block(self) -> usize {
        match self {
            Dtype::Q4 => 2,
            Dtype::Q5 | Dtype::Q4_0 | Dtype::Q4_1 | Dtype::Q5_0 | Dtype::Q5_1 | Dtype::Q8_0 => 32,
            Dtype::Q4K | Dtype::Q5K | Dtype::Q6K => 256,
            _ => 1,
        }
    }

    /// Bytes of one block, that is of one element where blocks have one.
    pub fn size(self) -> usize {
        match self {
            Dtype::F64 | Dtype::I64 => 8,
            Dtype::F32 | Dtype::I32 => 4,
            Dtype::F16 | Dtype::BF16 | Dtype::I16 => 2,
            Dtype::I8 | Dtype::U8 | Dtype::Bool | Dtype::Q4 => 1,
            Dtype::Q4_0 => 18,
            Dtype::Q5 | Dtype::Q4_1 => 20,
            Dtype::Q5_0 => 22,
            Dtype::Q5_1 => 24,
            Dtype::Q8_0 => 34,
            Dtype::Q4K => 144,
            Dtype::Q5K => 176,
            Dtype::Q6K => 210,
        }
    }

    /// The name that safetensors uses, or llama.cpp.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F64 => "F64",
            Dtype::F32 => "F32",
            Dtype::F16 => "F16",
            Dtype::BF16 => "BF16",
            Dtype::I64 => "I64",
            Dtype::I32 => "I32",
            Dtype::I16 => "I16",
            Dtype::I8 => "I8",
            Dtype::U8 => "U8",
            Dtype::Bool => "BOOL",
            Dtype::Q4 => "Q4",
            Dtype::Q5 => "Q5",
            Dtype::Q4_0 => "Q4_0",
            Dtype::Q4_1 => "Q4_1",
            Dtype::Q5_0 => "Q5_0",
            Dtype::Q5_1 => "Q5_1",
            Dtype::Q8_0 => "Q8_0",
            Dtype::Q4K => "Q4_K",
            Dtype::Q5K => "Q5_K",
            Dtype::Q6K => "Q6_K",
        }
    }

    /// By the name that safetensors uses.
    pub(crate) fn from_name(name: &str) -> Option<Dtype> {
        use Dtype::*;
        [F64, F32, F16, BF16, I64, I32, I16, I8, U8, Bool].into_iter().find(|d| d.name() == name)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A tensor in a mapped file.
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    pub(crate) name: &'a str,
    pub(crate) entry: &'a Entry,
    pub(crate) map: &'a Bytes,
    /// Scales of a matrix in 8 or 4 bits.
    pub(crate) scale: Option<&'a [u8]>,
}

impl<'a> TensorView<'a> {
    /// Name.
    pub fn name(&self) -> &'a str {
        self.name
    }

    /// Element type.
    pub fn dtype(&self) -> Dtype {
        self.entry.dtype
    }

    /// Shape.
    pub fn shape(&self) -> &'a [usize] {
        &self.entry.shape
    }

    /// The bytes (little-endian, row-major), straight from the map; `None` if the tensor is not contiguous in the file.
    pub fn bytes(&self) -> Option<&'a [u8]> {
        let e = self.entry;
        e.strides.is_none().then(|| &self.map[e.start..e.start + e.elements() / e.dtype.block() * e.dtype.size()])
    }

    /// Codes and scales of a matrix in 8 or 4 bits.
    pub fn coded(&self) -> Option<Coded<'a>> {
        let &[_, inputs] = self.shape() else { return None };
        Some(Coded::new(self.dtype(), inputs, self.bytes()?, self.scale?))
    }

    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.entry.elements()
    }

    /// Reads the tensor as f32 into `out`, row-major.
    ///
    /// # Errors
    /// When `out` has another number of elements or the element type is no float.
    pub fn read_f32_into(&self, out: &mut [f32]) -> Result<(), Error> {
        let e = self.entry;
        if out.len() != e.elements() {
            return Err(self.error(format!("{:?} has {} elements, not {}", e.shape, e.elements(), out.len())));
        }
        self.read_f32_from(0, out)
    }

    /// Reads `out.len()` elements as f32 from the `start`-th on, in row-major order.
    ///
    /// # Errors
    /// When the element type is no float.
    ///
    /// # Panics
    /// When the tensor has not that many elements.
    pub fn read_f32_from(&self, start: usize, out: &mut [f32]) -> Result<(), Error> {
        let e = self.entry;
        assert!(start + out.len() <= e.elements());
        let data = &self.map[e.start..e.end];
        match e.dtype {
            Dtype::F64 => self.read(data, start, out, |b: [u8; 8]| f64::from_le_bytes(b) as f32),
            Dtype::F32 => self.read(data, start, out, f32::from_le_bytes),
            Dtype::BF16 => self.read(data, start, out, |b| bf16::from_le_bytes(b).to_f32()),
            // The slice conversion uses the processor's instruction where there is one.
            Dtype::F16 if e.strides.is_none() => {
                let values = data[2 * start..2 * (start + out.len())].as_chunks::<2>().0;
                for (out, values) in out.chunks_mut(64).zip(values.chunks(64)) {
                    let mut half = [f16::ZERO; 64];
                    half.iter_mut().zip(values).for_each(|(h, b)| *h = f16::from_le_bytes(*b));
                    half[..out.len()].convert_to_f32_slice(out);
                }
            }
            Dtype::F16 => self.read(data, start, out, |b| f16::from_le_bytes(b).to_f32()),
            Dtype::I8 | Dtype::Q4 | Dtype::Q5 => match self.coded() {
                Some(coded) => coded.read(start, out),
                None => return Err(coded::missing(self.name)),
            },
            Dtype::I64 | Dtype::I32 | Dtype::I16 | Dtype::U8 | Dtype::Bool => {
                return Err(self.error(format!("it holds {}; weights must be floating-point numbers", e.dtype)));
            }
            blocks if e.strides.is_none() => blocks::read(blocks, data, start, out),
            blocks => self.read_strided(start, out, |i| blocks::value(blocks, data, i)),
        }
        Ok(())
    }

    fn read<const S: usize>(&self, data: &[u8], start: usize, out: &mut [f32], get: impl Fn([u8; S]) -> f32) {
        let values = data.as_chunks::<S>().0;
        match self.entry.strides {
            None => out.iter_mut().zip(&values[start..]).for_each(|(o, b)| *o = get(*b)),
            Some(_) => self.read_strided(start, out, |i| get(values[i])),
        }
    }

    /// Reads a tensor that is not contiguous; `get` gives the element at a place of its storage.
    fn read_strided(&self, start: usize, out: &mut [f32], get: impl Fn(usize) -> f32) {
        let (shape, strides) = (&self.entry.shape, self.entry.strides.as_deref().unwrap_or_default());
        let mut index = vec![0; shape.len()];
        let mut rest = start;
        for d in (0..shape.len()).rev() {
            index[d] = rest % shape[d].max(1);
            rest /= shape[d].max(1);
        }
        for o in out {
            *o = get(index.iter().zip(strides).map(|(i, s)| i * s).sum::<usize>());
            for d in (0..index.len()).rev() {
                index[d] += 1;
                if index[d] < shape[d] {
                    break;
                }
                index[d] = 0;
            }
        }
    }

    fn error(&self, reason: String) -> Error {
        Error::Tensor { name: self.name.into(), reason }
    }

    /// The tensor as f32.
    ///
    /// # Errors
    /// As [`TensorView::read_f32_into`].
    pub fn to_f32_vec(&self) -> Result<Vec<f32>, Error> {
        let mut out = vec![0.0; self.entry.elements()];
        self.read_f32_into(&mut out)?;
        Ok(out)
    }

    /// The tensor as token ids.
    ///
    /// # Errors
    /// When it doesn't hold contiguous 32- or 64-bit integers, or one is negative or above u32.
    pub fn to_u32_vec(&self) -> Result<Vec<u32>, Error> {
        let error = |reason| self.error(reason);
        let bytes = self.bytes().ok_or_else(|| error("it is not contiguous".to_string()))?;
        let id = |v: i64| u32::try_from(v).map_err(|_| error(format!("{v} is no token id")));
        match self.entry.dtype {
            Dtype::I32 => bytes.as_chunks::<4>().0.iter().map(|b| id(i32::from_le_bytes(*b).into())).collect(),
            Dtype::I64 => bytes.as_chunks::<8>().0.iter().map(|b| id(i64::from_le_bytes(*b))).collect(),
            other => Err(error(format!("it holds {other}; token ids must be I32 or I64"))),
        }
    }

    /// Tells the system that the tensor's pages are no longer needed, after it has been read.
    pub fn release(&self) {
        #[cfg(target_os = "linux")]
        {
            // Whole pages inside the tensor only; the edges belong to neighbours too.
            const PAGE: usize = 4096;
            let (start, end) = (self.entry.start.next_multiple_of(PAGE), self.entry.end / PAGE * PAGE);
            if let Bytes::Mapped(map) = self.map
                && start < end
            {
                // SAFETY: the map is read-only and backed by a file: dropped pages are read again if touched. Failure
                // only means that they stay, which is no error.
                let _ = unsafe { map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
            }
        }
    }
}

/// A tensor to be written: f32 values given on demand, stored as `dtype` (F32, F16 or BF16, rounded to nearest even, whole numbers as I8 or U8, or in GGUF
/// Q8_0).
pub struct Source<'a> {
    /// Name.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Stored type.
    pub dtype: Dtype,
    /// Gives the values, row-major; called when their turn comes.
    pub values: Box<dyn Fn() -> Result<std::borrow::Cow<'a, [f32]>, Error> + 'a>,
}

impl<'a> Source<'a> {
    /// A tensor whose values are at hand.
    pub fn new(name: impl Into<String>, shape: &[usize], dtype: Dtype, values: &'a [f32]) -> Source<'a> {
        Source { name: name.into(), shape: shape.into(), dtype, values: Box::new(move || Ok(values.into())) }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() / self.dtype.block() * self.dtype.size()
    }

    /// The stored bytes, handed out in pieces.
    pub(crate) fn write(
        &self, mut out: impl FnMut(&[u8]) -> std::io::Result<()>,
    ) -> Result<std::io::Result<()>, Error> {
        let values = (self.values)()?;
        if values.len() != self.shape.iter().product::<usize>() || !values.len().is_multiple_of(self.dtype.block()) {
            let reason = format!("shape {:?} does not fit {} values", self.shape, values.len());
            return Err(Error::Tensor { name: self.name.clone(), reason });
        }
        let mut buffer = Vec::with_capacity(1 << 16);
        for piece in values.chunks(1 << 14) {
            buffer.clear();
            match self.dtype {
                Dtype::F32 => piece.iter().for_each(|v| buffer.extend(v.to_le_bytes())),
                Dtype::F16 => piece.iter().for_each(|v| buffer.extend(f16::from_f32(*v).to_le_bytes())),
                Dtype::BF16 => piece.iter().for_each(|v| buffer.extend(bf16::from_f32(*v).to_le_bytes())),
                Dtype::I8 => buffer.extend(piece.iter().map(|v| *v as i8 as u8)),
                Dtype::U8 => buffer.extend(piece.iter().map(|v| *v as u8)),
                Dtype::Q8_0 => blocks::write_q8_0(piece, &mut buffer),
                other => {
                    let reason = format!("cannot be written as {other}: use F32, F16 or BF16");
                    return Err(Error::Tensor { name: self.name.clone(), reason });
                }
            }
            if let Err(e) = out(&buffer) {
                return Ok(Err(e));
            }
        }
        Ok(Ok(()))
    }
}
