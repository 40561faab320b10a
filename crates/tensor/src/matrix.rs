use crate::cuda::DevicePtr;
use crate::packed::hash_some;
use crate::{Buf, DType};
use std::sync::Arc;

/// A weight matrix in device memory, a piece of a buffer that may hold others: several matrices with one input lie one after another,
/// so that one kernel reads them as one.
#[derive(Clone)]
pub struct DeviceMatrix {
    buf: Arc<Buf>,
    start: usize,
    outputs: usize,
    inputs: usize,
    in_out: bool,
    digest: u64,
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
        DeviceMatrix { buf: buf.clone(), start, outputs, inputs, in_out, digest }
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
        self.in_out
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.buf.dtype()
    }

    /// Where it is.
    pub fn ptr(&self) -> DevicePtr {
        self.buf.ptr().offset(self.start, self.buf.dtype())
    }
}
