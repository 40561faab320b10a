//! Work of a GPU that is done again and again with other inputs, recorded once: launching it costs as much as one kernel.
//!
//! The inputs are what [`Context::upload_i32`] copies to the device. The first time the work is done as usual, in memory of its own, and keeps a
//! place for every input; the second time it is recorded; from then on the same code runs in a context that computes and launches nothing, only to
//! say what its inputs are, and what was recorded is launched. What is copied but is the same every time, as tables with addresses
//! ([`Context::upload_fixed`]), is copied when the work is recorded.

use crate::cuda::Graph;
use crate::{Buf, Context, Error};
use std::sync::Arc;

/// What becomes of [`Context::upload_i32`].
#[derive(Default)]
pub(crate) enum Uploads {
    /// A copy to the device.
    #[default]
    Once,
    /// The same, to a place that is kept.
    Kept(Vec<Slot>),
    /// The places that were kept, in order, and what is to be copied there.
    Again(Vec<Slot>, Vec<Vec<u8>>),
    /// What is to be copied, but for what is fixed.
    Noted(Vec<Vec<u8>>),
}

/// A place on the device that is kept for something copied there.
#[derive(Clone)]
pub(crate) struct Slot {
    pub(crate) buf: Arc<Buf>,
    /// Whether it is the same every time.
    pub(crate) fixed: bool,
}

/// Recorded work.
pub struct Recorded {
    ctx: Context,
    /// Where the work says its inputs and does nothing.
    dry: Context,
    slots: Vec<Slot>,
    graph: Option<Graph>,
    times: u64,
}

/// What came of [`Recorded::run`].
pub enum Pass<R> {
    /// The work was done, and this is its result.
    Done(R),
    /// The same, and the result's buffers are those that later passes fill, too: it must be kept.
    Recorded(R),
    /// Recorded work was done: its results are those that were kept.
    Again,
    /// The work copies from or to the host, waits for the device, or has other inputs than before: nothing was done.
    Impossible,
}

impl Recorded {
    /// Nothing yet; `None` where nothing can be recorded: on a CPU, in a forecast, and while a profile is taken.
    pub fn new(ctx: &Context) -> Option<Recorded> {
        if ctx.is_dry() || ctx.cuda().is_none_or(|c| c.is_profiling()) {
            return None;
        }
        let (own, dry) = (ctx.apart(), ctx.dry());
        *own.uploads() = Uploads::Kept(Vec::new());
        *dry.uploads() = Uploads::Noted(Vec::new());
        Some(Recorded { ctx: own, dry, slots: Vec::new(), graph: None, times: 0 })
    }

    /// Whether the work is recorded.
    pub fn is_recorded(&self) -> bool {
        self.graph.is_some()
    }

    /// Does `work`, which must enqueue the same every time but for its inputs, and wait for nothing.
    ///
    /// # Errors
    /// Those of `work`, which has then done nothing, unless it is the first time. When the device fails.
    pub fn run<R, E: From<Error>>(&mut self, work: impl FnOnce(&Context) -> Result<R, E>) -> Result<Pass<R>, E> {
        self.times += 1;
        if self.times == 1 {
            let done = work(&self.ctx)?;
            if let Uploads::Kept(slots) = std::mem::take(&mut *self.ctx.uploads()) {
                self.slots = slots;
            }
            return Ok(Pass::Done(done));
        }
        let Some(cuda) = self.ctx.cuda_shared().cloned() else { return Ok(Pass::Impossible) };
        let (pass, noted) = if self.graph.is_some() {
            work(&self.dry)?;
            (Pass::Again, std::mem::replace(&mut *self.dry.uploads(), Uploads::Noted(Vec::new())))
        } else {
            *self.ctx.uploads() = Uploads::Again(self.slots.clone(), Vec::new());
            let mut done = None;
            self.graph = cuda.record(|| done = Some(work(&self.ctx)));
            cuda.check()?;
            let noted = std::mem::replace(&mut *self.ctx.uploads(), Uploads::Kept(Vec::new()));
            (done.transpose()?.map_or(Pass::Impossible, Pass::Recorded), noted)
        };
        let (inputs, all) = match noted {
            Uploads::Noted(inputs) => (inputs, false),
            Uploads::Again(_, inputs) => (inputs, true),
            _ => return Ok(Pass::Impossible),
        };
        let slots: Vec<&Slot> = self.slots.iter().filter(|s| all || !s.fixed).collect();
        let fit = inputs.len() == slots.len() && inputs.iter().zip(&slots).all(|(i, s)| i.len() == s.buf.bytes());
        let Some(graph) = self.graph.as_ref().filter(|_| fit) else { return Ok(Pass::Impossible) };
        for (slot, input) in slots.iter().zip(&inputs) {
            cuda.upload(slot.buf.ptr(), input);
        }
        graph.replay();
        Ok(pass)
    }
}
