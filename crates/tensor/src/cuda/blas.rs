//! Matrix products through cuBLASLt, with one plan per shape: the layouts and the algorithm are chosen once.

use super::lanes::LANES;
use super::{Cuda, DevicePtr, lock};
use crate::DType;
use crate::gemm::Trans;
use cudarc::cublaslt::sys as lt;
use cudarc::driver::sys as cu;
use std::collections::{BTreeMap, HashMap};
use std::ffi::c_void;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

/// Bytes of workspace, as much as Hopper's kernels ask for.
const WORKSPACE: usize = 64 << 20;
/// The same for products beside others, which are small.
const WORKSPACE_BESIDE: usize = 8 << 20;
/// Algorithms that are looked at, the one first that cuBLASLt thinks best.
const CANDIDATES: usize = 16;
/// Runs of each when they are timed, after one to warm up.
const TIMED: usize = 3;

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Shape {
    trans: [bool; 2],
    size: [usize; 3],
    types: [DType; 2],
    /// Whether a bias is added to every row of the output.
    bias: bool,
    /// Products at once, and the elements from a matrix of op(a), op(b) and c to the next.
    batch: usize,
    strides: [usize; 3],
    /// Whether it runs beside other products, with less workspace.
    beside: bool,
}

impl Shape {
    /// What a profile and a list of choices call it.
    fn name(&self) -> String {
        let ([m, n, k], [ta, tb], [input, output]) =
            (self.size, self.trans.map(|t| if t { 't' } else { 'n' }), self.types);
        let mut name = format!("{m}x{n}x{k} {ta}{tb} {input}>{output}{}", if self.bias { " +bias" } else { "" });
        if self.beside {
            name += " beside";
        }
        if self.batch > 1 {
            let [a, b, c] = self.strides;
            name += &format!(" x{} by {a} {b} {c}", self.batch);
        }
        name
    }

    fn workspace(&self) -> usize {
        workspace_of(self.beside.into())
    }

    /// One product.
    fn single(trans: [Trans; 2], size: [usize; 3], types: [DType; 2], bias: bool) -> Shape {
        Shape { trans: trans.map(|t| t == Trans::T), size, types, bias, batch: 1, strides: [0; 3], beside: false }
    }
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
    /// By lane.
    workspace: Mutex<[Option<DevicePtr>; LANES]>,
    tuned: AtomicBool,
    /// What timing chose: the place of an algorithm among those of its shape, by the shape's name.
    chosen: Mutex<BTreeMap<String, usize>>,
}

/// What one product reads and writes.
#[derive(Clone, Copy)]
struct Call {
    a: DevicePtr,
    b: DevicePtr,
    c: DevicePtr,
    accumulate: bool,
    workspace: DevicePtr,
    /// Bytes of it.
    room: usize,
}

/// Bytes of a lane's workspace.
fn workspace_of(lane: usize) -> usize {
    if lane > 0 { WORKSPACE_BESIDE } else { WORKSPACE }
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
        Blas {
            handle: std::ptr::null_mut(),
            plans: Mutex::default(),
            workspace: Mutex::default(),
            tuned: AtomicBool::new(false),
            chosen: Mutex::default(),
        }
    }
}

impl Blas {
    pub(super) fn new() -> Result<Blas, String> {
        let mut handle = std::ptr::null_mut();
        // SAFETY: writes a handle.
        ok(unsafe { lt::cublasLtCreate(&mut handle) })?;
        Ok(Blas { handle, ..Blas::default() })
    }

    /// Bytes of the workspaces that are not there yet.
    pub(super) fn workspace_to_come(&self) -> usize {
        let missing = |(lane, w): (usize, &Option<DevicePtr>)| if w.is_some() { 0 } else { workspace_of(lane) };
        lock(&self.workspace).iter().enumerate().map(missing).sum()
    }

    /// Algorithms for `c [m, n] = op(a) op(b)`, all row-major, the one in the plan first. cuBLASLt counts by columns, so it computes
    /// c^T = op(b)^T op(a)^T.
    fn plan(&self, s: Shape) -> Result<(Plan, Vec<lt::cublasLtMatmulAlgo_t>), String> {
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
            if s.batch > 1 {
                use lt::cublasLtMatrixLayoutAttribute_t as L;
                let count = s.batch as i32;
                // The library's A is b, its B is a.
                for (matrix, stride) in [p.b, p.a, p.c].into_iter().zip(s.strides) {
                    let (by, attribute) = (stride as i64, L::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT);
                    ok(lt::cublasLtMatrixLayoutSetAttribute(matrix, attribute, (&raw const count).cast(), 4))?;
                    let attribute = L::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET;
                    ok(lt::cublasLtMatrixLayoutSetAttribute(matrix, attribute, (&raw const by).cast(), 8))?;
                }
            }
            ok(lt::cublasLtMatmulPreferenceCreate(&mut pref))?;
            use lt::cublasLtMatmulPreferenceAttributes_t as P;
            let bytes = s.workspace();
            let attribute = P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            ok(lt::cublasLtMatmulPreferenceSetAttribute(pref, attribute, (&raw const bytes).cast(), 8))?;
            // Partial sums are added from the workspace in a fixed order, never in place: two runs give the same bits.
            let scheme = lt::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
            let attribute = P::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK;
            ok(lt::cublasLtMatmulPreferenceSetAttribute(pref, attribute, (&raw const scheme).cast(), 4))?;
            let mut found = [std::mem::zeroed::<lt::cublasLtMatmulHeuristicResult_t>(); CANDIDATES];
            let mut count = 0;
            let code = lt::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                p.desc,
                p.a,
                p.b,
                p.c,
                p.c,
                pref,
                CANDIDATES as i32,
                found.as_mut_ptr(),
                &mut count,
            );
            lt::cublasLtMatmulPreferenceDestroy(pref);
            ok(code)?;
            let usable = |f: &&lt::cublasLtMatmulHeuristicResult_t| ok(f.state).is_ok() && repeatable(&f.algo);
            let algos: Vec<_> = found[..count as usize].iter().filter(usable).map(|f| f.algo).collect();
            p.algo =
                *algos.first().ok_or_else(|| format!("cuBLASLt has no algorithm for a product of {m} x {n} x {k}"))?;
            Ok((p, algos))
        }
    }

    /// Begins one product.
    fn run(
        &self, p: &Plan, algo: &lt::cublasLtMatmulAlgo_t, call: Call, stream: lt::cudaStream_t,
    ) -> Result<(), String> {
        let (alpha, beta) = (1f32, if call.accumulate { 1f32 } else { 0f32 });
        let at = |p: DevicePtr| p.0 as *mut c_void;
        // SAFETY: the plan fits the shapes; the buffers hold them.
        ok(unsafe {
            lt::cublasLtMatmul(
                self.handle,
                p.desc,
                (&raw const alpha).cast(),
                at(call.b),
                p.a,
                at(call.a),
                p.b,
                (&raw const beta).cast(),
                at(call.c),
                p.c,
                at(call.c),
                p.c,
                algo,
                at(call.workspace),
                call.room,
                stream,
            )
        })
    }
}

/// Whether an algorithm adds the parts of a sum in a fixed order: whole sums, or parts from the workspace; never in place.
fn repeatable(algo: &lt::cublasLtMatmulAlgo_t) -> bool {
    let (mut scheme, mut written) = (0u32, 0usize);
    let attribute = lt::cublasLtMatmulAlgoConfigAttributes_t::CUBLASLT_ALGO_CONFIG_REDUCTION_SCHEME;
    // SAFETY: reads a word of the algorithm into a variable of its size.
    let code =
        unsafe { lt::cublasLtMatmulAlgoConfigGetAttribute(algo, attribute, (&raw mut scheme).cast(), 4, &mut written) };
    let [none, by_workspace] = [
        lt::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_NONE,
        lt::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE,
    ];
    ok(code).is_ok() && (scheme == none as u32 || scheme == by_workspace as u32)
}

/// The elements from each of several matrices to the next, if there is more than one and they are in ascending order at equal distances.
fn distance(p: &[DevicePtr], t: DType) -> Option<usize> {
    let by = p.get(1)?.0.checked_sub(p[0].0).filter(|by| *by > 0 && by.is_multiple_of(t.size() as u64))?;
    p.windows(2).all(|w| w[1].0.checked_sub(w[0].0) == Some(by)).then_some(by as usize / t.size())
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
        if k == 0 && bias.is_none() {
            if !accumulate {
                self.clear(c, m * n * output.size());
            }
            return;
        }
        self.multiply(Shape::single([ta, tb], [m, n, k], [input, output], bias.is_some()), a, b, accumulate, c, bias);
    }

    /// [`Cuda::gemm`] for several pairs of matrices: as one product, which fills the GPU better, if the matrices are at equal distances
    /// in memory; else one after the other.
    pub fn gemm_each<const N: usize>(
        &self, ta: Trans, tb: Trans, m: usize, n: usize, k: usize, a: [DevicePtr; N], b: [DevicePtr; N], input: DType,
        accumulate: bool, c: [DevicePtr; N], output: DType,
    ) {
        let strides = [(&a, input), (&b, input), (&c, output)].map(|(p, t)| distance(p, t));
        if let ([Some(sa), Some(sb), Some(sc)], true) = (strides, k > 0) {
            let shape = Shape::single([ta, tb], [m, n, k], [input, output], false);
            return self.multiply(
                Shape { batch: N, strides: [sa, sb, sc], ..shape },
                a[0],
                b[0],
                accumulate,
                c[0],
                None,
            );
        }
        for i in 0..N {
            self.gemm(ta, tb, m, n, k, a[i], b[i], input, accumulate, c[i], output);
        }
    }

    /// The products of `shape`.
    fn multiply(
        &self, shape: Shape, a: DevicePtr, b: DevicePtr, accumulate: bool, c: DevicePtr, bias: Option<DevicePtr>,
    ) {
        let lane = self.lane();
        let shape = Shape { beside: lane > 0, ..shape };
        let Shape { size: [m, n, k], types: [input, output], batch, .. } = shape;
        if !self.enter() || m == 0 || n == 0 {
            return;
        }
        let workspace = {
            let w = &mut lock(&self.blas.workspace)[lane];
            if w.is_none() {
                *w = self.take(workspace_of(lane));
            }
            *w
        };
        let Some(workspace) = workspace else {
            let _ = self.failure.set("no device memory is left for the workspace of matrix products".into());
            return;
        };
        let call = Call { a, b, c, accumulate, workspace, room: shape.workspace() };
        let fail = |what: String| drop(self.failure.set(format!("a matrix product of {m} x {n} x {k}: {what}")));
        // The plan is the shape's, the bias the call's: one call at a time.
        let mut plans = lock(&self.blas.plans);
        let (p, algos) = match plans.get(&shape) {
            Some(&p) => (p, Vec::new()),
            None => match self.blas.plan(shape) {
                Ok(made) => made,
                Err(e) => return fail(e),
            },
        };
        if let Some(bias) = bias {
            let attribute = lt::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            // SAFETY: the descriptor lives as long as the process; the address is read from a variable.
            let code = unsafe { lt::cublasLtMatmulDescSetAttribute(p.desc, attribute, (&raw const bias.0).cast(), 8) };
            if let Err(e) = ok(code) {
                return fail(e);
            }
        }
        let p = match algos.len() {
            0 => p,
            1 => *plans.entry(shape).or_insert(p),
            _ => *plans.entry(shape).or_insert(self.choose(shape, p, &algos, call)),
        };
        let what = || {
            let name = format!("gemm {}{}", shape.name(), if accumulate { " +=" } else { "" });
            let bytes = (m * k + k * n) * input.size() + m * n * output.size() * (1 + accumulate as usize);
            (name, batch * bytes, 2.0 * (batch * m * n * k) as f64)
        };
        self.timed(what, || {
            if let Err(e) = self.blas.run(&p, &p.algo, call, self.stream().cast()) {
                fail(e);
            }
        });
    }

    /// From now on times the algorithms for each new shape once and takes the fastest, instead of the one that cuBLASLt thinks best;
    /// where `before`, which [`Cuda::chosen_products`] gave, says what to take, it is taken. Two runs compute the same bits as long as they
    /// choose alike, which timing doesn't promise. False if `before` is of another GPU or another version of cuBLASLt: nothing is taken from it.
    pub fn tune_products(&self, before: &str) -> bool {
        self.blas.tuned.store(true, Ordering::Relaxed);
        lock(&self.blas.plans).clear();
        let mut lines = before.lines();
        let same = lines.next().is_none_or(|device| device == self.chooser());
        let choice =
            |line: &str| line.split_once(" = ").and_then(|(shape, at)| Some((shape.to_string(), at.parse().ok()?)));
        *lock(&self.blas.chosen) = lines.filter(|_| same).filter_map(choice).collect();
        same
    }

    /// What timing chose so far: a line for what chose, and one for every shape. Empty if products are not tuned.
    pub fn chosen_products(&self) -> String {
        let chosen = lock(&self.blas.chosen);
        let lines = chosen.iter().map(|(shape, at)| format!("\n{shape} = {at}"));
        if chosen.is_empty() { String::new() } else { self.chooser() + &lines.collect::<String>() }
    }

    /// What a place among algorithms depends on.
    fn chooser(&self) -> String {
        // SAFETY: returns a number.
        let version = if self.dry { 0 } else { unsafe { lt::cublasLtGetVersion() } };
        format!("{}, cuBLASLt {version}", self.info.name)
    }

    /// The plan with one of `algos`: the first or, if products are tuned, the one that was chosen for its shape or is the fastest now.
    fn choose(&self, shape: Shape, p: Plan, algos: &[lt::cublasLtMatmulAlgo_t], call: Call) -> Plan {
        if !self.blas.tuned.load(Ordering::Relaxed) {
            return p;
        }
        let mut chosen = lock(&self.blas.chosen);
        let before = chosen.get(&shape.name()).copied().filter(|&at| at < algos.len());
        let Some(at) = before.or_else(|| self.fastest(shape, &p, algos, call)) else { return p };
        chosen.insert(shape.name(), at);
        Plan { algo: algos[at], ..p }
    }

    /// The fastest of `algos`, each run after the workspace was cleared, so that little of its input is still in the caches. They write to a buffer of
    /// their own; without memory for it there is no answer.
    fn fastest(&self, shape: Shape, p: &Plan, algos: &[lt::cublasLtMatmulAlgo_t], call: Call) -> Option<usize> {
        let last = (shape.batch - 1) * shape.strides[2];
        let bytes = (last + shape.size[0] * shape.size[1]) * shape.types[1].size();
        let scratch = self.take(bytes)?;
        // Nothing beside it disturbs the measurement.
        // SAFETY: waits.
        self.note(unsafe { cu::cuCtxSynchronize() }, || "timing".into());
        self.clear(scratch, bytes);
        let call = Call { c: scratch, ..call };
        let time = |algo: &lt::cublasLtMatmulAlgo_t| {
            let run = || {
                self.clear(call.workspace, call.room);
                self.blas.run(p, algo, call, self.stream().cast()).is_ok()
            };
            // An algorithm that fails is never chosen.
            if run() { self.milliseconds(|| (0..TIMED).for_each(|_| _ = run())) } else { f32::MAX }
        };
        let times: Vec<f32> = algos.iter().map(time).collect();
        self.give_back(scratch);
        (0..algos.len()).min_by(|&a, &b| times[a].total_cmp(&times[b]))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::Info;

    #[test]
    fn distances_are_equal_or_none() {
        let of = |p: &[u64]| distance(&p.iter().map(|&p| DevicePtr(p)).collect::<Vec<_>>(), DType::BF16);
        assert_eq!(of(&[64, 128, 192]), Some(32));
        for other in [&[64][..], &[64, 128, 200], &[192, 128, 64], &[64, 64], &[1, 2, 3]] {
            assert_eq!(of(other), None);
        }
    }

    #[test]
    fn choices_are_taken_up_on_the_same_gpu_only() {
        let gpu =
            |name: &str| Cuda::dry(Info { name: name.into(), capability: (9, 0), multiprocessors: 132, memory: 0 });
        let before = "A, cuBLASLt 0\n64x32x768 nn bf16>bf16 +bias = 3\n768x768x8192 tn bf16>f32 = 5";
        let (a, b) = (gpu("A"), gpu("B"));
        assert!(a.tune_products("") && a.chosen_products().is_empty());
        assert!(a.tune_products(before) && a.chosen_products() == before);
        assert!(!b.tune_products(before) && b.chosen_products().is_empty());
    }
}
