use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread::{Builder, JoinHandle};

/// Threads that work on something shared, so that others don't wait. What was sent is done before this is gone.
pub(super) struct Workers<T> {
    jobs: Option<Sender<Job<T>>>,
    threads: Vec<JoinHandle<()>>,
}

type Job<T> = Box<dyn FnOnce(&T) + Send>;

impl<T: Send + Sync + 'static> Workers<T> {
    pub fn start(shared: &Arc<T>, name: &str, count: usize) -> std::io::Result<Workers<T>> {
        let (jobs, queue) = channel::<Job<T>>();
        let queue = Arc::new(Mutex::new(queue));
        let thread = |_| {
            let (shared, queue) = (shared.clone(), queue.clone());
            let next = move || queue.lock().unwrap_or_else(|e| e.into_inner()).recv();
            Builder::new().name(name.into()).spawn(move || {
                while let Ok(job) = next() {
                    // Its panic was printed, and concerns nobody else.
                    let _ = catch_unwind(AssertUnwindSafe(|| job(&shared)));
                }
            })
        };
        let threads = (0..count).map(thread).collect::<Result<_, _>>()?;
        Ok(Workers { jobs: Some(jobs), threads })
    }

    /// Has something done, by one thread after all that was sent before.
    pub fn send(&self, job: impl FnOnce(&T) + Send + 'static) {
        // A thread that has ended has said why.
        let _ = self.jobs.as_ref().map(|jobs| jobs.send(Box::new(job)));
    }
}

impl<T> Drop for Workers<T> {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // What it panicked with was printed there.
            let _ = thread.join();
        }
    }
}
