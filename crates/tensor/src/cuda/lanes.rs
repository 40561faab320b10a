//! Work side by side: small products leave most of a GPU idle, and several of them at a time don't.

use super::{Cuda, lock};
use cudarc::driver::sys as cu;
use std::cell::Cell;
use std::sync::Mutex;

/// Streams: the device's own and those beside it.
pub(super) const LANES: usize = 4;

thread_local! {
    /// The lane of this thread's work.
    static LANE: Cell<usize> = const { Cell::new(0) };
}

/// The streams beside the device's own, each with an event for where its work ends; made when they are first wanted.
#[derive(Default)]
pub(super) struct Lanes(Mutex<Option<Beside>>);

#[derive(Clone, Copy)]
struct Beside {
    fork: cu::CUevent,
    streams: [cu::CUstream; LANES - 1],
    ends: [cu::CUevent; LANES - 1],
}

impl Cuda {
    /// The lane on which this thread's work goes; 0 is the device's own stream.
    pub(super) fn lane(&self) -> usize {
        LANE.get()
    }

    /// The stream of this thread's lane.
    pub(super) fn stream(&self) -> cu::CUstream {
        match self.lane() {
            0 => self.stream,
            lane => lock(&self.lanes.0).map_or(self.stream, |beside| beside.streams[lane - 1]),
        }
    }

    /// Runs `f(0)`, .., `f(count - 1)`, whose work the device may do at the same time: after all work before, and before all work after.
    /// Whatever memory one of them uses must be held until this returns, and none may write what another one uses. While a profile is
    /// taken they work one after the other.
    pub fn beside(&self, count: usize, mut f: impl FnMut(usize)) {
        let beside =
            if count < 2 || self.lane() > 0 || !self.enter() || self.is_profiling() { None } else { self.made() };
        let Some(beside) = beside else { return (0..count).for_each(f) };
        let lanes = 1..LANES.min(count);
        let note = |code| self.note(code, || "working side by side".into());
        // SAFETY: streams and events live as long as the process; a wait is for what an event recorded last, on this thread.
        unsafe {
            note(cu::cuEventRecord(beside.fork, self.stream));
            for l in lanes.clone() {
                note(cu::cuStreamWaitEvent(beside.streams[l - 1], beside.fork, 0));
            }
        }
        for i in 0..count {
            LANE.set(i % LANES);
            f(i);
        }
        LANE.set(0);
        for l in lanes {
            // SAFETY: as above.
            unsafe {
                note(cu::cuEventRecord(beside.ends[l - 1], beside.streams[l - 1]));
                note(cu::cuStreamWaitEvent(self.stream, beside.ends[l - 1], 0));
            }
        }
    }

    /// The streams beside the device's own; `None` after a failure.
    fn made(&self) -> Option<Beside> {
        let mut lanes = lock(&self.lanes.0);
        if lanes.is_none() {
            let (event, stream) = (std::ptr::null_mut(), std::ptr::null_mut());
            let mut new = Beside { fork: event, streams: [stream; LANES - 1], ends: [event; LANES - 1] };
            let note = |code| self.note(code, || "making a stream".into());
            let mut ok = true;
            // SAFETY: each call writes a handle.
            unsafe {
                for s in &mut new.streams {
                    ok &= note(cu::cuStreamCreate(s, cu::CUstream_flags::CU_STREAM_NON_BLOCKING as u32));
                }
                for e in new.ends.iter_mut().chain([&mut new.fork]) {
                    ok &= note(cu::cuEventCreate(e, cu::CUevent_flags::CU_EVENT_DISABLE_TIMING as u32));
                }
            }
            *lanes = ok.then_some(new);
        }
        *lanes
    }
}
