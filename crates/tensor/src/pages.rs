//! Memory in large pages.
//!
//! Linux has pages of 2 MiB for those who ask. In pages of 4 KiB, fetching ahead stops at the end of each and every one needs a translation, which costs
//! products with one row a third of the memory's bandwidth.

use half::f16;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Mutex};

/// Bytes of a line of the cache.
const LINE: usize = 64;
/// Bytes that matrices smaller than that share.
const BLOCK: usize = 32 << 20;

/// Asks for large pages where they fit into `memory`, which should not have been written to yet. Whether there are any is up to the system.
pub(crate) fn ask<T>(memory: &mut [T]) {
    #[cfg(target_os = "linux")]
    {
        const PAGE: usize = 4096;
        let start = memory.as_ptr().addr();
        let (first, end) = (start.next_multiple_of(PAGE), (start + size_of_val(memory)) / PAGE * PAGE);
        if end.saturating_sub(first) >= 2 << 20 {
            let first = memory.as_mut_ptr().cast::<u8>().wrapping_add(first - start);
            // SAFETY: whole pages of memory that is ours; the advice changes no contents. If it is refused, pages are small.
            unsafe { libc::madvise(first.cast(), end - first.addr(), libc::MADV_HUGEPAGE) };
        }
    }
    #[cfg(not(target_os = "linux"))]
    let _ = memory;
}

/// Types of which zero bytes are a value, and which need no drop.
///
/// # Safety
/// That must be so.
pub(crate) unsafe trait Plain: Copy {}
// SAFETY: numbers without a pattern of bits that is none.
unsafe impl Plain for u8 {}
// SAFETY: as above.
unsafe impl Plain for u16 {}
// SAFETY: as above.
unsafe impl Plain for f32 {}
// SAFETY: as above, in a transparent struct.
unsafe impl Plain for f16 {}

/// Memory that lives as long as somebody has a part of it.
struct Block(*mut [u8]);

// SAFETY: it is memory, nothing else; who may touch which part is `Lines`' business.
unsafe impl Send for Block {}
// SAFETY: as above.
unsafe impl Sync for Block {}

impl Block {
    /// So many zeros.
    fn new(bytes: usize) -> Block {
        let mut memory = vec![0u8; bytes].into_boxed_slice();
        ask(&mut memory);
        Block(Box::into_raw(memory))
    }

    /// The first place from `from` on where a line begins.
    fn line(&self, from: usize) -> usize {
        let start = self.0.cast::<u8>().addr();
        (start + from).next_multiple_of(LINE) - start
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: from a box, and nobody has a part any more.
        drop(unsafe { Box::from_raw(self.0) });
    }
}

/// Where a context's weights are: small matrices share large pages.
#[derive(Default)]
pub(crate) struct Pages {
    /// The block that has room, and how much of it is taken.
    open: Mutex<Option<(Arc<Block>, usize)>>,
}

impl Pages {
    /// So many zeros, in memory that is free again when all are dropped that share it.
    pub fn zeros<T: Plain>(&self, len: usize) -> Lines<T> {
        let bytes = len * size_of::<T>();
        if bytes + LINE > BLOCK / 2 {
            let block = Block::new(bytes + LINE);
            return Lines::new(Arc::new(block), 0, len);
        }
        let mut open = self.open.lock().unwrap_or_else(|e| e.into_inner());
        let (block, taken) = match open.take() {
            Some((block, taken)) if block.line(taken) + bytes <= BLOCK => (block, taken),
            _ => (Arc::new(Block::new(BLOCK)), 0),
        };
        *open = Some((block.clone(), block.line(taken) + bytes));
        Lines::new(block, taken, len)
    }
}

/// A fixed number of elements from a multiple of 64 bytes on, so that what is 64 bytes long is read as one line.
pub(crate) struct Lines<T> {
    start: *mut T,
    len: usize,
    /// Keeps the memory.
    _block: Arc<Block>,
    _owns: PhantomData<T>,
}

// SAFETY: it owns its elements as a vector does.
unsafe impl<T: Send> Send for Lines<T> {}
// SAFETY: as above.
unsafe impl<T: Sync> Sync for Lines<T> {}

impl<T: Plain> Lines<T> {
    /// The elements of `block` from the first line after so many bytes; nobody else may have them.
    fn new(block: Arc<Block>, taken: usize, len: usize) -> Lines<T> {
        let at = block.line(taken);
        assert!(at + len * size_of::<T>() <= block.0.len() && align_of::<T>() <= LINE);
        Lines { start: block.0.cast::<u8>().wrapping_add(at).cast(), len, _block: block, _owns: PhantomData }
    }
}

impl<T> Deref for Lines<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        // SAFETY: in bounds, aligned, zeros or written, and these elements are nobody else's.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

impl<T> DerefMut for Lines<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.len) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_begin_at_lines_and_do_not_overlap() {
        let pages = Pages::default();
        let lengths = [1, 0, 64, 1000, 3 << 20, BLOCK / 8, BLOCK / 4, BLOCK / 4 - 1, 7, BLOCK];
        let mut parts: Vec<Lines<u16>> = lengths.iter().map(|len| pages.zeros(*len)).collect();
        for (i, part) in parts.iter_mut().enumerate() {
            assert!(part.len() == lengths[i] && part.as_ptr().addr().is_multiple_of(LINE));
            assert!(part.iter().all(|v| *v == 0), "{i}");
            part.fill(i as u16 + 1);
        }
        assert!(parts.iter().enumerate().all(|(i, part)| part.iter().all(|v| *v == i as u16 + 1)));
        // Memory outlives who gave it.
        drop(pages);
        parts.truncate(1);
        assert_eq!(parts[0][..], [1]);
    }

    #[test]
    fn what_is_asked_for_is_left_as_it_was() {
        for len in [0, 1, 5000, 5 << 20] {
            let mut memory: Vec<u8> = (0..len).map(|i| i as u8).collect();
            ask(&mut memory[len.min(1)..]);
            assert!(memory.iter().enumerate().all(|(i, v)| *v == i as u8));
        }
    }
}
