use crate::Error;
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::{fmt, str::FromStr};

/// Element type of stored weights. Activations and states on the CPU are always f32.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// 32-bit IEEE float.
    F32,
    /// 16-bit IEEE float.
    F16,
    /// bfloat16: the upper half of an f32.
    BF16,
}

impl DType {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::BF16 => 2,
        }
    }

    /// Values in this type (to nearest, ties to even), little-endian.
    ///
    /// # Panics
    /// If `out` has not the room of as many.
    pub fn encode(self, values: &[f32], out: &mut [u8]) {
        assert!(out.len() == values.len() * self.size());
        match self {
            DType::F32 => out.as_chunks_mut().0.iter_mut().zip(values).for_each(|(o, v)| *o = v.to_le_bytes()),
            DType::F16 => {
                // The slice conversion uses the processor's instruction where there is one.
                let mut half = [f16::ZERO; 64];
                for (out, values) in out.as_chunks_mut().0.chunks_mut(64).zip(values.chunks(64)) {
                    half[..values.len()].convert_from_f32_slice(values);
                    out.iter_mut().zip(&half).for_each(|(o, v)| *o = v.to_le_bytes());
                }
            }
            DType::BF16 => {
                let round = |(o, v): (&mut [u8; 2], &f32)| *o = bf16::from_f32(*v).to_le_bytes();
                out.as_chunks_mut().0.iter_mut().zip(values).for_each(round);
            }
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::BF16 => "bf16",
        })
    }
}

impl FromStr for DType {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self, Error> {
        match s {
            "f32" | "fp32" => Ok(DType::F32),
            "f16" | "fp16" => Ok(DType::F16),
            "bf16" => Ok(DType::BF16),
            _ => Err(Error::Parse(format!("unknown dtype {s:?}: use f32, f16 or bf16"))),
        }
    }
}

/// How a matrix of weights is kept for products ([`crate::Packed`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WeightType {
    /// Floats; products are sums of floats.
    Float(DType),
    /// 8 bits, with a scale in f16 for 64 inputs: 8.25 bits a weight. Products round activations to 8 bits too and are sums of integers.
    Int8,
    /// 4 bits that stand for 16 values, with a scale in f16 for 32 inputs: 4.5 bits a weight. Products as for `Int8`.
    Q4,
    /// 5 bits, 32 even steps, with a scale in f16 for 32 inputs: 5.5 bits a weight. Products as for `Int8`.
    Q5,
}

impl WeightType {
    /// Bytes of about so many weights.
    pub fn bytes_of(self, weights: usize) -> usize {
        match self {
            WeightType::Float(dtype) => weights * dtype.size(),
            WeightType::Int8 => weights / 32 * 33,
            WeightType::Q4 => weights / 16 * 9,
            WeightType::Q5 => weights / 16 * 11,
        }
    }
}

impl From<DType> for WeightType {
    fn from(dtype: DType) -> WeightType {
        WeightType::Float(dtype)
    }
}

impl fmt::Display for WeightType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            WeightType::Float(dtype) => dtype.fmt(f),
            WeightType::Int8 => f.write_str("int8"),
            WeightType::Q4 => f.write_str("q4"),
            WeightType::Q5 => f.write_str("q5"),
        }
    }
}
