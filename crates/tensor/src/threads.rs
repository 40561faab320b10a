use std::marker::PhantomData;
use std::ops::Range;

/// The CPU threads of a context.
pub struct ThreadPool {
    threads: usize,
}

impl ThreadPool {
    /// A pool of `threads` threads, the caller being one of them (0: as many as this process may use).
    pub fn new(threads: usize) -> ThreadPool {
        let n = if threads == 0 { std::thread::available_parallelism().map_or(1, |n| n.get()) } else { threads };
        ThreadPool { threads: n }
    }

    /// Number of threads, the caller included.
    pub fn len(&self) -> usize {
        self.threads
    }

    /// Never true: the caller is always there.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Runs `f(0), f(1), .. f(tasks - 1)`, each once, on any thread, and returns when all are done.
    /// Which thread runs a task must not change its result.
    pub fn run(&self, tasks: usize, f: impl Fn(usize) + Sync) {
        for i in 0..tasks {
            f(i);
        }
    }
}

/// A slice of which parallel tasks take disjoint parts.
pub struct DisjointMut<'a, T> {
    ptr: *mut T,
    len: usize,
    life: PhantomData<&'a mut [T]>,
}

// SAFETY: the only access is through `get`, whose contract is that concurrently held ranges are disjoint.
unsafe impl<T: Send> Sync for DisjointMut<'_, T> {}
// SAFETY: as above; it is a `&mut [T]` in another form.
unsafe impl<T: Send> Send for DisjointMut<'_, T> {}

impl<'a, T> DisjointMut<'a, T> {
    /// Wraps a slice.
    pub fn new(slice: &'a mut [T]) -> Self {
        DisjointMut { ptr: slice.as_mut_ptr(), len: slice.len(), life: PhantomData }
    }

    /// The part `range` of the slice. Panics if it is out of bounds.
    ///
    /// # Safety
    /// No two parts that overlap may be held at the same time.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn get(&self, range: Range<usize>) -> &'a mut [T] {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: in bounds by the assertion, exclusive by the caller's promise.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.add(range.start), range.end - range.start) }
    }
}
