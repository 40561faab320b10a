//! The pooled allocator: buffers of f32 that return to the pool of their context when dropped.
//!
//! Reuse is by exact length, last in first out. A training step allocates the same lengths in the same order
//! every time, so from the second step on it allocates nothing new and sees the same addresses: the step has a
//! fixed allocation plan per shape. [`crate::Context::forecast`] runs the same code with lengths only, which
//! makes its peak the memory forecast.

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

#[derive(Default)]
struct State {
    free: HashMap<usize, Vec<Box<[f32]>>>,
    /// Dry pools count their free buffers only.
    dry_free: HashMap<usize, usize>,
    stats: MemoryStats,
}

pub(crate) struct Pool {
    state: Mutex<State>,
    dry: bool,
}

impl Pool {
    pub(crate) fn new(dry: bool) -> Arc<Pool> {
        Arc::new(Pool { state: Mutex::default(), dry })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic cannot leave the counters half-updated in a way that matters: keep going.
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    pub(crate) fn is_dry(&self) -> bool {
        self.dry
    }

    pub(crate) fn stats(&self) -> MemoryStats {
        self.state().stats
    }

    pub(crate) fn alloc(self: &Arc<Pool>, len: usize) -> Buf {
        let mut guard = self.state();
        let s = &mut *guard;
        s.stats.in_use += len * 4;
        s.stats.peak = s.stats.peak.max(s.stats.in_use);
        let data = if self.dry {
            match s.dry_free.get_mut(&len) {
                Some(n) if *n > 0 => *n -= 1,
                _ => s.stats.reserved += len * 4,
            }
            Box::default()
        } else {
            match s.free.get_mut(&len).and_then(Vec::pop) {
                Some(b) => b,
                None => {
                    s.stats.reserved += len * 4;
                    vec![0.0; len].into_boxed_slice()
                }
            }
        };
        drop(guard);
        Buf { data, len, pool: self.clone() }
    }

    pub(crate) fn trim(&self) {
        let mut s = self.state();
        s.free.clear();
        s.dry_free.clear();
        s.stats.reserved = s.stats.in_use;
    }
}

/// A buffer of f32 from a context's pool; it goes back there when dropped.
///
/// In a forecast context it has a length but no memory: [`Buf::len`] works, the contents are empty.
pub struct Buf {
    data: Box<[f32]>,
    len: usize,
    pool: Arc<Pool>,
}

impl Buf {
    /// Number of elements, also in a forecast.
    #[allow(clippy::len_without_is_empty)] // `is_empty` of the slice would disagree in a forecast
    pub fn len(&self) -> usize {
        self.len
    }
}

impl Deref for Buf {
    type Target = [f32];
    fn deref(&self) -> &[f32] {
        &self.data
    }
}

impl DerefMut for Buf {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.data
    }
}

impl Drop for Buf {
    fn drop(&mut self) {
        let data = std::mem::take(&mut self.data);
        let mut s = self.pool.state();
        s.stats.in_use -= self.len * 4;
        if self.pool.dry {
            *s.dry_free.entry(self.len).or_default() += 1;
        } else {
            s.free.entry(self.len).or_default().push(data);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reuse_is_exact_and_counted() {
        let p = Pool::new(false);
        let a = p.alloc(10);
        let at = a.as_ptr();
        drop(a);
        let b = p.alloc(10);
        assert_eq!(b.as_ptr(), at);
        let _c = p.alloc(11);
        assert_eq!(p.stats(), MemoryStats { in_use: 84, peak: 84, reserved: 84 });
        drop(b);
        p.trim();
        assert_eq!(p.stats().reserved, 44);
    }

    #[test]
    fn forecast_counts_like_the_real_pool() {
        let (real, dry) = (Pool::new(false), Pool::new(true));
        for p in [&real, &dry] {
            let a = p.alloc(100);
            drop(p.alloc(50));
            let _b = p.alloc(50);
            drop(a);
            let _c = p.alloc(70);
        }
        assert_eq!(real.stats(), dry.stats());
    }
}
