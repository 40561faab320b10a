//! Weights that begin at a line of the cache.

use std::ops::{Deref, DerefMut};

/// Bytes of a line.
const LINE: usize = 64;

/// A fixed number of elements from a multiple of 64 bytes on, so that what is 64 bytes long is read as one line.
pub(crate) struct Lines<T> {
    elements: Vec<T>,
    start: usize,
}

impl<T: Copy + Default> Lines<T> {
    /// So many zeros.
    pub fn zeros(len: usize) -> Lines<T> {
        let spare = LINE / size_of::<T>();
        let mut elements = vec![T::default(); len + spare];
        let start = elements.as_ptr().align_offset(LINE).min(spare);
        elements.truncate(start + len);
        Lines { elements, start }
    }
}

impl<T> Deref for Lines<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.elements[self.start..]
    }
}

impl<T> DerefMut for Lines<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.elements[self.start..]
    }
}
