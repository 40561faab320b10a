use crate::buf::Pool;
use crate::cuda::Cuda;
use crate::cuda::DevicePtr;
use crate::pages::Pages;
use crate::recorded::{Slot, Uploads};
use crate::{Buf, DType, Error, MemoryStats, ThreadPool};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::{fmt, str::FromStr};

/// Where work runs, chosen at run time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// The processor.
    Cpu,
    /// The n-th NVIDIA GPU.
    Cuda(usize),
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(n) => write!(f, "cuda:{n}"),
        }
    }
}

impl FromStr for Device {
    type Err = Error;
    fn from_str(s: &str) -> Result<Self, Error> {
        match s {
            "cpu" => return Ok(Device::Cpu),
            "cuda" => return Ok(Device::Cuda(0)),
            _ => {}
        }
        s.strip_prefix("cuda:")
            .and_then(|n| n.parse().ok())
            .map(Device::Cuda)
            .ok_or_else(|| Error::Parse(format!("unknown device {s:?}: use cpu, cuda or cuda:N")))
    }
}

struct Inner {
    device: Device,
    /// Element type of activations.
    dtype: DType,
    pool: Arc<Pool>,
    threads: ThreadPool,
    pages: Pages,
    memo: Mutex<HashMap<(usize, &'static str), Table>>,
    uploads: Mutex<Uploads>,
}

/// A device table and whether somebody still holds what it was made from.
struct Table {
    wanted: Box<dyn Fn() -> bool + Send + Sync>,
    buf: Buf,
}

/// A device with its memory pool and its threads; cheap to clone.
///
/// ```
/// use anser_tensor::Context;
/// let ctx = Context::cpu(1);
/// let b = ctx.zeros(8);
/// assert_eq!(&b[..], &[0.0; 8]);
/// ```
#[derive(Clone)]
pub struct Context(Arc<Inner>);

impl Context {
    /// Opens `device` with `threads` CPU threads (0: as many as this process may use); activations are f32.
    ///
    /// # Errors
    /// When the device cannot be used.
    pub fn new(device: Device, threads: usize) -> Result<Context, Error> {
        Context::with_activations(device, DType::F32, threads)
    }

    /// Opens `device` for activations of `dtype`, which on the CPU are always f32.
    ///
    /// # Errors
    /// When the device cannot be used.
    pub fn with_activations(device: Device, dtype: DType, threads: usize) -> Result<Context, Error> {
        match device {
            Device::Cpu => Ok(Context::cpu(threads)),
            Device::Cuda(n) => {
                Ok(Context::with(device, dtype, Pool::new(false, Some(Arc::new(Cuda::open(n)?))), threads))
            }
        }
    }

    /// The CPU with `threads` threads (0: as many as this process may use, which respects container limits).
    pub fn cpu(threads: usize) -> Context {
        Context::with(Device::Cpu, DType::F32, Pool::new(false, None), threads)
    }

    /// A CPU context that allocates nothing and computes nothing: run a step in it and read [`Context::memory`].
    pub fn forecast() -> Context {
        Context::with(Device::Cpu, DType::F32, Pool::new(true, None), 1)
    }

    /// A forecast of what work in this context takes: the same device and types, nothing allocated and nothing computed.
    pub fn dry(&self) -> Context {
        let cuda = self.cuda().map(|c| Arc::new(Cuda::dry(c.info().clone())));
        Context::with(self.device(), self.dtype(), Pool::new(true, cuda), 1)
    }

    fn with(device: Device, dtype: DType, pool: Arc<Pool>, threads: usize) -> Context {
        Context(Arc::new(Inner {
            device,
            dtype,
            pool,
            threads: ThreadPool::new(threads),
            pages: Pages::default(),
            memo: Mutex::default(),
            uploads: Mutex::default(),
        }))
    }

    /// The same device with memory of its own, which nothing else gets.
    pub(crate) fn apart(&self) -> Context {
        Context::with(self.device(), self.dtype(), self.0.pool.keeping(), 1)
    }

    pub(crate) fn uploads(&self) -> MutexGuard<'_, Uploads> {
        self.0.uploads.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Whether the work is to be done again with other inputs ([`crate::Recorded`]): then launches must not depend on them.
    pub fn is_repeated(&self) -> bool {
        !matches!(*self.uploads(), Uploads::Once)
    }

    /// The device.
    pub fn device(&self) -> Device {
        self.0.device
    }

    /// The GPU, if this is one; in a forecast of one it does nothing.
    pub fn cuda(&self) -> Option<&Cuda> {
        self.0.pool.cuda().map(|c| &**c)
    }

    /// The GPU, if this is one, for those that outlive the context.
    pub fn cuda_shared(&self) -> Option<&Arc<Cuda>> {
        self.0.pool.cuda()
    }

    /// Element type of activations.
    pub fn dtype(&self) -> DType {
        self.0.dtype
    }

    /// Whether all work so far went well; a GPU is not waited for.
    ///
    /// # Errors
    /// When device memory ran out or a kernel failed: nothing computed since can be used.
    pub fn check(&self) -> Result<(), Error> {
        self.cuda().map_or(Ok(()), Cuda::check)
    }

    /// Waits until all work is done; the CPU has no other.
    pub fn synchronize(&self) {
        if let Some(cuda) = self.cuda() {
            cuda.synchronize();
        }
    }

    /// Whether this is a forecast: buffers have lengths only and operations must not touch them.
    pub fn is_dry(&self) -> bool {
        self.0.pool.is_dry()
    }

    /// Where weights are kept on the CPU.
    pub(crate) fn pages(&self) -> &Pages {
        &self.0.pages
    }

    /// The CPU threads.
    pub fn threads(&self) -> &ThreadPool {
        &self.0.threads
    }

    /// A buffer of `len` activations with unspecified contents.
    pub fn alloc(&self, len: usize) -> Buf {
        self.0.pool.alloc(len, self.0.dtype)
    }

    /// `count` buffers of `len` activations, on a GPU at equal distances in one piece of memory, so that one product of many matrices
    /// can take them ([`crate::cuda::Cuda::gemm_each`]).
    pub fn alloc_together(&self, count: usize, len: usize) -> Vec<Buf> {
        self.0.pool.alloc_together(count, len, self.0.dtype)
    }

    /// The same as an array.
    pub fn alloc_each<const N: usize>(&self, len: usize) -> [Buf; N] {
        self.alloc_together(N, len).try_into().unwrap_or_else(|_| unreachable!("there are as many as asked for"))
    }

    /// A buffer of `len` f32, whatever the type of activations, with unspecified contents.
    pub fn alloc_f32(&self, len: usize) -> Buf {
        self.0.pool.alloc(len, DType::F32)
    }

    /// A buffer of `len` elements of a type, with unspecified contents; on the CPU the type is f32.
    pub fn alloc_as(&self, dtype: DType, len: usize) -> Buf {
        self.0.pool.alloc(len, dtype)
    }

    /// A buffer of `len` activations, all zero.
    pub fn zeros(&self, len: usize) -> Buf {
        self.zeros_as(self.dtype(), len)
    }

    /// A buffer of `len` f32 zeros, whatever the type of activations.
    pub fn zeros_f32(&self, len: usize) -> Buf {
        self.zeros_as(DType::F32, len)
    }

    /// A buffer of `len` zeros of a type.
    pub fn zeros_as(&self, dtype: DType, len: usize) -> Buf {
        let mut b = self.0.pool.alloc(len, dtype);
        b.clear();
        b
    }

    /// A buffer of activations holding a copy of `src`. In a forecast only its length counts.
    pub fn copy_of(&self, src: &[f32]) -> Buf {
        let mut b = self.alloc(src.len());
        b.copy_from(src);
        b
    }

    /// Integers on the GPU, as the bits of a buffer; `None` elsewhere. Work that is repeated has others every time ([`crate::Recorded`]).
    pub fn upload_i32(&self, src: &[i32]) -> Option<Buf> {
        self.upload(src, false)
    }

    /// The same for integers that say nothing of inputs, but may hold addresses.
    pub fn upload_fixed(&self, src: &[i32]) -> Option<Buf> {
        self.upload(src, true)
    }

    fn upload(&self, src: &[i32], fixed: bool) -> Option<Buf> {
        let cuda = self.cuda()?;
        let raw = raw(src);
        Some(match &mut *self.uploads() {
            Uploads::Once => self.upload_once(cuda, &raw),
            Uploads::Kept(slots) => {
                let slot = Slot { buf: Arc::new(self.upload_once(cuda, &raw)), fixed };
                slots.push(slot.clone());
                Buf::inside(&slot.buf)
            }
            Uploads::Again(slots, given) => {
                given.push(raw);
                // Whoever asks for more than the first time, or for another length, is told so by `Recorded`.
                let slot = slots.get(given.len() - 1).filter(|s| s.buf.len() == src.len());
                slot.map_or_else(|| self.alloc_f32(src.len()), |s| Buf::inside(&s.buf))
            }
            Uploads::Noted(given) => {
                if !fixed {
                    given.push(raw);
                }
                self.alloc_f32(src.len())
            }
        })
    }

    fn upload_once(&self, cuda: &Cuda, raw: &[u8]) -> Buf {
        let b = self.alloc_f32(raw.len() / 4);
        cuda.upload(b.ptr(), raw);
        b
    }

    /// Where the integers that `make` gives are on the GPU: made once for as long as somebody else holds `key`, which many
    /// operations share, and `what`. Null on the CPU.
    pub fn table<K: ?Sized + Send + Sync + 'static>(
        &self, key: &Arc<K>, what: &'static str, make: impl FnOnce() -> Vec<i32>,
    ) -> DevicePtr {
        let Some(cuda) = self.cuda() else { return DevicePtr::NULL };
        let mut memo = self.0.memo.lock().unwrap_or_else(|e| e.into_inner());
        memo.retain(|_, table| (table.wanted)());
        let at = (Arc::as_ptr(key).cast::<()>() as usize, what);
        if let Some(table) = memo.get(&at) {
            return table.buf.ptr();
        }
        let buf = self.upload_once(cuda, &raw(&make()));
        // A weak reference keeps the address from being used again, so that it stays a key.
        let (p, owner) = (buf.ptr(), Arc::downgrade(key));
        let wanted = Box::new(move || owner.strong_count() > 0);
        memo.insert(at, Table { wanted, buf });
        p
    }

    /// Bytes in use, at peak and reserved.
    pub fn memory(&self) -> MemoryStats {
        self.0.pool.stats()
    }

    /// Gives buffers kept for reuse back to the system.
    pub fn trim(&self) {
        self.0.pool.trim();
    }
}

/// Integers as bytes.
fn raw(src: &[i32]) -> Vec<u8> {
    let mut raw = vec![0; src.len() * 4];
    raw.as_chunks_mut().0.iter_mut().zip(src).for_each(|(to, v)| *to = v.to_le_bytes());
    raw
}
