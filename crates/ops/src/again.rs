//! Values that are computed again in the backward pass instead of being kept.

use crate::ParamSet;
use anser_tensor::{Buf, Context};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, Weak};

/// What a tape computes again going back, in the order of memory saved for the traffic it costs. Each contains those before it. The
/// results are the same bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Recompute {
    /// Nothing.
    #[default]
    Nothing,
    /// The inputs that token shift mixes: saves 7 activations a token, channel and layer for 9 passes over memory.
    Shifts,
    /// Also what norms give and the keys of WKV-7: saves 5 more for 9 passes.
    All,
}

impl Recompute {
    /// From the least to the most.
    pub const LEVELS: [Recompute; 3] = [Recompute::Nothing, Recompute::Shifts, Recompute::All];
}

/// A value that a closure of the backward pass needs.
#[derive(Clone)]
pub enum Kept {
    /// It is there.
    Held(Arc<Buf>),
    /// It is made again when it is asked for.
    Again(Arc<Output>),
}

type Make = Box<dyn Fn(&Context, &ParamSet) -> Vec<Buf> + Send + Sync>;

/// One output of an operation that can be made again; made with the others that are still wanted.
pub struct Output {
    value: Mutex<Option<Arc<Buf>>>,
    origin: Arc<Origin>,
}

struct Origin {
    make: Make,
    outputs: OnceLock<Vec<Weak<Output>>>,
}

impl Output {
    /// The `count` outputs that `make` gives together.
    pub(crate) fn group(
        count: usize, make: impl Fn(&Context, &ParamSet) -> Vec<Buf> + Send + Sync + 'static,
    ) -> Vec<Arc<Output>> {
        let origin = Arc::new(Origin { make: Box::new(make), outputs: OnceLock::new() });
        let output = |_| Arc::new(Output { value: Mutex::default(), origin: origin.clone() });
        let outputs: Vec<Arc<Output>> = (0..count).map(output).collect();
        origin.outputs.get_or_init(|| outputs.iter().map(Arc::downgrade).collect());
        outputs
    }

    fn value(&self) -> MutexGuard<'_, Option<Arc<Buf>>> {
        self.value.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl Kept {
    pub(crate) fn value(&self, ctx: &Context, params: &ParamSet) -> Arc<Buf> {
        let output = match self {
            Kept::Held(value) => return value.clone(),
            Kept::Again(output) => output,
        };
        if let Some(value) = &*output.value() {
            return value.clone();
        }
        for (to, buf) in output.origin.outputs.get().into_iter().flatten().zip((output.origin.make)(ctx, params)) {
            if let Some(to) = to.upgrade() {
                *to.value() = Some(buf.into());
            }
        }
        let made = output.value().clone();
        made.unwrap_or_else(|| unreachable!("an operation makes all its outputs"))
    }
}
