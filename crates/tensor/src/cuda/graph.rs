//! Launches that overlap with the kernel before, recorded sequences of work, and host memory that copies go to directly.

use super::{Arg, Cuda, DevicePtr, Module, text};
use crate::Error;
use cudarc::driver::sys as cu;
use std::ffi::c_void;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

/// How a kernel is launched.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    /// Blocks.
    pub grid: [usize; 3],
    /// Threads of a block.
    pub block: [usize; 3],
    /// Bytes of dynamic shared memory of a block.
    pub shared: usize,
    /// Whether it may start before the kernel before it has ended (programmatic dependent launch, compute capability 9.0 or later).
    /// The kernel itself waits before it touches anything that earlier kernels write.
    pub overlap: bool,
    /// Whether all blocks run at the same time, so that they can wait for each other (a cooperative launch): no more than there is room for.
    pub together: bool,
}

/// Recorded work, launched as one; the addresses in it are fixed, so that buffers it uses must outlive it.
pub struct Graph {
    exec: cu::CUgraphExec,
    cuda: Arc<Cuda>,
}

// SAFETY: the driver's handle may be used from any thread; replays are ordered by the stream.
unsafe impl Send for Graph {}
// SAFETY: as above; the handle is only read.
unsafe impl Sync for Graph {}

impl Drop for Graph {
    fn drop(&mut self) {
        self.cuda.synchronize();
        // SAFETY: made by `capture`, destroyed once, and nothing runs.
        unsafe { cu::cuGraphExecDestroy(self.exec) };
    }
}

impl Graph {
    /// Runs the recorded work.
    pub fn replay(&self) {
        if !self.cuda.enter() {
            return;
        }
        // SAFETY: an instantiated graph and the stream of the same device.
        let code = unsafe { cu::cuGraphLaunch(self.exec, self.cuda.stream) };
        self.cuda.note(code, || "launching recorded work".into());
    }
}

/// Host memory at a fixed place that the device copies to and from without a detour. Read it after [`Cuda::synchronize`].
pub struct Pinned {
    at: *mut u8,
    bytes: usize,
    cuda: Arc<Cuda>,
}

// SAFETY: plain memory with one owner.
unsafe impl Send for Pinned {}
// SAFETY: shared references only read.
unsafe impl Sync for Pinned {}

impl Drop for Pinned {
    fn drop(&mut self) {
        self.cuda.synchronize();
        // SAFETY: made by `Pinned::new`, freed once, and no copy is under way.
        unsafe { cu::cuMemFreeHost(self.at.cast()) };
    }
}

impl Pinned {
    /// `words` zeros of four bytes.
    ///
    /// # Errors
    /// When the system has no memory left to pin.
    pub fn new(cuda: &Arc<Cuda>, words: usize) -> Result<Pinned, Error> {
        cuda.enter();
        let (mut p, bytes) = (std::ptr::null_mut(), words.max(1) * 4);
        // SAFETY: writes an address.
        let code = unsafe { cu::cuMemAllocHost_v2(&mut p, bytes) };
        if code != cu::CUresult::CUDA_SUCCESS {
            return Err(Error::Device("cuda".into(), format!("pinning {bytes} bytes of host memory: {}", text(code))));
        }
        // SAFETY: as many bytes were given.
        unsafe { std::ptr::write_bytes(p.cast::<u8>(), 0, bytes) };
        Ok(Pinned { at: p.cast(), bytes, cuda: cuda.clone() })
    }

    /// The words as f32.
    pub fn floats(&self) -> &[f32] {
        // SAFETY: aligned memory of that many words, of which every bit pattern is an f32.
        unsafe { std::slice::from_raw_parts(self.at.cast(), self.bytes / 4) }
    }

    /// The words as integers.
    pub fn integers(&self) -> &[i32] {
        // SAFETY: aligned memory of that many words.
        unsafe { std::slice::from_raw_parts(self.at.cast(), self.bytes / 4) }
    }

    /// The words as integers, to be written while nothing is copied.
    pub fn integers_mut(&mut self) -> &mut [i32] {
        // SAFETY: aligned memory of that many words, borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.at.cast(), self.bytes / 4) }
    }

    /// Copies `words` words from the `start`-th on to the device, in the order of the stream.
    ///
    /// # Panics
    /// If there are not as many.
    pub fn send(&self, to: DevicePtr, start: usize, words: usize) {
        assert!((start + words) * 4 <= self.bytes);
        if !self.cuda.enter() {
            return;
        }
        // SAFETY: this memory lives until the stream is done; `to` has room (the caller's buffer).
        let code =
            unsafe { cu::cuMemcpyHtoDAsync_v2(to.0, self.at.add(start * 4).cast(), words * 4, self.cuda.stream) };
        self.cuda.note(code, || "copying to the device".into());
    }

    /// Copies `words` words from the device, in the order of the stream.
    ///
    /// # Panics
    /// If there is no room.
    pub fn receive(&self, from: DevicePtr, words: usize) {
        assert!(words * 4 <= self.bytes);
        if !self.cuda.enter() {
            return;
        }
        // SAFETY: this memory lives until the stream is done; `from` has as many words.
        let code = unsafe { cu::cuMemcpyDtoHAsync_v2(self.at.cast(), from.0, words * 4, self.cuda.stream) };
        self.cuda.note(code, || "copying from the device".into());
    }
}

impl Cuda {
    /// Records the work that `work` enqueues instead of doing it. What it allocates must live as long as the recorded work, and its kernels must
    /// have been launched once before, so that they are loaded. Other threads that use the device meanwhile are those that have [`Cuda::aside`], which are waited for.
    pub fn capture(self: &Arc<Self>, work: impl FnOnce()) -> Option<Graph> {
        let _alone = self.captures.write().unwrap_or_else(PoisonError::into_inner);
        if !self.enter() {
            return None;
        }
        let mode = cu::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: the stream is not being captured, as the lock is held by one thread at a time; other threads' work on it is held back by the lock.
        let code = unsafe { cu::cuStreamBeginCapture_v2(self.stream, mode) };
        if !self.note(code, || "recording work".into()) {
            return None;
        }
        work();
        let (mut graph, mut exec) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: ends the capture begun above and writes a handle.
        let code = unsafe { cu::cuStreamEndCapture(self.stream, &mut graph) };
        if !self.note(code, || "recording work".into()) || graph.is_null() {
            return None;
        }
        // SAFETY: a graph just made; it is destroyed after use.
        let code = unsafe { cu::cuGraphInstantiateWithFlags(&mut exec, graph, 0) };
        // SAFETY: as above.
        unsafe { cu::cuGraphDestroy(graph) };
        self.note(code, || "preparing recorded work".into()).then(|| Graph { exec, cuda: self.clone() })
    }

    /// The same of work that may allocate: `None` as well if it copied anything from or to the host, or waited for the device, none of which is done.
    pub(crate) fn record(self: &Arc<Self>, work: impl FnOnce()) -> Option<Graph> {
        self.stray.store(false, Ordering::Relaxed);
        let graph = self.capture(|| {
            self.recording.store(true, Ordering::Relaxed);
            work();
            self.recording.store(false, Ordering::Relaxed);
        });
        graph.filter(|_| !self.stray.load(Ordering::Relaxed))
    }

    /// Launches the kernel `name` of `module` as `how` says; see [`Cuda::launch`].
    pub fn launch_as(&self, module: &'static Module, name: &str, how: Launch, args: &[Arg]) {
        if !self.enter() || how.grid.contains(&0) {
            return;
        }
        let Some(function) = self.function(module, name) else { return };
        // The limit counts what the kernel declares too.
        if how.shared > super::DEFAULT_SHARED / 2 {
            let most = cu::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a loaded function.
            let code = unsafe { cu::cuFuncSetAttribute(function, most, how.shared as i32) };
            if !self.note(code, || format!("{} bytes of shared memory for {name}", how.shared)) {
                return;
            }
        }
        let mut params: Vec<*mut c_void> = args.iter().map(Arg::pointer).collect();
        let [gx, gy, gz] = how.grid.map(|n| n as u32);
        let [bx, by, bz] = how.block.map(|n| n as u32);
        let attribute = |id, value| cu::CUlaunchAttribute { id, pad: [0; 4], value };
        let mut attributes = Vec::new();
        if how.overlap && self.info.capability.0 >= 9 {
            let value = cu::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 };
            let id = cu::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes.push(attribute(id, value));
        }
        if how.together {
            let value = cu::CUlaunchAttributeValue { cooperative: 1 };
            attributes.push(attribute(cu::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE, value));
        }
        let config = cu::CUlaunchConfig {
            gridDimX: gx,
            gridDimY: gy,
            gridDimZ: gz,
            blockDimX: bx,
            blockDimY: by,
            blockDimZ: bz,
            sharedMemBytes: how.shared as u32,
            hStream: self.stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        let addresses = || {
            args.iter().flat_map(|a| match a {
                Arg::Ptr(p) => std::slice::from_ref(p),
                Arg::Ptrs(p) => &p[..],
                _ => &[],
            })
        };
        self.timed(
            || (name.into(), self.sizes_of(addresses().copied()), 0.0),
            || {
                // SAFETY: `params` point to the arguments and `config` to the attributes, which live until the call returns; the
                // rest is the caller's promise.
                let code =
                    unsafe { cu::cuLaunchKernelEx(&config, function, params.as_mut_ptr(), std::ptr::null_mut()) };
                self.note(code, || format!("launching {name}"));
            },
        );
    }
}

#[cfg(test)]
mod tests {
    use super::super::Info;
    use super::*;
    use std::time::Duration;

    #[test]
    fn nothing_is_recorded_while_somebody_works_aside() {
        let info = Info { name: String::new(), capability: (9, 0), multiprocessors: 1, memory: 0 };
        let cuda = Arc::new(Cuda::dry(info));
        std::thread::scope(|threads| {
            let aside = [cuda.aside(), cuda.aside()];
            let recording = threads.spawn(|| cuda.capture(|| ()));
            std::thread::sleep(Duration::from_millis(50));
            assert!(!recording.is_finished());
            drop(aside);
            assert!(recording.join().is_ok());
        });
    }
}
