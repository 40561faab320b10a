use crate::cuda::DevicePtr;
use crate::packed::hash_some;
use crate::{Buf, DType};
use half::f16;
use std::sync::Arc;

/// A weight matrix in device memory, a piece of a buffer that may hold others: several matrices with one input lie one after another,
/// so that one kernel reads them as one.
#[derive(Clone)]
pub struct DeviceMatrix {
    buf: Arc<Buf>,
    start: usize,
    outputs: usize,
    inputs: usize,
    stored: Stored,
    digest: u64,
}

#[derive(Clone)]
enum Stored {
    /// In the buffer's type, [outputs, inputs].
    OutIn,
    /// [inputs, outputs].
    InOut,
    /// In codes of 8 bits, [outputs, inputs], with the scales of their groups ([`CodedPlaces`]).
    Codes(CodedPlaces),
}

/// The scales of a matrix in codes of 8 bits ([`crate::Code::Int8`]): f16, as [steps, outputs, 2], a step being [`CodedPlaces::STEP`] inputs, which are two
/// groups. Matrices that lie one after another share them.
#[derive(Clone)]
pub struct CodedPlaces {
    /// The scales of all.
    pub scales: Arc<Buf>,
    /// Outputs before this matrix.
    pub first: usize,
    /// Outputs of all.
    pub outputs: usize,
}

impl CodedPlaces {
    /// Inputs of a step.
    pub const STEP: usize = 128;

    /// Numbers of scales of so many outputs and inputs, and where the one of a group is among them.
    pub fn len(outputs: usize, inputs: usize) -> usize {
        inputs.div_ceil(Self::STEP) * outputs * 2
    }

    /// Where the scale of an output's group of inputs lies among those of `outputs`.
    pub fn at(outputs: usize, output: usize, group: usize) -> usize {
        (group / 2 * outputs + output) * 2 + group % 2
    }
}

impl DeviceMatrix {
    /// The matrix [outputs, inputs], or [inputs, outputs] if `in_out`, from element `start` of `buf` on; `digest` is that of its values.
    ///
    /// # Panics
    /// If the buffer ends before the matrix does.
    pub fn new(
        buf: &Arc<Buf>, start: usize, (outputs, inputs): (usize, usize), in_out: bool, digest: u64,
    ) -> DeviceMatrix {
        assert!(start + outputs * inputs <= buf.len());
        let stored = if in_out { Stored::InOut } else { Stored::OutIn };
        DeviceMatrix { buf: buf.clone(), start, outputs, inputs, stored, digest }
    }

    /// The matrix of codes [outputs, inputs] behind `places.first` others of as many inputs each in `buf`, of which an element holds four codes.
    ///
    /// # Panics
    /// If the buffer ends before the matrix does, or inputs are not a multiple of 16.
    pub fn coded(buf: &Arc<Buf>, (outputs, inputs): (usize, usize), places: CodedPlaces, digest: u64) -> DeviceMatrix {
        let start = places.first * inputs / 4;
        assert!(inputs.is_multiple_of(16) && start + outputs * inputs / 4 <= buf.len() && buf.dtype() == DType::F32);
        DeviceMatrix { buf: buf.clone(), start, outputs, inputs, stored: Stored::Codes(places), digest }
    }

    /// A hash of a type and of some thousands of values in it, little-endian: see [`crate::Packed::digest`].
    pub fn digest_of(dtype: DType, values: &[u8]) -> u64 {
        // Other seeds than those of weights in tiles.
        let seed = 16 + dtype as u64;
        match dtype {
            DType::F32 => hash_some(values.as_chunks().0, u32::from_le_bytes, seed),
            DType::F16 | DType::BF16 => hash_some(values.as_chunks().0, |b| u16::from_le_bytes(b).into(), seed),
        }
    }

    /// The same of codes and their scales.
    pub fn digest_of_codes(codes: &[u8], scales: &[f16]) -> u64 {
        let hash = hash_some(codes.as_chunks().0, u32::from_le_bytes, 32);
        hash ^ hash_some(scales, |s| s.to_bits().into(), 33)
    }

    /// What [`DeviceMatrix::digest_of`] gave for its values.
    pub fn digest(&self) -> u64 {
        self.digest
    }

    /// Outputs.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Inputs.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Whether it is stored [inputs, outputs].
    pub fn in_out(&self) -> bool {
        matches!(self.stored, Stored::InOut)
    }

    /// The scales, if it is in codes of 8 bits: where the first one of its first output is, and the outputs of a step.
    pub fn scales(&self) -> Option<(DevicePtr, usize)> {
        match &self.stored {
            Stored::Codes(places) => Some((places.scales.ptr().offset(2 * places.first, DType::F16), places.outputs)),
            Stored::OutIn | Stored::InOut => None,
        }
    }

    /// Where it is.
    pub fn ptr(&self) -> DevicePtr {
        self.buf.ptr().offset(self.start, self.buf.dtype())
    }
}
