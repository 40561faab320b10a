use crate::cuda::DevicePtr;
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
}

impl DeviceMatrix {
    /// The matrix [outputs, inputs], or [inputs, outputs] if `in_out`, from element `start` of `buf` on.
    ///
    /// # Panics
    /// If the buffer ends before the matrix does.
    pub fn new(buf: &Arc<Buf>, start: usize, outputs: usize, inputs: usize, in_out: bool) -> DeviceMatrix {
        assert!(start + outputs * inputs <= buf.len());
        DeviceMatrix { buf: buf.clone(), start, outputs, inputs, in_out }
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
