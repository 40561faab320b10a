//! A small thread pool: workers spin briefly for the next job, then park. A training step has thousands of parallel
//! regions and a decoding step hundreds, so that waking threads through the kernel each time would cost more than the work.

use std::any::Any;
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::*};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

/// Polls (with a pause between) before a worker parks: some tens of microseconds.
const SPINS: usize = 2000;
/// Lowest 16 bits of the state: workers inside the job. Bit 16: the job is open. Above: its number.
const OPEN: u64 = 1 << 16;
const INSIDE: u64 = OPEN - 1;

type Task = dyn Fn(usize) + Sync;

struct Job {
    task: *const Task,
    tasks: usize,
}

struct Shared {
    state: AtomicU64,
    /// Written only while the job is closed and nobody is inside.
    job: UnsafeCell<Job>,
    next: AtomicUsize,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleepers: AtomicUsize,
    lock: Mutex<()>,
    wake: Condvar,
    stop: AtomicBool,
}

// SAFETY: `job` follows the protocol above; the task it points to is Sync and outlives the open job (`run` waits).
unsafe impl Sync for Shared {}
// SAFETY: as above.
unsafe impl Send for Shared {}

impl Shared {
    /// Takes tasks until there are none.
    fn work(&self) {
        // SAFETY: the caller is inside an open job, so it is not being written and its task is alive.
        let (task, tasks) = unsafe { (&*(*self.job.get()).task, (*self.job.get()).tasks) };
        let result = catch_unwind(AssertUnwindSafe(|| {
            loop {
                let i = self.next.fetch_add(1, Relaxed);
                if i >= tasks {
                    break;
                }
                task(i);
            }
        }));
        if let Err(payload) = result {
            self.next.store(tasks, Relaxed);
            self.panic.lock().unwrap_or_else(|e| e.into_inner()).get_or_insert(payload);
        }
    }

    /// Life of a worker.
    fn serve(&self) {
        let mut done = 0;
        let mut spins = 0;
        while !self.stop.load(Acquire) {
            let state = self.state.load(Acquire);
            if state & OPEN != 0 && state >> 17 != done {
                if self.state.compare_exchange_weak(state, state + 1, AcqRel, Relaxed).is_ok() {
                    self.work();
                    self.state.fetch_sub(1, Release);
                    done = state >> 17;
                    spins = 0;
                }
            } else if spins < SPINS {
                spins += 1;
                std::hint::spin_loop();
            } else {
                let mut guard = self.lock.lock().unwrap_or_else(|e| e.into_inner());
                self.sleepers.fetch_add(1, SeqCst);
                // The opener sets the state first and looks for sleepers then: one of us sees the other.
                while !self.stop.load(SeqCst) && {
                    let state = self.state.load(SeqCst);
                    state & OPEN == 0 || state >> 17 == done
                } {
                    guard = self.wake.wait(guard).unwrap_or_else(|e| e.into_inner());
                }
                self.sleepers.fetch_sub(1, SeqCst);
                spins = 0;
            }
        }
    }

    fn wake_sleepers(&self) {
        if self.sleepers.load(SeqCst) > 0 {
            let _guard = self.lock.lock().unwrap_or_else(|e| e.into_inner());
            self.wake.notify_all();
        }
    }
}

/// The CPU threads of a context.
pub struct ThreadPool {
    shared: Arc<Shared>,
    busy: AtomicBool,
    workers: Vec<JoinHandle<()>>,
}

impl ThreadPool {
    /// A pool of `threads` threads, the caller being one of them. 0: as many as this process may use; on Linux that
    /// respects CPU affinity and the container's CPU quota (`std::thread::available_parallelism`).
    pub fn new(threads: usize) -> ThreadPool {
        let n = if threads == 0 { std::thread::available_parallelism().map_or(1, |n| n.get()) } else { threads };
        fn nothing(_: usize) {}
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(Job { task: &nothing as &Task, tasks: 0 }),
            next: AtomicUsize::new(0),
            panic: Mutex::new(None),
            sleepers: AtomicUsize::new(0),
            lock: Mutex::new(()),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
        });
        let spawn = |i: usize| {
            let shared = shared.clone();
            // A thread that cannot be started is work that the others do.
            std::thread::Builder::new().name(format!("anser-{i}")).spawn(move || shared.serve()).ok()
        };
        let workers = (1..n.min(1024)).filter_map(spawn).collect();
        ThreadPool { shared, busy: AtomicBool::new(false), workers }
    }

    /// Number of threads, the caller included.
    #[allow(clippy::len_without_is_empty)] // never empty: the caller is always there
    pub fn len(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `f(0), f(1), .. f(tasks - 1)`, each once, on any thread, and returns when all are done.
    /// Which thread runs a task must not change its result. A call from inside a task, or while another thread is
    /// using the pool, runs on the calling thread alone. A panic in a task goes on in the caller.
    pub fn run(&self, tasks: usize, f: impl Fn(usize) + Sync) {
        if tasks < 2 || self.workers.is_empty() || self.busy.swap(true, Acquire) {
            (0..tasks).for_each(f);
            return;
        }
        let shared = &*self.shared;
        let task: &(dyn Fn(usize) + Sync) = &f;
        // SAFETY: no job is open and nobody is inside (the last `run` waited for both), so nobody reads `job`. The
        // pointer's lifetime is erased; it is used only while the job is open or somebody inside, and we wait for the end of both.
        unsafe {
            *shared.job.get() =
                Job { task: std::mem::transmute::<*const (dyn Fn(usize) + Sync + '_), *const Task>(task), tasks }
        };
        shared.next.store(0, Relaxed);
        let number = (shared.state.load(Relaxed) >> 17) + 1;
        shared.state.store(number << 17 | OPEN, SeqCst);
        shared.wake_sleepers();
        shared.work();
        shared.state.fetch_and(!OPEN, AcqRel);
        let mut spins = 0;
        while shared.state.load(Acquire) & INSIDE != 0 {
            spins += 1;
            // A worker inside may have lost its core: let it have this one.
            if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
        let panic = shared.panic.lock().unwrap_or_else(|e| e.into_inner()).take();
        self.busy.store(false, Release);
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        {
            let _guard = self.shared.lock.lock().unwrap_or_else(|e| e.into_inner());
            self.shared.wake.notify_all();
        }
        for w in self.workers.drain(..) {
            let _ = w.join();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_on_any_number_of_threads() {
        for threads in [1, 2, 3, 8] {
            let pool = ThreadPool::new(threads);
            assert_eq!(pool.len(), threads);
            for tasks in [0, 1, 2, 7, 1000] {
                for _ in 0..50 {
                    let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(tasks, |i| {
                        counts[i].fetch_add(1, Relaxed);
                    });
                    assert!(counts.iter().all(|c| c.load(Relaxed) == 1));
                }
            }
        }
    }

    #[test]
    fn workers_wake_after_parking() {
        let pool = ThreadPool::new(2);
        for _ in 0..3 {
            std::thread::sleep(std::time::Duration::from_millis(20));
            let seen = Mutex::new(std::collections::HashSet::new());
            pool.run(2, |_| {
                seen.lock().unwrap().insert(std::thread::current().id());
                std::thread::sleep(std::time::Duration::from_millis(20));
            });
            assert_eq!(seen.lock().unwrap().len(), 2);
        }
    }

    #[test]
    fn nested_and_concurrent_calls_finish() {
        let pool = ThreadPool::new(3);
        let sum = AtomicUsize::new(0);
        std::thread::scope(|s| {
            for _ in 0..4 {
                s.spawn(|| {
                    for _ in 0..100 {
                        pool.run(5, |_| {
                            pool.run(4, |_| {
                                sum.fetch_add(1, Relaxed);
                            })
                        });
                    }
                });
            }
        });
        assert_eq!(sum.load(Relaxed), 4 * 100 * 20);
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_lives_on() {
        let pool = ThreadPool::new(2);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(100, |i| {
                if i == 50 {
                    panic!("task 50");
                }
            })
        }));
        assert_eq!(result.unwrap_err().downcast_ref::<&str>(), Some(&"task 50"));
        let n = AtomicUsize::new(0);
        pool.run(10, |_| {
            n.fetch_add(1, Relaxed);
        });
        assert_eq!(n.load(Relaxed), 10);
    }
}
