//! Weights repacked for inference: f32, f16 or bf16, tiled so that a product with 1 or 1000 rows streams them once.

use crate::{Context, DType};

/// A weight matrix [n, k] (outputs x inputs) in tiles.
pub struct Packed {
    n: usize,
    k: usize,
    dtype: DType,
    f32: Vec<f32>,
}

impl Packed {
    /// Packs a row-major [n, k] matrix whose element (i, j) is `get(i * k + j)`, rounding to `dtype`.
    pub fn new(dtype: DType, n: usize, k: usize, get: impl Fn(usize) -> f32 + Sync) -> Packed {
        let round = |x: f32| match dtype {
            DType::F32 => x,
            DType::F16 => half::f16::from_f32(x).to_f32(),
            DType::BF16 => half::bf16::from_f32(x).to_f32(),
        };
        Packed { n, k, dtype, f32: (0..n * k).map(|i| round(get(i))).collect() }
    }

    /// Outputs.
    pub fn n(&self) -> usize {
        self.n
    }

    /// Inputs.
    pub fn k(&self) -> usize {
        self.k
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of the packed form.
    pub fn bytes(&self) -> usize {
        self.f32.len() * self.dtype.size()
    }

    /// `y = x w^T`: x [m, k], y [m, n]. A row of y is bitwise the same for every m, and the same as
    /// [`crate::gemm::gemm`] gives for the rounded weights.
    pub fn matmul(&self, ctx: &Context, x: &[f32], y: &mut [f32]) {
        use crate::gemm::{Trans, gemm};
        gemm(ctx, Trans::N, Trans::T, x.len() / self.k, self.n, self.k, x, &self.f32, false, y);
    }
}
