//! Causal attention inside each sequence, dense or sparse by chunks (RWKV-X, arXiv 2504.21463, section 3.2; the rule is that of
//! MoBA, arXiv 2502.13189). Per head of size N, with a sequence cut into chunks of B tokens from its start:
//!
//! ```text
//! m_c = mean of the keys of chunk c           for full chunks, in f32
//! P_t = k - 1 past chunks c: the first few and the last few of the past if so wanted, then those of largest q_t . m_c, of equal ones the
//!       earlier; all if there are fewer
//! A_t = keys of the chunks in P_t, and those of t's own chunk up to t
//! s_tj = q_t . k_j / sqrt(N)    p_tj = exp(s_tj) / sum_{i in A_t} exp(s_ti)    y_t = sum_{j in A_t} p_tj v_j
//! ```
//!
//! While a sequence has no more than k chunks this is dense attention; [`Chunks::WHOLE`] makes it that for any length. The softmax is
//! summed tile by tile of keys with a running maximum (FlashAttention, arXiv 2205.14135), so that nothing of size T x T exists; L_t, the
//! logarithm of its denominator, is kept. Cost per token is k B N for attention and (T / B) N for the choice. Positions are not this
//! operation's business: see [`Tape::rotary`]. Several heads of queries may share one of keys and values (arXiv 2305.13245); each chooses by itself.
//!
//! Backward, with the choice held fixed and D_t = dy_t . y_t: p_tj = exp(s_tj - L_t); ds_tj = p_tj (dy_t . v_j - D_t) / sqrt(N);
//! dq_t = sum_j ds_tj k_j; dk_j = sum_t ds_tj q_t; dv_j = sum_t p_tj dy_t. dq goes by tiles of queries and dk, dv by tiles of keys, each
//! computing p again: every row is summed by one task in a fixed order.

use crate::rows::{blocks, row, sum};
use crate::{Segment, Tape, Var};
use anser_tensor::cuda::DevicePtr;
use anser_tensor::{Context, DType, DisjointMut, Guard};
use std::ops::Range;
use std::sync::Arc;

mod cpu;
mod cuda;
#[cfg(test)]
mod device;
mod past;
mod plan;
#[cfg(test)]
mod tests;

use cpu::{Saved, Sequence, Shape, WIDEST};
pub use past::Past;
use plan::Plan;

/// The rule by which a token sees the past.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunks {
    /// Tokens of a chunk, B, at least 1.
    pub size: usize,
    /// Chunks a token sees, k: its own and k - 1 past ones. At least 1.
    pub top: usize,
    /// The first chunks of a sequence, so many of which are always among the past ones.
    pub sink: usize,
    /// The last chunks before the own one, likewise. Fewer than `top` together with `sink`.
    pub window: usize,
}

impl Chunks {
    /// One chunk of any length: dense attention.
    pub const WHOLE: Chunks = Chunks::new(usize::MAX, 1);

    /// Chunks of `size` tokens, of which a token sees its own and the `top - 1` best past ones.
    pub const fn new(size: usize, top: usize) -> Chunks {
        Chunks { size, top, sink: 0, window: 0 }
    }

    /// Whether a past chunk is seen from chunk `own` whatever its score.
    fn always(&self, chunk: usize, own: usize) -> bool {
        chunk < self.sink || chunk + self.window >= own
    }
}

/// Means of the keys of full chunks, numbered `range`, of a sequence's `keys` [tokens, C], into `to` [chunks, C].
fn means(ctx: &Context, keys: &[f32], range: Range<usize>, size: usize, to: &mut [f32]) {
    let c = to.len() / range.len();
    let to = DisjointMut::new(to);
    ctx.threads().run(range.len(), |i| {
        let mean = row(&to, i, c);
        mean.fill(0.0);
        for key in keys[(range.start + i) * size * c..][..size * c].chunks_exact(c) {
            mean.iter_mut().zip(key).for_each(|(m, k)| *m += k);
        }
        mean.iter_mut().for_each(|m| *m /= size as f32);
    });
}

/// Of each segment whose keys and values are not rows of k and v, but those of a past: how many were there before, and all of them with their
/// means, held while they are read.
type Held<'a> = Vec<Option<(usize, [Guard<'a>; 3])>>;

fn hold<'a>(segments: &[Segment], seen: &'a [Option<Past>]) -> Held<'a> {
    segments.iter().zip(seen).map(|(s, p)| p.as_ref().map(|p| (p.len() - s.len, p.read()))).collect()
}

/// The sequences of segments on the CPU, of keys with `c` channels. `means` are those of segments without a past, one after another.
fn sequences<'a>(
    segments: &[Segment], held: &'a Held<'a>, [k, v, means]: [&'a [f32]; 3], c: usize, chunks: Chunks,
) -> Vec<Sequence<'a>> {
    let mut full = 0;
    let sequence = |(s, held): (&Segment, &'a Option<(usize, [Guard<'a>; 3])>)| {
        let (start, len) = (s.start, s.len);
        if let Some((past, [keys, values, means])) = held {
            return Sequence { start, len, past: *past, keys, values, means };
        }
        let rows = start * c..(start + len) * c;
        let means = &means[(full * c).min(means.len())..];
        full += len / chunks.size;
        Sequence { start, len, past: 0, keys: &k[rows.clone()], values: &v[rows], means }
    };
    segments.iter().zip(held).map(sequence).collect()
}

/// The same on a GPU.
fn plan(
    ctx: &Context, segments: &[Segment], held: &Held<'_>, [q, k, v]: [&Var; 3], means: DevicePtr, of: Shape,
) -> Plan {
    let c = k.cols();
    let mut full = 0;
    let sequence = |(s, held): (&Segment, &Option<(usize, [Guard<'_>; 3])>)| {
        let (first_row, len) = (s.start, s.len);
        if let Some((past, all)) = held {
            let [keys, values, means] = all.each_ref().map(|g| g.ptr());
            let known = (past + len) / of.chunks.size;
            return plan::Sequence { first_row, len, past: *past, known, keys, values, means };
        }
        let [keys, values] = [k, v].map(|x| x.buf().ptr().offset(first_row * c, ctx.dtype()));
        let means = means.offset(full * c, DType::F32);
        full += len / of.chunks.size;
        plan::Sequence { first_row, len, past: 0, known: 0, keys, values, means }
    };
    let list: Vec<_> = segments.iter().zip(held).map(sequence).collect();
    Plan::new(ctx, q.rows(), [of.heads, of.key_heads], of.n, of.chunks, &list)
}

impl<'p> Tape<'p> {
    /// Attention of q [tokens, C] with C = heads x N, N at most 128 (on a GPU 16, 32, 64 or 128), and k, v [tokens, key heads x N], of which each
    /// serves as many heads in a row: [tokens, C]. Every row belongs to one segment. A segment that starts from a state also sees the keys and values of the past in that slot, to which no gradient
    /// flows; where it ends in a state its own are appended there. The pasts come back as they are afterwards.
    ///
    /// # Panics
    /// When a segment goes on from a state while recording and a gradient is needed, or more past chunks are always seen than are seen.
    pub fn attention(
        &mut self, [q, k, v]: [&Var; 3], segments: &Arc<[Segment]>, heads: usize, chunks: Chunks, pasts: &[Past],
    ) -> (Var, Vec<Past>) {
        let (rows, c, wide) = (q.rows(), q.cols(), k.cols());
        let n = c / heads;
        let key_heads = wide / n;
        assert!(n * heads == c && n <= WIDEST, "{c} channels in {heads} heads");
        assert!(n * key_heads == wide && heads.is_multiple_of(key_heads), "{wide} channels for {heads} heads of {n}");
        assert!(chunks.sink + chunks.window < chunks.top, "{chunks:?}");
        let ctx = self.ctx().clone();
        let needs = self.needs_grad(&[q, k, v], &[]);
        assert!(!needs || segments.iter().all(|s| s.state_in.is_none()), "no gradient flows to a past");
        let (seen, pasts) = Past::advance(&ctx, pasts, [k, v], segments, [heads, key_heads], chunks);
        let longest = segments.iter().zip(&seen).map(|(s, p)| p.as_ref().map_or(s.len, Past::len)).max().unwrap_or(0);
        // No more than there is. On a GPU all that is seen is one chunk then; on a CPU sums go by chunks all the same, so that cuts of a text don't change a bit.
        let whole = ctx.cuda().is_some() && longest.div_ceil(chunks.size) <= chunks.top;
        let size = if whole { longest } else { chunks.size.min(longest) }.max(1);
        let slots = (chunks.top - 1).min(longest.saturating_sub(1) / size);
        let chunks = Chunks { size, top: slots + 1, sink: chunks.sink.min(slots), window: chunks.window.min(slots) };
        let of = Shape { heads, key_heads, n, chunks, slots };

        let fresh = || segments.iter().zip(&seen).filter(|(_, p)| p.is_none()).map(|(s, _)| s);
        let full: usize = fresh().map(|s| if slots > 0 { s.len / chunks.size } else { 0 }).sum();
        let mut new_means = ctx.alloc_f32(full * wide);
        let (mut y, mut lse) = (ctx.alloc(rows * c), needs.then(|| ctx.alloc_f32(rows * heads)));
        let held = hold(segments, &seen);
        let mut choice = match ctx.cuda() {
            Some(gpu) => {
                let plan = plan(&ctx, segments, &held, [q, k, v], new_means.ptr(), of);
                let mut choice = cuda::choose(&ctx, gpu, &plan, q.buf());
                cuda::forward(&ctx, gpu, &plan, q.buf(), &mut choice, &y, lse.as_ref());
                choice
            }
            None => cuda::Choice::of(ctx.alloc_f32(rows * heads * slots)),
        };
        self.run(|| {
            let mut to = &mut new_means[..];
            for s in fresh().filter(|s| slots > 0 && s.len >= chunks.size) {
                let here;
                (here, to) = to.split_at_mut(s.len / chunks.size * wide);
                means(&ctx, &k.data()[s.start * wide..], 0..s.len / chunks.size, chunks.size, here);
            }
            let sequences = sequences(segments, &held, [k.data(), v.data(), &new_means], wide, chunks);
            if slots > 0 {
                cpu::select(&ctx, &sequences, of, q.data(), &mut choice.picks);
            }
            cpu::forward(&ctx, &sequences, of, q.data(), &choice.picks, &mut y, lse.as_deref_mut());
        });
        drop(new_means);
        let out = self.output(rows, c, y, needs);
        if let Some(lse) = lse {
            let (slot, y, segments) = (out.slot(), out.without_grad(), segments.clone());
            let x = [q, k, v].map(Var::clone);
            self.record(move |b| {
                let Some(dy) = slot.take() else { return };
                let mut grads = [c, wide, wide].map(|cols| ctx.alloc(rows * cols));
                // What a sequence without a past sees is in k and v.
                let held = segments.iter().map(|_| None).collect();
                if let Some(gpu) = ctx.cuda() {
                    let plan = plan(&ctx, &segments, &held, x.each_ref(), DevicePtr::NULL, of);
                    cuda::backward(&ctx, gpu, &plan, x[0].buf(), &choice, [y.buf(), &dy, &lse], grads.each_ref());
                }
                let mut delta = ctx.alloc_f32(if ctx.cuda().is_none() { rows * heads } else { 0 });
                b.run(|_| {
                    let shared = DisjointMut::new(&mut delta);
                    blocks(&ctx, rows, |_, r| {
                        for i in r {
                            for (h, d) in row(&shared, i, heads).iter_mut().enumerate() {
                                let at = i * c + h * n;
                                *d = sum(n, |j| dy[at + j] * y.data()[at + j]);
                            }
                        }
                    });
                    let [q, k, v] = x.each_ref().map(Var::data);
                    let sequences = sequences(&segments, &held, [k, v, &[]], wide, chunks);
                    let saved = Saved { q, dy: &dy, picks: &choice.picks, lse: &lse, delta: &delta };
                    cpu::backward(&ctx, &sequences, of, saved, grads.each_mut().map(|g| &mut g[..]));
                });
                x.iter().zip(grads).for_each(|(x, g)| x.add_grad(g));
            });
        }
        (out, pasts)
    }
}
