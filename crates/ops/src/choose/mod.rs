//! Choosing tokens from logits that lie on a GPU, so that they needn't come to the host.

use crate::gpu::{int, table};
use anser_tensor::cuda::{DevicePtr, Module};
use anser_tensor::{Buf, Context};

#[cfg(test)]
mod tests;

static KERNELS: Module = Module::new(include_bytes!("kernel.fatbin"));

/// How a token is chosen.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Draw {
    /// Which row of the logits.
    pub row: usize,
    /// `None`: the first of the most probable ones.
    pub from: Option<Cuts>,
}

/// Which tokens are drawn from, and how.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cuts {
    /// Power of the probabilities before the cuts.
    pub before: f32,
    /// And after them.
    pub after: f32,
    /// The most probable tokens that together reach this probability stay, and those whose logits are less than 2^-18 below the last one. Of less than 1
    /// it drops tokens below 1e-7 times the largest probability, too.
    pub top_p: f32,
    /// Tokens below this share of the largest probability are dropped.
    pub min_p: f32,
    /// A uniform random number.
    pub random: u64,
}

impl Draw {
    /// Words of a draw as the kernel has it.
    pub const WORDS: usize = 8;

    /// Itself as the kernel has it.
    pub fn words(&self) -> [i32; Draw::WORDS] {
        let Some(cuts) = self.from else { return [0, 0, 0, 0, 0, 0, self.row as i32, 1] };
        let least = if cuts.top_p < 1.0 { cuts.min_p.max(1.13e-7) } else { cuts.min_p };
        let bits = |v: f32| v.to_bits() as i32;
        let (low, high) = (cuts.random as i32, (cuts.random >> 32) as i32);
        let reach = if least > 0.0 { -least.ln() } else { f32::INFINITY };
        [bits(cuts.before), bits(cuts.after), bits(cuts.top_p), bits(reach), low, high, self.row as i32, 0]
    }
}

/// Enqueues the choice of `count` tokens from logits [rows, V] in f32: `draws` has the [words](Draw::words) of each, `tokens` gets an `int` for
/// each, -1 where a logit is no finite number. Nothing without a GPU.
pub fn choose(ctx: &Context, logits: DevicePtr, draws: DevicePtr, tokens: DevicePtr, count: usize, vocab: usize) {
    if let Some(gpu) = ctx.cuda().filter(|_| count > 0) {
        let args = [logits.into(), draws.into(), tokens.into(), int(vocab)];
        gpu.launch(&KERNELS, "choose", [count, 1, 1], [1024, 1, 1], &args);
    }
}

/// The same for logits and draws of the host. `None` without a GPU.
pub fn chosen(ctx: &Context, logits: &[f32], draws: &[Draw], vocab: usize) -> Option<Vec<i32>> {
    ctx.cuda()?;
    let mut rows: Buf = ctx.alloc_f32(logits.len());
    rows.copy_from(logits);
    let words: Vec<i32> = draws.iter().flat_map(Draw::words).collect();
    let (words, tokens) = (table(ctx, &words), ctx.alloc_f32(draws.len()));
    choose(ctx, rows.ptr(), words.ptr(), tokens.ptr(), draws.len(), vocab);
    Some(tokens.to_vec().into_iter().map(|v| v.to_bits() as i32).collect())
}
