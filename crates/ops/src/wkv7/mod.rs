//! WKV-7, the generalised delta rule (arXiv 2503.14456, section 4.1).
//!
//! Per head of size N, with a state S [N, N] indexed [value, key], all in f32:
//!
//! ```text
//! d_t = exp(-e^-0.5 sigmoid(w_t))                     decay per key channel, in (0.5452, 1)
//! u_t = S_{t-1} a_t                                   what the state holds under the removal key
//! S_t = S_{t-1} diag(d_t) + u_t b_t^T + v_t k_t^T
//! y_t = S_t r_t
//! ```
//!
//! **Forward** runs this recurrence: on a CPU a head's state stays in the first-level cache, and the recurrence needs fewer
//! operations (10 N^2 a token) than the chunked matrix form. Training, prefill and decoding are then the same sums, so that a
//! sequence may be cut anywhere without changing a bit. It keeps every u_t and the state before every 16th token.
//!
//! **Backward** goes through chunks of L = 16 tokens as matrix products (`chunk.rs`). With P_t the product of the chunk's decays
//! up to t, S the state before the chunk and D the gradient of the state after it, rows t of R, K, V, A, B, U, Y:
//!
//! ```text
//! R~_t = r_t P_t   A~_t = a_t P_{t-1}   K~_t = k_t / P_t   B~_t = b_t / P_t   K^ = K~ P_L   B^ = B~ P_L
//! M_rk = tril(R~ K~^T)   M_rb = tril(R~ B~^T)   M_ak = stril(A~ K~^T)   M_ab = stril(A~ B~^T)
//! Z  = (I - M_ab^T)^-1 (M_rb^T dY + B^ D^T)           gradient of u_t, by substitution in f32
//! dV = M_rk^T dY + M_ak^T Z + K^ D^T
//! dM_rk = tril(dY V^T)   dM_rb = tril(dY U^T)   dM_ak = stril(Z V^T)   dM_ab = stril(Z U^T)
//! dR = P_t   (dM_rk K~ + dM_rb B~ + dY S)             dA = P_{t-1} (dM_ak K~ + dM_ab B~ + Z S)
//! dK = 1/P_t (dM_rk^T R~ + dM_ak^T A~ + P_L V D)      dB = 1/P_t   (dM_rb^T R~ + dM_ab^T A~ + P_L U D)
//! D  <- D diag(P_L) + dY^T R~ + Z^T A~                dw = -e^-0.5 sigmoid(w) sigmoid(-w) dg
//! ```
//!
//! The gradient of the log decay g_t adds only the terms whose decay interval contains t; the shorter identity, a running sum of
//! r dr - k dk - b db, subtracts large numbers that nearly agree. Sixteen tokens at the floor of the decay make 1/P 1.6e4,
//! harmless in f32; no state is ever rebuilt by dividing.

mod chunk;
mod cuda;
mod panels;

use crate::rows::next_arena;
use crate::{Segment, Tape, Var};
use anser_tensor::{
    Buf, Context, DisjointMut, math,
    simd::{prefetch, vectorize},
};
use panels::{LANES, Panel, from_panels, to_panels};
use std::sync::Arc;

#[cfg(test)]
mod tests;

/// e^-0.5, the bound of the log decay.
const BOUND: f32 = 0.606_530_66;
/// Tokens between kept states.
const BLOCK: usize = chunk::L;

/// The inputs of [`Tape::wkv7`], each [tokens, C] with C = heads x N.
#[derive(Clone, Copy)]
pub struct Wkv7Inputs<'a> {
    /// Receptance.
    pub r: &'a Var,
    /// Raw decay logits w, before `exp(-e^-0.5 sigmoid(w))`.
    pub w: &'a Var,
    /// Key to write under.
    pub k: &'a Var,
    /// Value.
    pub v: &'a Var,
    /// Minus the normalised removal key.
    pub a: &'a Var,
    /// The normalised removal key times the in-context learning rate.
    pub b: &'a Var,
}

/// One head's rows of an input: token t is `data[t * stride..][..N]`.
#[derive(Clone, Copy)]
struct Head<'a> {
    inputs: [&'a [f32]; 6],
    stride: usize,
    /// First channel of the head.
    offset: usize,
}

impl<'a> Head<'a> {
    /// r, w, k, v, a, b of token `t`.
    #[inline(always)]
    fn token<const N: usize>(&self, t: usize) -> [&'a [f32; N]; 6] {
        self.inputs.map(|x| lane(&x[t * self.stride..]))
    }
}

#[inline(always)]
fn lane<const N: usize>(x: &[f32]) -> &[f32; N] {
    match x.first_chunk() {
        Some(x) => x,
        None => unreachable!("a row holds whole heads"),
    }
}

#[inline(always)]
fn decay<const N: usize>(w: &[f32; N]) -> [f32; N] {
    let mut d = [0.0; N];
    for j in 0..N {
        d[j] = math::exp(-BOUND * math::sigmoid(w[j]));
    }
    d
}

/// One panel, the rows from `at` on, through the tokens of a block from `first` on: `d` are their decays; y and u go to `y` and `us`.
#[inline(always)]
fn panel_block<const N: usize>(
    s: &mut Panel<N>, head: Head<'_>, first: usize, d: &[[f32; N]], y: &DisjointMut<'_, f32>,
    us: Option<&DisjointMut<'_, f32>>, at: usize,
) {
    let mut u = [0f32; LANES];
    let a = head.token::<N>(first)[4];
    for j in 0..N {
        for l in 0..LANES {
            u[l] = s[j][l].mul_add(a[j], u[l]);
        }
    }
    let (none, tokens) = ([0f32; N], d.len());
    for (t, d) in d.iter().enumerate() {
        let [r, _, k, v, _, b] = head.token::<N>(first + t);
        // The next token's removal is read off the state while it is at hand.
        let next = if t + 1 < tokens { head.token::<N>(first + t + 1)[4] } else { &none };
        let v: &[f32; LANES] = lane(&v[at..]);
        let (mut sum, mut removed) = ([0f32; LANES], [0f32; LANES]);
        for j in 0..N {
            let lanes = &mut s[j];
            for l in 0..LANES {
                let new = lanes[l].mul_add(d[j], u[l].mul_add(b[j], v[l] * k[j]));
                lanes[l] = new;
                sum[l] = new.mul_add(r[j], sum[l]);
                removed[l] = new.mul_add(next[j], removed[l]);
            }
        }
        let row = (first + t) * head.stride + head.offset + at;
        // SAFETY: every task has its own head of its segment's rows.
        unsafe { y.get(row..row + LANES) }.copy_from_slice(&sum);
        if let Some(us) = us {
            // SAFETY: as for y.
            unsafe { us.get(row..row + LANES) }.copy_from_slice(&u);
        }
        u = removed;
    }
}

/// A head's state as rows of N.
fn as_rows<const N: usize>(s: &[f32]) -> &[[f32; N]] {
    s.as_chunks().0
}

/// Kept states of a segment: before tokens 0, 16, ..
fn kept(len: usize) -> usize {
    len.div_ceil(BLOCK)
}

/// Shapes of one call.
#[derive(Clone)]
struct Shape {
    segments: Arc<[Segment]>,
    heads: usize,
    /// Where each segment's kept states start, in states of one head.
    offsets: Vec<usize>,
}

impl Shape {
    fn new(segments: &Arc<[Segment]>, heads: usize) -> Shape {
        let start = |at: &mut usize, s: &Segment| {
            let here = *at;
            *at += kept(s.len) * heads;
            Some(here)
        };
        Shape { segments: segments.clone(), heads, offsets: segments.iter().scan(0, start).collect() }
    }

    /// Number of kept states of one head each.
    fn kept(&self) -> usize {
        self.segments.iter().map(|s| kept(s.len) * self.heads).sum()
    }
}

/// What the forward pass keeps for the backward pass, in the form that the device wants.
struct Saved {
    /// The states before blocks of tokens.
    states: Buf,
    /// u of every token: [tokens, C].
    u: Buf,
    /// (I - M_ab)^-1 of every chunk, on tensor cores.
    inverses: Option<Buf>,
}

impl Saved {
    fn new(ctx: &Context, shape: &Shape, n: usize, tokens: usize) -> Saved {
        if ctx.cuda().is_some() || cuda::on_tensor_cores(ctx, n, true) {
            return cuda::saved(ctx, shape, n, tokens);
        }
        let states = ctx.alloc_f32(shape.kept() * n * n);
        Saved { states, u: ctx.alloc_f32(tokens * shape.heads * n), inverses: None }
    }
}

fn forward<const N: usize>(
    ctx: &Context, shape: &Shape, inputs: [&[f32]; 6], arena: &[f32], y: &mut [f32], new: Option<&mut [f32]>,
    saved: Option<(&mut [f32], &mut [f32])>,
) {
    let (heads, c) = (shape.heads, shape.heads * N);
    let y = DisjointMut::new(y);
    let new = new.map(DisjointMut::new);
    let (saved, removed) = saved.map(|(s, u)| (DisjointMut::new(s), DisjointMut::new(u))).unzip();
    ctx.threads().run(shape.segments.len() * heads, |task| {
        let (i, h) = (task / heads, task % heads);
        let seg = shape.segments[i];
        let head = Head { inputs: inputs.map(|x| x.get(h * N..).unwrap_or_default()), stride: c, offset: h * N };
        let next = seg.state_out.zip(new.as_ref()).map(|(slot, new)| {
            let at = (slot * heads + h) * N * N;
            // SAFETY: no two segments share a `state_out`.
            unsafe { new.get(at..at + N * N) }
        });
        if let Some(next) = &next {
            prefetch(next);
        }
        let mut s = vec![[[0f32; LANES]; N]; N / LANES];
        if let Some(slot) = seg.state_in {
            let state = &arena[(slot * heads + h) * N * N..][..N * N];
            prefetch(state);
            to_panels(state, &mut s);
        }
        let mut d = [[0f32; N]; BLOCK];
        for first in (0..seg.len).step_by(BLOCK) {
            if let Some(saved) = &saved {
                let at = (shape.offsets[i] + h * kept(seg.len) + first / BLOCK) * N * N;
                // SAFETY: every task has its own kept states.
                unsafe { saved.get(at..at + N * N) }.copy_from_slice(s.as_flattened().as_flattened());
            }
            let len = BLOCK.min(seg.len - first);
            vectorize(
                #[inline(always)]
                || {
                    for (t, d) in d[..len].iter_mut().enumerate() {
                        *d = decay(head.token(seg.start + first + t)[1]);
                    }
                    for (p, s) in s.iter_mut().enumerate() {
                        panel_block::<N>(s, head, seg.start + first, &d[..len], &y, removed.as_ref(), p * LANES);
                    }
                },
            );
        }
        if let Some(next) = next {
            from_panels(&s, next);
        }
    });
}

/// Gradients of the six inputs into `grads` and, for segments with a `state_in`, of their initial states into `initial`
/// ([segments, heads, N, N]).
fn backward<const N: usize>(
    ctx: &Context, shape: &Shape, inputs: [&[f32]; 6], saved: &[f32], u: &[f32], dy: Option<&[f32]>,
    dnew: Option<&[f32]>, grads: [&mut [f32]; 6], initial: Option<&mut [f32]>,
) {
    let (heads, c) = (shape.heads, shape.heads * N);
    let grads = grads.map(DisjointMut::new);
    let initial = initial.map(DisjointMut::new);
    ctx.threads().run(shape.segments.len() * heads, |task| {
        let (i, h) = (task / heads, task % heads);
        let seg = shape.segments[i];
        let head = Head { inputs: inputs.map(|x| &x[h * N..]), stride: c, offset: h * N };
        let mut work = chunk::Workspace::<N>::new();
        if let (Some(dnew), Some(slot)) = (dnew, seg.state_out) {
            work.d.copy_from_slice(as_rows(&dnew[(slot * heads + h) * N * N..][..N * N]));
        }
        for block in (0..kept(seg.len)).rev() {
            let first = seg.start + block * BLOCK;
            let len = BLOCK.min(seg.start + seg.len - first);
            let at = (shape.offsets[i] + h * kept(seg.len) + block) * N * N;
            from_panels(saved[at..at + N * N].as_chunks::<LANES>().0.as_chunks::<N>().0, work.s.as_flattened_mut());
            vectorize(
                #[inline(always)]
                || {
                    work.back(head, first, len, u, dy, |which, t, row| {
                        let at = (first + t) * c + h * N;
                        // SAFETY: every task has its own head of its segment's rows.
                        unsafe { grads[which].get(at..at + N) }.copy_from_slice(row);
                    })
                },
            );
        }
        if let (Some(initial), Some(_)) = (&initial, seg.state_in) {
            let at = task * N * N;
            // SAFETY: every task has its own initial state.
            unsafe { initial.get(at..at + N * N) }.copy_from_slice(work.d.as_flattened());
        }
    });
}

/// Calls a kernel for the head size at run time.
macro_rules! for_head_size {
    ($n:expr, $kernel:ident($($arg:expr),* $(,)?)) => {
        match $n {
            16 => $kernel::<16>($($arg),*),
            32 => $kernel::<32>($($arg),*),
            64 => $kernel::<64>($($arg),*),
            128 => $kernel::<128>($($arg),*),
            n => panic!("head size {n}: it must be 16, 32, 64 or 128"),
        }
    };
}

impl<'p> Tape<'p> {
    /// WKV-7 over `segments`: the outputs y [tokens, C], and the state arena [slots, heads x N x N] with the rows
    /// `state_out` replaced (the arena itself if there are none).
    ///
    /// Segments read their row `state_in` of `state` as it was before the call, so that several may start from one. The
    /// gradient of the returned arena is taken up.
    ///
    /// # Panics
    /// If the head size is not 16, 32, 64 or 128 or shapes disagree.
    pub fn wkv7(&mut self, inputs: Wkv7Inputs<'_>, state: &Var, segments: &Arc<[Segment]>, heads: usize) -> (Var, Var) {
        let Wkv7Inputs { r, w, k, v, a, b } = inputs;
        let (rows, c) = (r.rows(), r.cols());
        let n = c / heads;
        assert!([w, k, v, a, b].iter().all(|x| x.rows() == rows && x.cols() == c) && state.cols() == c * n);
        let ctx = self.ctx().clone();
        let shape = Shape::new(segments, heads);
        let needs = self.needs_grad(&[r, w, k, v, a, b, state], &[]);
        let mut y = ctx.alloc(rows * c);
        let mut new = segments.iter().any(|s| s.state_out.is_some()).then(|| next_arena(&ctx, state, segments));
        let mut saved = needs.then(|| Saved::new(&ctx, &shape, n, rows));
        let cuts = cuda::Cuts::new(&ctx, &shape, n, needs);
        if let Some(gpu) = ctx.cuda() {
            cuda::forward(&ctx, gpu, &shape, inputs, state, &y, new.as_ref(), saved.as_ref(), cuts.as_ref());
        }
        self.run(|| {
            let x = [r, w, k, v, a, b].map(Var::data);
            for_head_size!(
                n,
                forward(
                    &ctx,
                    &shape,
                    x,
                    state.data(),
                    &mut y,
                    new.as_deref_mut(),
                    saved.as_mut().map(|s| (&mut s.states[..], &mut s.u[..]))
                )
            );
        });
        let y = self.output(rows, c, y, needs);
        let new = new.map(|new| self.output(state.rows(), state.cols(), new, needs));
        if let Some(saved) = saved {
            let (dy, dnew) = (y.slot(), new.as_ref().map(Var::slot));
            let (inputs, to) = ([r, w, k, v, a, b].map(Var::keep), [r, w, k, v, a, b].map(Var::slot));
            let dstate = state.slot();
            self.record(move |back| {
                let (dy, dnew) = (dy.take(), dnew.and_then(|s| s.take()));
                if dy.is_none() && dnew.is_none() {
                    return;
                }
                let inputs = inputs.each_ref().map(|x| back.value(x));
                let x = inputs.each_ref().map(|x| &**x);
                let mut initial = dstate.wanted().then(|| ctx.alloc_f32(shape.segments.len() * c * n));
                if let Some(gpu) = ctx.cuda() {
                    // What has arrived so far for r, k and v, which the read-out uses too, is taken up in the same pass.
                    let prior: [Option<Buf>; 6] =
                        std::array::from_fn(|i| [0, 2, 3].contains(&i).then(|| to[i].take())?);
                    let add = prior.each_ref().map(Option::is_some);
                    let grads = prior.map(|g| g.unwrap_or_else(|| ctx.alloc(rows * c)));
                    let (dy, dnew, grads_at) = (dy.as_ref(), dnew.as_ref(), grads.each_ref());
                    let initial = initial.as_ref();
                    cuda::backward(&ctx, gpu, &shape, x, &saved, cuts.as_ref(), dy, dnew, grads_at, add, initial, n);
                    to.iter().zip(grads).for_each(|(to, g)| to.add(g));
                } else {
                    let mut grads: [Buf; 6] = std::array::from_fn(|_| ctx.alloc(rows * c));
                    back.run(|_| {
                        let (x, grads) = (x.map(|x| &x[..]), grads.each_mut().map(|g| &mut g[..]));
                        let (dy, dnew) = (dy.as_deref(), dnew.as_deref());
                        for_head_size!(
                            n,
                            backward(&ctx, &shape, x, &saved.states, &saved.u, dy, dnew, grads, initial.as_deref_mut())
                        );
                    });
                    to.iter().zip(grads).for_each(|(to, g)| to.add(g));
                }
                if let Some(initial) = initial {
                    let mut g = ctx.alloc_f32(dstate.len());
                    if let Some(gpu) = ctx.cuda() {
                        cuda::state_grad(&ctx, gpu, &shape, &g, c * n, dnew.as_ref(), &initial);
                    }
                    back.run(|_| state_grad(&mut g, c * n, &shape.segments, dnew.as_deref(), &initial));
                    dstate.add(g);
                }
            });
        }
        (y, new.unwrap_or_else(|| state.clone()))
    }
}

/// The gradient of the old arena: that of the new one in rows that no segment replaced, plus those of the initial states.
fn state_grad(dstate: &mut [f32], row: usize, segments: &[Segment], dnew: Option<&[f32]>, initial: &[f32]) {
    match dnew {
        Some(dnew) => dstate.copy_from_slice(dnew),
        None => dstate.fill(0.0),
    }
    for slot in segments.iter().filter_map(|s| dnew.and(s.state_out)) {
        dstate[slot * row..(slot + 1) * row].fill(0.0);
    }
    for (s, g) in segments.iter().zip(initial.chunks_exact(row)) {
        if let Some(slot) = s.state_in {
            dstate[slot * row..(slot + 1) * row].iter_mut().zip(g).for_each(|(d, g)| *d += g);
        }
    }
}
