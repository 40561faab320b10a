//! Matrix products through cuBLASLt, with one plan per shape: the layouts and the algorithm are chosen once.

use super::{Cuda, DevicePtr, lock};
use crate::DType;
use crate::gemm::Trans;
use cudarc::cublaslt::sys as lt;
use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Mutex;

/// Bytes of workspace, as much as Hopper's kernels ask for.
const WORKSPACE: usize = 64 << 20;

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    trans: [bool; 2],
    size: [usize; 3],
    types: [DType; 2],
    /// Whether a bias is added to every row of the output.
    bias: bool,
}

/// A chosen algorithm with its descriptors, which live as long as the process.
#[derive(Clone, Copy)]
struct Plan {
    desc: lt::cublasLtMatmulDesc_t,
    a: lt::cublasLtMatrixLayout_t,
    b: lt::cublasLtMatrixLayout_t,
    c: lt::cublasLtMatrixLayout_t,
    algo: lt::cublasLtMatmulAlgo_t,
}

/// The library; without a handle until [`Blas::new`] gives it one.
pub(super) struct Blas {
    handle: lt::cublasLtHandle_t,
    plans: Mutex<HashMap<Shape, Plan>>,
    workspace: Mutex<Option<DevicePtr>>,
}

fn data_type(t: DType) -> lt::cudaDataType_t {
    match t {
        DType::F32 => lt::cudaDataType_t::CUDA_R_32F,
        DType::F16 => lt::cudaDataType_t::CUDA_R_16F,
        DType::BF16 => lt::cudaDataType_t::CUDA_R_16BF,
    }
}

fn ok(code: lt::cublasStatus_t) -> Result<(), String> {
    match code {
        lt::cublasStatus_t::CUBLAS_STATUS_SUCCESS => Ok(()),
        code => Err(format!("cuBLASLt: {code:?}")),
    }
}

impl Default for Blas {
    fn default() -> Blas {
        Blas { handle: std::ptr::null_mut(), plans: Mutex::default(), workspace: Mutex::default() }
    }
}

impl Blas {
    pub(super) fn new() -> Result<Blas, String> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes a handle.
        ok(unsafe { lt::cublasLtCreate(&mut handle) })?;
        Ok(Blas { handle, ..Blas::default() })
    }

    /// Chooses an algorithm for `c [m, n] = op(a) op(b)`, all row-major. cuBLASLt counts by columns, so it computes c^T = op(b)^T op(a)^T.
    fn plan(&self, s: Shape) -> Result<Plan, String> {
        let [m, n, k] = s.size.map(|v| v as u64);
        let [ta, tb] = s.trans;
        let (input, output) = (data_type(s.types[0]), data_type(s.types[1]));
        let mut p = Plan {
            desc: std::ptr::null_mut(),
            a: std::ptr::null_mut(),
            b: std::ptr::null_mut(),
            c: std::ptr::null_mut(),
            // SAFETY: plain words that the heuristic overwrites.
            algo: unsafe { std::mem::zeroed() },
        };
        let mut pref = std::ptr::null_mut();
        // SAFETY: descriptors are made before they are used; attributes are written from variables of the documented types.
        unsafe {
            let compute = lt::cublasComputeType_t::CUBLAS_COMPUTE_32F;
            ok(lt::cublasLtMatmulDescCreate(&mut p.desc, compute, lt::cudaDataType_t::CUDA_R_32F))?;
            use lt::cublasLtMatmulDescAttributes_t as D;
            for (attribute, t) in [(D::CUBLASLT_MATMUL_DESC_TRANSA, tb), (D::CUBLASLT_MATMUL_DESC_TRANSB, ta)] {
                let op: i32 = t.into();
                ok(lt::cublasLtMatmulDescSetAttribute(p.desc, attribute, (&raw const op).cast(), 4))?;
            }
            if s.bias {
                let epilogue = lt::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS as u32;
                let attribute = D::CUBLASLT_MATMUL_DESC_EPILOGUE;
                ok(lt::cublasLtMatmulDescSetAttribute(p.desc, attribute, (&raw const epilogue).cast(), 4))?;
            }
            // Stored by rows as [rows, cols], a matrix is [cols, rows] by columns.
            let layout = |to: &mut _, t, rows: u64, cols: u64| {
                ok(lt::cublasLtMatrixLayoutCreate(to, t, cols, rows, cols as i64))
            };
            if tb {
                layout(&mut p.a, input, n, k)?
            } else {
                layout(&mut p.a, input, k, n)?
            }
            if ta {
                layout(&mut p.b, input, k, m)?
            } else {
                layout(&mut p.b, input, m, k)?
            }
            layout(&mut p.c, output, m, n)?;
            ok(lt::cublasLtMatmulPreferenceCreate(&mut pref))?;
            use lt::cublasLtMatmulPreferenceAttributes_t as P;
            let bytes = WORKSPACE;
            let attribute = P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            ok(lt::cublasLtMatmulPreferenceSetAttribute(pref, attribute, (&raw const bytes).cast(), 8))?;
            // Partial sums are added from the workspace in a fixed order, never in place: two runs give the same bits.
            let scheme = lt::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
            let attribute = P::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK;
            ok(lt::cublasLtMatmulPreferenceSetAttribute(pref, attribute, (&raw const scheme).cast(), 4))?;
            let (mut found, mut count) = (std::mem::zeroed::<lt::cublasLtMatmulHeuristicResult_t>(), 0);
            let code = lt::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                p.desc,
                p.a,
                p.b,
                p.c,
                p.c,
                pref,
                1,
                &mut found,
                &mut count,
            );
            lt::cublasLtMatmulPreferenceDestroy(pref);
            ok(code)?;
            if count == 0 {
                return Err(format!("cuBLASLt has no algorithm for a product of {m} x {n} x {k}"));
            }
            p.algo = found.algo;
        }
        Ok(p)
    }
}

impl Cuda {
    /// `c = op(a) op(b)` or, with `accumulate`, `c += op(a) op(b)`: op(a) is [m, k], op(b) is [k, n], c is [m, n], row-major and dense.
    /// a and b are of type `input`, c is of type `output`; sums are f32.
    pub fn gemm(
        &self, ta: Trans, tb: Trans, m: usize, n: usize, k: usize, a: DevicePtr, b: DevicePtr, input: DType,
        accumulate: bool, c: DevicePtr, output: DType,
    ) {
        self.gemm_bias(ta, tb, m, n, k, a, b, input, accumulate, c, output, None);
    }

    /// The same plus `bias` `[n]`, of type `output`, on every row of c.
    pub fn gemm_bias(
        &self, ta: Trans, tb: Trans, m: usize, n: usize, k: usize, a: DevicePtr, b: DevicePtr, input: DType,
        accumulate: bool, c: DevicePtr, output: DType, bias: Option<DevicePtr>,
    ) {
        if !self.enter() || m == 0 || n == 0 {
            return;
        }
        if k == 0 && bias.is_none() {
            if !accumulate {
                self.clear(c, m * n * output.size());
            }
            return;
        }
        let shape = Shape {
            trans: [ta == Trans::T, tb == Trans::T],
            size: [m, n, k],
            types: [input, output],
            bias: bias.is_some(),
        };
        let plan = {
            let mut plans = lock(&self.blas.plans);
            match plans.get(&shape) {
                Some(&p) => Ok(p),
                None => self.blas.plan(shape).inspect(|&p| {
                    plans.insert(shape, p);
                }),
            }
        };
        let workspace = {
            let mut w = lock(&self.blas.workspace);
            if w.is_none() {
                *w = self.take(WORKSPACE);
            }
            *w
        };
        let (Ok(p), Some(workspace)) = (plan.as_ref(), workspace) else {
            let what =
                plan.err().unwrap_or_else(|| "no device memory is left for the workspace of matrix products".into());
            let _ = self.failure.set(what);
            return;
        };
        let (alpha, beta) = (1f32, if accumulate { 1f32 } else { 0f32 });
        let at = |p: DevicePtr| p.0 as *mut c_void;
        // The plan is the shape's, the bias the call's: one call at a time.
        let _plans = bias.map(|bias| {
            let plans = lock(&self.blas.plans);
            let attribute = lt::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            // SAFETY: the descriptor lives as long as the process; the address is read from a variable.
            let code = unsafe { lt::cublasLtMatmulDescSetAttribute(p.desc, attribute, (&raw const bias.0).cast(), 8) };
            if let Err(e) = ok(code) {
                let _ = self.failure.set(format!("the bias of a matrix product: {e}"));
            }
            plans
        });
        let what = || {
            let letter = |t| if t == Trans::T { 't' } else { 'n' };
            let add = if accumulate { " +=" } else { "" };
            let add = if bias.is_some() { " +bias" } else { add };
            let name = format!("gemm {m}x{n}x{k} {}{} {input}>{output}{add}", letter(ta), letter(tb));
            let bytes = (m * k + k * n) * input.size() + m * n * output.size() * (1 + accumulate as usize);
            (name, bytes, 2.0 * (m * n * k) as f64)
        };
        self.timed(what, || {
            // SAFETY: the plan fits the shapes; the buffers hold them.
            let code = unsafe {
                lt::cublasLtMatmul(
                    self.blas.handle,
                    p.desc,
                    (&raw const alpha).cast(),
                    at(b),
                    p.a,
                    at(a),
                    p.b,
                    (&raw const beta).cast(),
                    at(c),
                    p.c,
                    at(c),
                    p.c,
                    &p.algo,
                    at(workspace),
                    WORKSPACE,
                    self.stream.cast(),
                )
            };
            if let Err(e) = ok(code) {
                let _ = self.failure.set(format!("a matrix product of {m} x {n} x {k}: {e}"));
            }
        });
    }
}
