//! The CUDA runtime under the operations: one device, one stream and some beside it, modules embedded as fatbins, launches, copies and matrix products.
//!
//! The driver, cuBLASLt and NCCL are opened by name at run time, so that a binary with GPU support starts on a machine without one.
//! Work is asynchronous. The first failure (no memory left, a failed launch) is kept and later work is dropped, so that
//! operations need no error paths; [`Cuda::check`] reports it before any result is believed.

mod blas;
mod graph;
mod lanes;
pub mod nccl;
mod profile;

pub use graph::{Graph, Launch, Pinned};
pub use profile::Span;

use crate::{DType, Error};
use cudarc::cublaslt::sys as lt;
use cudarc::driver::sys as cu;
use std::collections::HashMap;
use std::ffi::{CStr, CString, c_void};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, RwLock, RwLockReadGuard};

/// CUDA version the kernels are built with; its driver or a later one is needed.
const NEEDED_DRIVER: i32 = 13000;

/// Bytes of page-locked memory through which small uploads go: some twenty steps of training.
const STAGED: usize = 16 << 20;

/// Bytes of dynamic shared memory that a kernel gets without asking.
const DEFAULT_SHARED: usize = 48 << 10;

/// An address in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DevicePtr(pub(crate) u64);

impl DevicePtr {
    /// The null address: "not given" to a kernel.
    pub const NULL: DevicePtr = DevicePtr(0);

    /// The address itself, for tables that kernels read.
    pub fn address(self) -> u64 {
        self.0
    }

    /// The address `elements` elements of `dtype` further.
    pub fn offset(self, elements: usize, dtype: DType) -> DevicePtr {
        DevicePtr(self.0 + (elements * dtype.size()) as u64)
    }
}

/// One argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub enum Arg<'a> {
    /// A device address.
    Ptr(DevicePtr),
    /// `int`.
    I32(i32),
    /// `float`.
    F32(f32),
    /// `size_t`.
    Size(u64),
    /// A struct of up to six addresses, of which the kernel reads as many as it has.
    Ptrs([DevicePtr; 6]),
    /// A struct of up to eight `int`, of which the kernel reads as many as it has.
    Words([i32; 8]),
    /// A struct of words of eight bytes.
    Struct(&'a [u64]),
}

impl Arg<'_> {
    /// Where the value is, as the driver wants it.
    fn pointer(&self) -> *mut c_void {
        match self {
            Arg::Ptr(p) => (&raw const p.0).cast_mut().cast(),
            Arg::I32(v) => (&raw const *v).cast_mut().cast(),
            Arg::F32(v) => (&raw const *v).cast_mut().cast(),
            Arg::Size(v) => (&raw const *v).cast_mut().cast(),
            Arg::Ptrs(p) => p.as_ptr().cast_mut().cast(),
            Arg::Words(p) => p.as_ptr().cast_mut().cast(),
            Arg::Struct(p) => p.as_ptr().cast_mut().cast(),
        }
    }
}

impl From<DevicePtr> for Arg<'_> {
    fn from(p: DevicePtr) -> Self {
        Arg::Ptr(p)
    }
}

impl From<f32> for Arg<'_> {
    fn from(v: f32) -> Self {
        Arg::F32(v)
    }
}

impl From<i32> for Arg<'_> {
    fn from(v: i32) -> Self {
        Arg::I32(v)
    }
}

/// `to[c] = sum over p < count of parts[p * stride + c]` for c < cols, or, with `add`, `+=`; all f32.
#[derive(Clone, Copy, Debug)]
pub struct PartialSum {
    /// The sums.
    pub to: DevicePtr,
    /// Whether they are added to what is there.
    pub add: bool,
    /// The first part.
    pub parts: DevicePtr,
    /// Parts of a sum.
    pub count: usize,
    /// Elements from a part to the next.
    pub stride: usize,
    /// Sums.
    pub cols: usize,
}

impl PartialSum {
    /// As many as one launch takes.
    pub const MOST: usize = 32;
    /// Words of eight bytes that the kernel has of each.
    const WORDS: usize = 4;
}

/// The kernels of one folder: a fatbin embedded with `include_bytes!`, loaded at its first launch.
pub struct Module {
    fatbin: &'static [u8],
}

impl Module {
    /// A module over an embedded fatbin.
    pub const fn new(fatbin: &'static [u8]) -> Module {
        Module { fatbin }
    }
}

static FLAT: Module = Module::new(include_bytes!("kernel.fatbin"));

/// What a device is.
#[derive(Clone, Debug)]
pub struct Info {
    /// Marketing name.
    pub name: String,
    /// Compute capability, for instance (9, 0).
    pub capability: (i32, i32),
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of memory.
    pub memory: usize,
}

impl Info {
    /// Bytes of shared memory that a block may have.
    pub fn block_memory(&self) -> usize {
        match self.capability {
            (9 | 10, _) => 227 << 10,
            (8, 0) => 163 << 10,
            _ => 99 << 10,
        }
    }

    /// Whether it runs the kernels made for Hopper; others are small enough for every GPU.
    pub fn is_hopper(&self) -> bool {
        self.capability.0 == 9
    }
}

/// Addresses of loaded functions by (fatbin, name), and of their modules.
#[derive(Default)]
struct Functions {
    modules: HashMap<usize, usize>,
    functions: HashMap<(usize, String), usize>,
}

/// An open device, or a dry one, which does nothing: operations run in a forecast as on the device, and only allocate.
pub struct Cuda {
    dry: bool,
    context: cu::CUcontext,
    stream: cu::CUstream,
    lanes: lanes::Lanes,
    blas: blas::Blas,
    info: Info,
    functions: Mutex<Functions>,
    failure: OnceLock<String>,
    profiler: profile::Profiler,
    staging: Mutex<Staging>,
    /// Whether work is being recorded, which can take no copies from or to the host.
    recording: AtomicBool,
    /// Whether such a copy was asked for nevertheless.
    stray: AtomicBool,
    /// Held for writing while work is recorded, for reading by threads that work beside ([`Cuda::aside`]).
    captures: RwLock<()>,
}

/// Where uploads wait for their turn, so that nobody waits for them: page-locked memory, filled from the front. It lives as long as the
/// process.
#[derive(Default)]
struct Staging {
    /// Its address; 0 before the first upload.
    at: usize,
    used: usize,
}

// SAFETY: the driver's handles may be used from any thread; every entry makes the context current first.
unsafe impl Send for Cuda {}
// SAFETY: as above; the maps are behind mutexes.
unsafe impl Sync for Cuda {}

/// Whether the NVIDIA driver's library is there, which says nothing about whether it can be used.
pub fn driver_found() -> bool {
    // SAFETY: opens a library by name and looks at nothing in it.
    unsafe { cu::is_culib_present() }
}

/// The text of a driver error.
fn text(code: cu::CUresult) -> String {
    let mut p = std::ptr::null();
    // SAFETY: the driver writes a pointer to a static string.
    let known = unsafe { cu::cuGetErrorString(code, &mut p) };
    if known != cu::CUresult::CUDA_SUCCESS || p.is_null() {
        return format!("{code:?}");
    }
    // SAFETY: a string of the driver's, terminated by zero.
    unsafe { CStr::from_ptr(p) }.to_string_lossy().into_owned()
}

fn lock<T>(m: &Mutex<T>) -> MutexGuard<'_, T> {
    m.lock().unwrap_or_else(|e| e.into_inner())
}

impl Cuda {
    /// Opens device `ordinal`.
    ///
    /// # Errors
    /// When there is no driver, the driver is too old, cuBLASLt is missing, there is no such device, or no kernel was built for it;
    /// the message names what was found and what is needed.
    pub fn open(ordinal: usize) -> Result<Cuda, Error> {
        let fail = |what: String| Error::Device(format!("cuda:{ordinal}"), what);
        // SAFETY: opens libraries by name and looks at nothing in them.
        let (driver, library) = unsafe { (cu::is_culib_present(), lt::is_culib_present()) };
        if !driver {
            return Err(fail("no NVIDIA driver was found (libcuda.so.1); install one, or use --device cpu".into()));
        }
        let ok = |code: cu::CUresult, what: &str| match code {
            cu::CUresult::CUDA_SUCCESS => Ok(()),
            code => Err(fail(format!("{what}: {}", text(code)))),
        };
        let (mut version, mut count, mut device) = (0, 0, 0);
        // SAFETY: plain driver calls that write to the variables given.
        unsafe {
            ok(cu::cuInit(0), "the driver doesn't start")?;
            ok(cu::cuDriverGetVersion(&mut version), "the driver doesn't tell its version")?;
            ok(cu::cuDeviceGetCount(&mut count), "the driver doesn't count its devices")?;
        }
        if version < NEEDED_DRIVER {
            let name = |v: i32| format!("{}.{}", v / 1000, v % 1000 / 10);
            let (found, needed) = (name(version), name(NEEDED_DRIVER));
            return Err(fail(format!(
                "the driver supports CUDA {found}, and CUDA {needed} is needed (driver 580 or later); update it, or use --device cpu"
            )));
        }
        if ordinal >= count as usize {
            return Err(fail(format!("there are {count} NVIDIA GPUs here, numbered from 0")));
        }
        if !library {
            return Err(fail(
                "cuBLASLt was not found (libcublasLt.so.13); install the CUDA 13 libraries (for instance \
                 `pip install nvidia-cublas`) and put their folder on LD_LIBRARY_PATH, or use --device cpu"
                    .into(),
            ));
        }
        let mut name = [0u8; 128];
        let (mut context, mut stream) = (std::ptr::null_mut(), std::ptr::null_mut());
        let (mut major, mut minor, mut sms, mut memory) = (0, 0, 0, 0);
        // SAFETY: driver calls in the order they are documented; buffers have the sizes given.
        unsafe {
            use cu::CUdevice_attribute as A;
            ok(cu::cuDeviceGet(&mut device, ordinal as i32), "opening the device")?;
            ok(cu::cuDeviceGetName(name.as_mut_ptr().cast(), name.len() as i32, device), "the device's name")?;
            let get = |to: &mut i32, what| ok(cu::cuDeviceGetAttribute(to, what, device), "the device's properties");
            get(&mut major, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
            get(&mut minor, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
            get(&mut sms, A::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
            ok(cu::cuDeviceTotalMem_v2(&mut memory, device), "the device's memory")?;
        }
        let name = CStr::from_bytes_until_nul(&name).map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
        if major < 8 {
            return Err(fail(format!(
                "{name} has compute capability {major}.{minor}, and 8.0 (Ampere) or later is needed; use --device cpu"
            )));
        }
        // SAFETY: as above.
        unsafe {
            ok(cu::cuDevicePrimaryCtxRetain(&mut context, device), "making the device ready")?;
            ok(cu::cuCtxSetCurrent(context), "making the device ready")?;
            let flag = cu::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
            ok(cu::cuStreamCreate(&mut stream, flag), "making a stream")?;
        }
        let blas = blas::Blas::new().map_err(fail)?;
        let info = Info { name, capability: (major, minor), multiprocessors: sms as u32, memory };
        Ok(Cuda { dry: false, context, stream, blas, ..Cuda::dry(info) })
    }

    /// A device like `info` that does nothing.
    pub(crate) fn dry(info: Info) -> Cuda {
        Cuda {
            dry: true,
            context: std::ptr::null_mut(),
            stream: std::ptr::null_mut(),
            lanes: lanes::Lanes::default(),
            blas: blas::Blas::default(),
            info,
            functions: Mutex::default(),
            failure: OnceLock::new(),
            profiler: profile::Profiler::default(),
            staging: Mutex::default(),
            recording: AtomicBool::new(false),
            stray: AtomicBool::new(false),
            captures: RwLock::new(()),
        }
    }

    /// What the device is.
    pub fn info(&self) -> &Info {
        &self.info
    }

    /// The first failure since the device was opened.
    ///
    /// # Errors
    /// When there was one: nothing computed since can be used.
    pub fn check(&self) -> Result<(), Error> {
        match self.failure.get() {
            Some(what) => Err(Error::Device("cuda".into(), what.clone())),
            None => Ok(()),
        }
    }

    fn note(&self, code: cu::CUresult, what: impl FnOnce() -> String) -> bool {
        if code == cu::CUresult::CUDA_SUCCESS {
            return true;
        }
        // Only the first failure says what went wrong.
        let _ = self.failure.set(format!("{}: {}", what(), text(code)));
        false
    }

    /// Makes the context current for this thread; false if nothing is to be done any more, or ever.
    fn enter(&self) -> bool {
        if self.dry || self.failure.get().is_some() {
            return false;
        }
        // SAFETY: the context lives as long as the process.
        let code = unsafe { cu::cuCtxSetCurrent(self.context) };
        self.note(code, || "making the device current".into())
    }

    /// Free bytes of device memory, less what the workspace of matrix products will take.
    pub fn free_memory(&self) -> usize {
        if self.dry {
            return 0;
        }
        self.enter();
        let (mut free, mut total) = (0, 0);
        // SAFETY: writes two numbers.
        unsafe { cu::cuMemGetInfo_v2(&mut free, &mut total) };
        free.saturating_sub(self.blas.workspace_to_come())
    }

    /// Device memory from the driver; `None` when there is none left.
    pub(crate) fn take(&self, bytes: usize) -> Option<DevicePtr> {
        if !self.enter() {
            return None;
        }
        let mut p = 0;
        // SAFETY: writes an address.
        let code = unsafe { cu::cuMemAlloc_v2(&mut p, bytes.max(16)) };
        (code == cu::CUresult::CUDA_SUCCESS).then(|| {
            self.profiler.allocated(DevicePtr(p), bytes);
            DevicePtr(p)
        })
    }

    /// Notes that `bytes` could not be had.
    pub(crate) fn out_of_memory(&self, bytes: usize) {
        let (free, mb) = (self.free_memory() >> 20, bytes >> 20);
        let _ = self.failure.set(format!(
            "{mb} MB more of device memory are needed and {free} MB are free: use smaller batches, checkpointing or a smaller model"
        ));
    }

    /// Gives memory back to the driver, after all work that may use it.
    pub(crate) fn give_back(&self, p: DevicePtr) {
        self.enter();
        self.synchronize();
        self.profiler.freed(p);
        // SAFETY: came from `take`, is given back once, and nothing runs.
        unsafe { cu::cuMemFree_v2(p.0) };
    }

    /// Whether what is asked for cannot be recorded while work is: then it isn't done, and [`Cuda::record`] says so.
    fn stray(&self) -> bool {
        let recording = self.recording.load(Ordering::Relaxed);
        if recording {
            self.stray.store(true, Ordering::Relaxed);
        }
        recording
    }

    /// For a thread that gives the device work beside the one whose work may be recorded ([`Cuda::capture`]): while it holds this nothing is recorded. Its work goes
    /// to the same stream, so that it would become part of the record, and to wait for it would break that off. A thread holds one at a time, and
    /// records nothing meanwhile: it would wait for itself.
    pub fn aside(&self) -> RwLockReadGuard<'_, ()> {
        self.captures.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until all work is done.
    pub fn synchronize(&self) {
        if self.dry || self.stray() {
            return;
        }
        self.enter();
        // SAFETY: the stream lives as long as this.
        let code = unsafe { cu::cuStreamSynchronize(self.stream()) };
        self.note(code, || "running on the device".into());
    }

    /// Copies bytes to the device.
    pub(crate) fn upload(&self, to: DevicePtr, from: &[u8]) {
        if self.stray() || !self.enter() || from.is_empty() {
            return;
        }
        let mut staging = lock(&self.staging);
        let place = if from.len() <= STAGED / 4 { self.stage(&mut staging, from) } else { None };
        // SAFETY: `to` has room for `from` (the caller's buffer). The copy from pageable memory has left `from` on return; the one from
        // staged memory is done before that place is used again.
        let code =
            unsafe { cu::cuMemcpyHtoDAsync_v2(to.0, place.unwrap_or(from.as_ptr()).cast(), from.len(), self.stream()) };
        self.note(code, || "copying to the device".into());
    }

    /// A copy of `from` in page-locked memory; `None` where the system gives none.
    fn stage(&self, staging: &mut Staging, from: &[u8]) -> Option<*const u8> {
        if staging.at == 0 {
            let mut p = std::ptr::null_mut();
            // SAFETY: writes an address.
            let code = unsafe { cu::cuMemAllocHost_v2(&mut p, STAGED) };
            staging.at = if code == cu::CUresult::CUDA_SUCCESS { p as usize } else { return None };
        }
        if staging.used + from.len() > STAGED {
            self.synchronize();
            staging.used = 0;
        }
        let place = (staging.at + staging.used) as *mut u8;
        staging.used = (staging.used + from.len()).next_multiple_of(64);
        // SAFETY: inside the page-locked memory, at a place that no copy reads any more.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), place, from.len()) };
        Some(place)
    }

    /// Copies bytes from the device, after all work before.
    pub(crate) fn download(&self, from: DevicePtr, to: &mut [u8]) {
        if self.stray() || !self.enter() || to.is_empty() {
            return;
        }
        // SAFETY: `from` holds as many bytes; the copy is waited for below.
        let code = unsafe { cu::cuMemcpyDtoHAsync_v2(to.as_mut_ptr().cast(), from.0, to.len(), self.stream()) };
        self.note(code, || "copying from the device".into());
        self.synchronize();
    }

    /// Copies bytes on the device.
    pub fn copy(&self, from: DevicePtr, to: DevicePtr, bytes: usize) {
        if !self.enter() || bytes == 0 {
            return;
        }
        self.timed(
            || ("copy".into(), 2 * bytes, 0.0),
            || {
                // SAFETY: both are buffers of at least `bytes` bytes.
                let code = unsafe { cu::cuMemcpyDtoDAsync_v2(to.0, from.0, bytes, self.stream()) };
                self.note(code, || "copying on the device".into());
            },
        );
    }

    /// Sets bytes to zero.
    pub fn clear(&self, p: DevicePtr, bytes: usize) {
        if !self.enter() || bytes == 0 {
            return;
        }
        self.timed(
            || ("clear".into(), bytes, 0.0),
            || {
                // SAFETY: a buffer of at least `bytes` bytes.
                let code = unsafe { cu::cuMemsetD8Async(p.0, 0, bytes, self.stream()) };
                self.note(code, || "clearing device memory".into());
            },
        );
    }

    /// The function `name` of `module`.
    fn function(&self, module: &'static Module, name: &str) -> Option<cu::CUfunction> {
        let key = module.fatbin.as_ptr() as usize;
        let mut f = lock(&self.functions);
        if let Some(&p) = f.functions.get(&(key, name.to_string())) {
            return Some(p as cu::CUfunction);
        }
        let loaded = match f.modules.get(&key) {
            Some(&m) => m as cu::CUmodule,
            None => {
                let mut m = std::ptr::null_mut();
                // SAFETY: the image is a whole fatbin.
                let code = unsafe { cu::cuModuleLoadData(&mut m, module.fatbin.as_ptr().cast()) };
                if !self.note(code, || format!("loading kernels for {}", self.info.name)) {
                    return None;
                }
                f.modules.insert(key, m as usize);
                m
            }
        };
        let symbol = CString::new(name).ok()?;
        let mut p = std::ptr::null_mut();
        // SAFETY: a loaded module and a name terminated by zero.
        let code = unsafe { cu::cuModuleGetFunction(&mut p, loaded, symbol.as_ptr()) };
        if !self.note(code, || format!("kernel {name}")) {
            return None;
        }
        f.functions.insert((key, name.to_string()), p as usize);
        Some(p)
    }

    /// Launches the kernel `name` of `module`. Nothing happens on an empty grid.
    ///
    /// The arguments must be those of the kernel, and its buffers large enough: that is checked by nothing but the tests, which is
    /// why launches stand beside their kernels in the operations' folders.
    pub fn launch(&self, module: &'static Module, name: &str, grid: [usize; 3], block: [usize; 3], args: &[Arg]) {
        self.launch_with(module, name, grid, block, 0, args);
    }

    /// Launches a kernel with `shared` bytes of dynamic shared memory; see [`Cuda::launch`].
    pub fn launch_with(
        &self, module: &'static Module, name: &str, grid: [usize; 3], block: [usize; 3], shared: usize, args: &[Arg],
    ) {
        self.launch_as(module, name, Launch { grid, block, shared, overlap: false, together: false }, args);
    }

    /// Grid of a kernel that walks over `n` elements, 8 at a time, in blocks of 256 threads.
    pub fn walk(&self, n: usize) -> ([usize; 3], [usize; 3]) {
        ([n.div_ceil(8 * 256).clamp(1, self.info.multiprocessors as usize * 16), 1, 1], [256, 1, 1])
    }

    /// `x += y` for `n` elements of `dtype`.
    pub fn add(&self, x: DevicePtr, y: DevicePtr, n: usize, dtype: DType) {
        let (grid, block) = self.walk(n);
        self.launch(&FLAT, &format!("add_{dtype}"), grid, block, &[x.into(), y.into(), Arg::Size(n as u64)]);
    }

    /// Adds partial sums up, each in a fixed order, all in one launch; at most [`PartialSum::MOST`].
    pub fn add_partial_sums(&self, sums: &[PartialSum]) {
        assert!(sums.len() <= PartialSum::MOST);
        let mut words = [0; PartialSum::MOST * PartialSum::WORDS];
        for (to, s) in words.chunks_exact_mut(PartialSum::WORDS).zip(sums) {
            let pair = |low: usize, high: usize| low as u64 | (high as u64) << 32;
            to.copy_from_slice(&[s.to.0, s.parts.0, pair(s.count, s.stride), pair(s.cols, s.add.into())]);
        }
        let cols = sums.iter().map(|s| s.cols).max().unwrap_or(0);
        let grid = [cols.div_ceil(32), sums.len(), 1];
        self.launch(&FLAT, "add_partial_sums", grid, [32, 32, 1], &[Arg::Struct(&words)]);
    }

    /// Rounds `n` f32 to `dtype`.
    pub fn round(&self, from: DevicePtr, to: DevicePtr, n: usize, dtype: DType) {
        let (grid, block) = self.walk(n);
        if dtype == DType::F32 {
            return self.copy(from, to, n * 4);
        }
        self.launch(&FLAT, &format!("f32_to_{dtype}"), grid, block, &[from.into(), to.into(), Arg::Size(n as u64)]);
    }

    /// Makes f32 of `n` values of `dtype`.
    pub fn widen(&self, from: DevicePtr, dtype: DType, to: DevicePtr, n: usize) {
        let (grid, block) = self.walk(n);
        if dtype == DType::F32 {
            return self.copy(from, to, n * 4);
        }
        self.launch(&FLAT, &format!("{dtype}_to_f32"), grid, block, &[from.into(), to.into(), Arg::Size(n as u64)]);
    }
}
