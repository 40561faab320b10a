//! The pooled allocator: buffers that return to the pool of their context when dropped.
//!
//! Reuse is by length, last in first out: on a GPU the exact one, on the CPU, where what is not touched takes no memory, up to an eighth more,
//! so that work whose shapes change a little all the time stays in the same memory. A training step allocates the same lengths in the same order
//! every time, so from the second step on it allocates nothing new and sees the same addresses: the step has a
//! fixed allocation plan per shape. [`crate::Context::forecast`] runs the same code with lengths only, which
//! makes its peak the memory forecast.

use crate::DType;
use crate::cuda::{Cuda, DevicePtr};
use half::{bf16, f16};
use std::collections::HashMap;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex, MutexGuard};

/// Bytes handed out by a context's pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemoryStats {
    /// Bytes in live buffers now.
    pub in_use: usize,
    /// Largest value `in_use` has had.
    pub peak: usize,
    /// Bytes obtained from the system: live buffers plus those kept for reuse.
    pub reserved: usize,
}

/// Where a buffer's elements are.
enum Data {
    /// Nowhere: a forecast.
    Dry,
    Host(Box<[f32]>),
    Device(DevicePtr),
}

/// Bytes of a buffer from which on it asks for large pages: many small ones that come and go would take more memory in them.
const LARGE: usize = 16 << 20;
/// Bytes of a buffer on the CPU from which on it has room for more.
const ROOMY: usize = 64 << 10;
/// Bytes of free buffers that are kept whatever the work.
const SLACK: usize = 64 << 20;

#[derive(Default)]
struct State {
    /// Free buffers by bytes of room.
    free: HashMap<usize, Free>,
    /// Counts allocations.
    clock: u64,
    stats: MemoryStats,
}

/// Free buffers of one length.
#[derive(Default)]
struct Free {
    buffers: Vec<Data>,
    /// When one of them was last taken or given back.
    used: u64,
}

pub(crate) struct Pool {
    state: Mutex<State>,
    dry: bool,
    cuda: Option<Arc<Cuda>>,
    /// Whether free buffers are kept whatever happens: recorded work goes on using them.
    keeps: bool,
}

impl Pool {
    pub(crate) fn new(dry: bool, cuda: Option<Arc<Cuda>>) -> Arc<Pool> {
        Arc::new(Pool { state: Mutex::default(), dry, cuda, keeps: false })
    }

    /// A pool on the same device that gives nothing back before it is dropped.
    pub(crate) fn keeping(&self) -> Arc<Pool> {
        Arc::new(Pool { state: Mutex::default(), dry: self.dry, cuda: self.cuda.clone(), keeps: true })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic cannot leave the counters half-updated in a way that matters: keep going.
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(crate) fn is_dry(&self) -> bool {
        self.dry
    }

    pub(crate) fn cuda(&self) -> Option<&Arc<Cuda>> {
        self.cuda.as_ref()
    }

    pub(crate) fn stats(&self) -> MemoryStats {
        self.state().stats
    }

    /// Bytes of memory for a buffer of so many.
    fn room(&self, bytes: usize) -> usize {
        if self.cuda.is_some() || bytes < ROOMY { bytes } else { bytes.next_multiple_of(1 << (bytes.ilog2() - 3)) }
    }

    pub(crate) fn alloc(self: &Arc<Pool>, len: usize, dtype: DType) -> Buf {
        let bytes = len * dtype.size();
        let room = self.room(bytes);
        let mut guard = self.state();
        let s = &mut *guard;
        s.stats.in_use += bytes;
        s.stats.peak = s.stats.peak.max(s.stats.in_use);
        s.clock += 1;
        let now = s.clock;
        let found = s.free.get_mut(&room).and_then(|free| {
            free.used = now;
            free.buffers.pop()
        });
        let data = found.unwrap_or_else(|| {
            // Work of ever new shapes would keep buffers of all of them; a step of one shape doesn't come here again. What was used least recently
            // goes, so that as much memory as this stays in use rather than coming and going.
            let most = 2 * s.stats.peak + SLACK;
            while s.stats.reserved + room > most && self.drop_oldest(s) {}
            s.stats.reserved += room;
            match &self.cuda {
                _ if self.dry => Data::Dry,
                None => {
                    let mut zeros = vec![0.0; room / size_of::<f32>()].into_boxed_slice();
                    if bytes >= LARGE {
                        crate::pages::ask(&mut zeros);
                    }
                    Data::Host(zeros)
                }
                Some(cuda) => {
                    let p = cuda.take(bytes).or_else(|| {
                        // Buffers of other lengths may be in the way.
                        self.drop_free(s);
                        cuda.take(bytes)
                    });
                    Data::Device(p.unwrap_or_else(|| {
                        cuda.out_of_memory(bytes);
                        DevicePtr::NULL
                    }))
                }
            }
        });
        drop(guard);
        Buf { data, len, dtype, pool: self.clone(), whole: None }
    }

    /// `count` buffers of `len` elements; on a GPU one after the other in one piece of memory, which comes back with the last of them.
    pub(crate) fn alloc_together(self: &Arc<Pool>, count: usize, len: usize, dtype: DType) -> Vec<Buf> {
        let Some(cuda) = self.cuda.as_ref().filter(|_| count > 1) else {
            return (0..count).map(|_| self.alloc(len, dtype)).collect();
        };
        let whole = Arc::new(self.alloc(count * len, dtype));
        let part = |i: usize| {
            let data = match whole.data {
                Data::Device(p) => {
                    let p = p.offset(i * len, dtype);
                    cuda.holds(p, len * dtype.size());
                    Data::Device(p)
                }
                _ => Data::Dry,
            };
            Buf { data, len, dtype, pool: self.clone(), whole: Some(whole.clone()) }
        };
        (0..count).map(part).collect()
    }

    pub(crate) fn trim(&self) {
        self.drop_free(&mut self.state());
    }

    /// Gives all free buffers back to the system.
    fn drop_free(&self, s: &mut State) {
        while self.drop_oldest(s) {}
    }

    /// Gives back the free buffers of the length that was used least recently: whether there were any.
    fn drop_oldest(&self, s: &mut State) -> bool {
        if self.keeps {
            return false;
        }
        let Some((&room, _)) = s.free.iter().min_by_key(|(_, free)| free.used) else { return false };
        let Some(Free { buffers, .. }) = s.free.remove(&room) else { return false };
        s.stats.reserved -= room * buffers.len();
        for data in buffers {
            if let (Data::Device(p), Some(cuda)) = (data, &self.cuda) {
                cuda.give_back(p);
            }
        }
        true
    }
}

/// A buffer from a context's pool; it goes back there when dropped.
///
/// On the CPU it is a slice of f32. On a GPU, as in a forecast, the slice is empty: kernels take [`Buf::ptr`], and [`Buf::to_vec`]
/// and [`Buf::copy_from`] move values.
pub struct Buf {
    data: Data,
    len: usize,
    dtype: DType,
    pool: Arc<Pool>,
    /// What this is a part of, if it has no memory of its own.
    whole: Option<Arc<Buf>>,
}

impl Buf {
    /// All of `whole` once more, which lives as long as this.
    pub(crate) fn inside(whole: &Arc<Buf>) -> Buf {
        let data = match whole.data {
            Data::Device(p) => Data::Device(p),
            _ => Data::Dry,
        };
        Buf { data, len: whole.len, dtype: whole.dtype, pool: whole.pool.clone(), whole: Some(whole.clone()) }
    }

    /// Number of elements, wherever they are.
    #[allow(clippy::len_without_is_empty)] // `is_empty` of the slice would disagree off the CPU
    pub fn len(&self) -> usize {
        self.len
    }

    /// Element type; always f32 on the CPU.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.len * self.dtype.size()
    }

    /// Address on the device; null on the CPU.
    pub fn ptr(&self) -> DevicePtr {
        match self.data {
            Data::Device(p) => p,
            _ => DevicePtr::NULL,
        }
    }

    /// Sets all elements to zero.
    pub fn clear(&mut self) {
        match (&mut self.data, &self.pool.cuda) {
            (Data::Host(h), _) => h[..self.len].fill(0.0),
            (Data::Device(p), Some(cuda)) => cuda.clear(*p, self.len * self.dtype.size()),
            _ => {}
        }
    }

    /// The values as f32; waits for the device. Empty in a forecast.
    pub fn to_vec(&self) -> Vec<f32> {
        match (&self.data, &self.pool.cuda) {
            (Data::Host(h), _) => h[..self.len].to_vec(),
            (Data::Device(p), Some(cuda)) => {
                let mut raw = vec![0u8; self.bytes()];
                cuda.download(*p, &mut raw);
                match self.dtype {
                    DType::F32 => raw.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
                    DType::F16 => raw.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
                    DType::BF16 => raw.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
                }
            }
            _ => Vec::new(),
        }
    }

    /// The f64 that kernels wrote into a buffer of f32, each in the room of two; waits for the device. Empty in a forecast and on the CPU.
    pub fn to_f64(&self) -> Vec<f64> {
        match (&self.data, &self.pool.cuda) {
            (Data::Device(p), Some(cuda)) => {
                let mut raw = vec![0u8; self.bytes()];
                cuda.download(*p, &mut raw);
                raw.as_chunks().0.iter().map(|b| f64::from_le_bytes(*b)).collect()
            }
            _ => Vec::new(),
        }
    }

    /// Adds the values of `other`, of the same length and type.
    pub fn add(&mut self, other: &Buf) {
        assert!(self.len == other.len && self.dtype == other.dtype);
        match (&mut self.data, &self.pool.cuda) {
            (Data::Host(h), _) => h[..self.len].iter_mut().zip(other.iter()).for_each(|(s, g)| *s += g),
            (Data::Device(p), Some(cuda)) => cuda.add(*p, other.ptr(), self.len, self.dtype),
            _ => {}
        }
    }

    /// A copy of `len` elements from `start` on.
    pub fn part(&self, start: usize, len: usize) -> Buf {
        let mut to = self.pool.alloc(len, self.dtype);
        match (&mut to.data, &self.pool.cuda) {
            (Data::Host(h), _) => h[..len].copy_from_slice(&self[start..start + len]),
            (Data::Device(p), Some(cuda)) => {
                cuda.copy(self.ptr().offset(start, self.dtype), *p, len * self.dtype.size());
            }
            _ => {}
        }
        to
    }

    /// Overwrites the elements from `start` on with `len` of another buffer of the same type, from its element `first` on.
    ///
    /// # Panics
    /// If they don't fit or the types differ.
    pub fn write_part(&mut self, start: usize, from: &Buf, first: usize, len: usize) {
        assert!(start + len <= self.len && first + len <= from.len && self.dtype == from.dtype);
        match (&mut self.data, &self.pool.cuda) {
            (Data::Host(h), _) => h[start..start + len].copy_from_slice(&from[first..first + len]),
            (Data::Device(p), Some(cuda)) => {
                let (to, from) = (p.offset(start, self.dtype), from.ptr().offset(first, self.dtype));
                cuda.copy(from, to, len * self.dtype.size());
            }
            _ => {}
        }
    }

    /// A copy in a buffer of its own.
    pub fn duplicate(&self) -> Buf {
        let mut to = self.pool.alloc(self.len, self.dtype);
        match (&mut to.data, &self.pool.cuda) {
            (Data::Host(h), _) => h[..self.len].copy_from_slice(self),
            (Data::Device(p), Some(cuda)) => cuda.copy(self.ptr(), *p, self.bytes()),
            _ => {}
        }
        to
    }

    /// Overwrites the values, rounding to the element type. Nothing happens in a forecast.
    ///
    /// # Panics
    /// If the lengths differ.
    pub fn copy_from(&mut self, src: &[f32]) {
        assert!(src.len() == self.len || matches!(self.data, Data::Dry));
        self.write(0, src);
    }

    /// Overwrites the elements from `start` on, rounding to the element type. Nothing happens in a forecast.
    ///
    /// # Panics
    /// If they don't fit.
    pub fn write(&mut self, start: usize, src: &[f32]) {
        match (&mut self.data, &self.pool.cuda) {
            (Data::Host(h), _) => h[..self.len][start..start + src.len()].copy_from_slice(src),
            (Data::Device(p), Some(cuda)) => {
                assert!(start + src.len() <= self.len);
                let mut raw = vec![0; src.len() * self.dtype.size()];
                self.dtype.encode(src, &mut raw);
                cuda.upload(p.offset(start, self.dtype), &raw);
            }
            _ => {}
        }
    }
}

impl Buf {
    /// Overwrites the elements of a device buffer from `start` on with values of its type, little-endian. Nothing happens elsewhere.
    ///
    /// # Panics
    /// If they don't fit.
    pub fn write_raw(&mut self, start: usize, raw: &[u8]) {
        assert!(start * self.dtype.size() + raw.len() <= self.bytes());
        if let (Data::Device(p), Some(cuda)) = (&self.data, &self.pool.cuda) {
            cuda.upload(p.offset(start, self.dtype), raw);
        }
    }
}

impl Deref for Buf {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        match &self.data {
            Data::Host(h) => &h[..self.len],
            _ => &[],
        }
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [f32] {
        match &mut self.data {
            Data::Host(h) => &mut h[..self.len],
            _ => &mut [],
        }
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        if self.whole.is_some() {
            return;
        }
        let data = std::mem::replace(&mut self.data, Data::Dry);
        let (bytes, room) = (self.bytes(), self.pool.room(self.bytes()));
        let mut guard = self.pool.state();
        let s = &mut *guard;
        s.stats.in_use -= bytes;
        s.clock += 1;
        let free = s.free.entry(room).or_default();
        free.used = s.clock;
        free.buffers.push(data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reuse_is_counted() {
        let p = Pool::new(false, None);
        let a = p.alloc(10, DType::F32);
        let at = a.as_ptr();
        drop(a);
        let b = p.alloc(10, DType::F32);
        assert_eq!(b.as_ptr(), at);
        let _c = p.alloc(11, DType::F32);
        assert_eq!(p.stats(), MemoryStats { in_use: 84, peak: 84, reserved: 84 });
        drop(b);
        p.trim();
        assert_eq!(p.stats().reserved, 44);
    }

    #[test]
    fn large_lengths_share_memory_with_those_a_little_smaller() {
        let p = Pool::new(false, None);
        let mut a = p.alloc(63_000, DType::F32);
        a.iter_mut().for_each(|v| *v = 7.0);
        let at = a.as_ptr();
        drop(a);
        let mut b = p.alloc(65_536, DType::F32);
        assert!(b.as_ptr() == at && b.len() == 65_536 && (*b).len() == 65_536);
        b.clear();
        assert_eq!(p.stats(), MemoryStats { in_use: 4 << 16, peak: 4 << 16, reserved: 4 << 16 });
        drop(b);
        // More than an eighth of a power of two apart.
        drop(p.alloc(57_344, DType::F32));
        assert_eq!(p.stats().reserved, 4 * (65_536 + 57_344));
        for len in [0, 1, 16_383, 16_384, 16_385, 18_432, 18_433, 1 << 24] {
            let room = p.room(4 * len);
            assert!((4 * len..=4 * len + len / 2).contains(&room) && room.is_multiple_of(4), "{len}: {room}");
        }
    }

    #[test]
    fn ever_new_lengths_do_not_pile_up() {
        for p in [Pool::new(false, None), Pool::new(true, None)] {
            let weights = p.alloc(1 << 20, DType::F32);
            let len = |i: usize| (8 + i) << 17;
            for i in 0..40 {
                drop(p.alloc(len(i), DType::F32));
                assert!(p.stats().reserved <= 2 * p.stats().peak + SLACK);
            }
            // As much as this stays, so that memory doesn't come and go.
            assert!(p.stats().reserved + p.stats().peak > 2 * p.stats().peak + SLACK);
            // A length that comes again is still there.
            let before = p.stats().reserved;
            drop(p.alloc(len(39), DType::F32));
            assert_eq!(p.stats().reserved, before);
            drop(weights);
        }
    }

    #[test]
    fn forecast_counts_like_the_real_pool() {
        let (real, dry) = (Pool::new(false, None), Pool::new(true, None));
        for p in [&real, &dry] {
            let a = p.alloc(100, DType::F32);
            drop(p.alloc(50, DType::F32));
            let _b = p.alloc(50, DType::F32);
            drop(a);
            let _c = p.alloc(70, DType::F32);
        }
        assert_eq!(real.stats(), dry.stats());
    }
}
