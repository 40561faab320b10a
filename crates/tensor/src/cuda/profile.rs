//! How long each launch, copy and matrix product takes on the device: an event before and one after, read at the end.

use super::{Cuda, DevicePtr, lock};
use cudarc::driver::sys as cu;
use std::collections::BTreeMap;
use std::sync::Mutex;

/// One piece of work on the device.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// The kernel, or what is copied or multiplied.
    pub name: String,
    /// Microseconds from the first piece of work to this one.
    pub start: f64,
    /// Microseconds it took.
    pub duration: f64,
    /// Bytes of the buffers it was given, each counted once: what it moves if it reads or writes each once.
    pub bytes: usize,
    /// Floating-point operations of a matrix product.
    pub flops: f64,
}

/// What is recorded of a piece of work until the device has done it.
struct Pending {
    name: String,
    bytes: usize,
    flops: f64,
    events: [cu::CUevent; 2],
}

#[derive(Default)]
pub(super) struct Profiler {
    /// `None` while nothing is recorded.
    pending: Mutex<Option<Vec<Pending>>>,
    /// Sizes of the allocations by address.
    sizes: Mutex<BTreeMap<u64, usize>>,
}

impl Profiler {
    pub(super) fn allocated(&self, p: DevicePtr, bytes: usize) {
        lock(&self.sizes).insert(p.0, bytes);
    }

    pub(super) fn freed(&self, p: DevicePtr) {
        lock(&self.sizes).remove(&p.0);
    }
}

impl Cuda {
    /// Notes for profiles that a buffer of `bytes` bytes is at `p`, within a larger piece of memory.
    pub(crate) fn holds(&self, p: DevicePtr, bytes: usize) {
        self.profiler.allocated(p, bytes);
    }

    /// Bytes of the buffers that start at these addresses.
    pub(super) fn sizes_of(&self, addresses: impl Iterator<Item = DevicePtr>) -> usize {
        let sizes = lock(&self.profiler.sizes);
        addresses.filter_map(|p| sizes.get(&p.0)).sum()
    }

    /// Whether a profile is taken.
    pub(crate) fn is_profiling(&self) -> bool {
        lock(&self.profiler.pending).is_some()
    }

    /// Runs `work`, between two events while a profile is taken; `what` says its name, bytes and floating-point operations.
    pub(super) fn timed(&self, what: impl FnOnce() -> (String, usize, f64), work: impl FnOnce()) {
        let mut pending = lock(&self.profiler.pending);
        let Some(pending) = &mut *pending else { return work() };
        let (name, bytes, flops) = what();
        let events = [self.event(), self.event()];
        // SAFETY: events made above, on this device's stream.
        self.note(unsafe { cu::cuEventRecord(events[0], self.stream()) }, || "profiling".into());
        work();
        // SAFETY: as above.
        self.note(unsafe { cu::cuEventRecord(events[1], self.stream()) }, || "profiling".into());
        pending.push(Pending { name, bytes, flops, events });
    }

    fn event(&self) -> cu::CUevent {
        let mut e = std::ptr::null_mut();
        // SAFETY: writes an event.
        self.note(unsafe { cu::cuEventCreate(&mut e, 0) }, || "profiling".into());
        e
    }

    /// Milliseconds that the device takes for what `f` begins; waits for it.
    pub(super) fn milliseconds(&self, f: impl FnOnce()) -> f32 {
        let [start, end] = [self.event(), self.event()];
        let mut ms = 0f32;
        // SAFETY: events made above, on this device's stream, destroyed once; their time is read after they have passed.
        unsafe {
            self.note(cu::cuEventRecord(start, self.stream()), || "timing".into());
            f();
            self.note(cu::cuEventRecord(end, self.stream()), || "timing".into());
            self.synchronize();
            self.note(cu::cuEventElapsedTime_v2(&mut ms, start, end), || "timing".into());
            cu::cuEventDestroy_v2(start);
            cu::cuEventDestroy_v2(end);
        }
        ms
    }

    /// Runs `f` and says what the device did meanwhile, in order. The events themselves take a few microseconds each.
    pub fn profiled<R>(&self, f: impl FnOnce() -> R) -> (R, Vec<Span>) {
        if !self.enter() {
            return (f(), Vec::new());
        }
        self.synchronize();
        *lock(&self.profiler.pending) = Some(Vec::new());
        let result = f();
        self.synchronize();
        let pending = lock(&self.profiler.pending).take().unwrap_or_default();
        let origin = pending.first().map(|p| p.events[0]);
        let elapsed = |from: cu::CUevent, to: cu::CUevent| {
            let mut ms = 0f32;
            // SAFETY: both were recorded, and the device has passed them.
            self.note(unsafe { cu::cuEventElapsedTime_v2(&mut ms, from, to) }, || "profiling".into());
            ms as f64 * 1e3
        };
        let span = |p: &Pending| Span {
            name: p.name.clone(),
            start: origin.map_or(0.0, |o| elapsed(o, p.events[0])),
            duration: elapsed(p.events[0], p.events[1]),
            bytes: p.bytes,
            flops: p.flops,
        };
        let spans = pending.iter().map(span).collect();
        for event in pending.iter().flat_map(|p| p.events) {
            // SAFETY: made by `event`, used no more.
            unsafe { cu::cuEventDestroy_v2(event) };
        }
        (result, spans)
    }
}
