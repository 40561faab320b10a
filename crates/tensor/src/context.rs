use crate::buf::Pool;
use crate::{Buf, Error, MemoryStats, ThreadPool};
use std::sync::Arc;
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
    pool: Arc<Pool>,
    threads: ThreadPool,
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
    /// Opens `device` with `threads` CPU threads (0: as many as this process may use).
    ///
    /// # Errors
    /// When the device cannot be used.
    pub fn new(device: Device, threads: usize) -> Result<Context, Error> {
        match device {
            Device::Cpu => Ok(Context::cpu(threads)),
            Device::Cuda(_) => {
                Err(Error::Device(device.to_string(), "this build has CPU kernels only; use --device cpu".into()))
            }
        }
    }

    /// The CPU with `threads` threads (0: as many as this process may use, which respects container limits).
    pub fn cpu(threads: usize) -> Context {
        Context::with(Device::Cpu, false, threads)
    }

    /// A context that allocates nothing and computes nothing: run a step in it and read [`Context::memory`].
    pub fn forecast() -> Context {
        Context::with(Device::Cpu, true, 1)
    }

    fn with(device: Device, dry: bool, threads: usize) -> Context {
        Context(Arc::new(Inner { device, pool: Pool::new(dry), threads: ThreadPool::new(threads) }))
    }

    /// The device.
    pub fn device(&self) -> Device {
        self.0.device
    }

    /// Whether this is a forecast: buffers have lengths only and operations must not touch them.
    pub fn is_dry(&self) -> bool {
        self.0.pool.is_dry()
    }

    /// The CPU threads.
    pub fn threads(&self) -> &ThreadPool {
        &self.0.threads
    }

    /// A buffer of `len` f32 with unspecified (but initialised) contents.
    pub fn alloc(&self, len: usize) -> Buf {
        self.0.pool.alloc(len)
    }

    /// A buffer of `len` zeros.
    pub fn zeros(&self, len: usize) -> Buf {
        let mut b = self.alloc(len);
        b.fill(0.0);
        b
    }

    /// A buffer holding a copy of `src`. In a forecast only its length counts.
    pub fn copy_of(&self, src: &[f32]) -> Buf {
        let mut b = self.alloc(src.len());
        if !self.is_dry() {
            b.copy_from_slice(src);
        }
        b
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
