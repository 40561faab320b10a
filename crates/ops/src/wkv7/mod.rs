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
//! **Backward**, with D the gradient of S_t including y_t's part (D <- D + dy_t r_t^T on the way back):
//!
//! ```text
//! dr = S_t^T dy   dk = D^T v   dv = D k   db = D^T u   du = D b   da = S_{t-1}^T du   dd = colsum(D * S_{t-1})
//! dw = -e^-0.5 sigmoid(w) sigmoid(-w) d dd            D <- D diag(d) + du a^T
//! ```
//!
//! Both directions run the recurrence: on a CPU a head's state stays in the first-level cache, and the recurrence needs
//! fewer operations (9 N^2 and 29 N^2 a token) than the chunked matrix form. Training, prefill and decoding are then the same
//! sums, so that a sequence may be cut anywhere without changing a bit. The forward pass keeps the state before every 16th
//! token; going back, the states within such a block are computed again from it, never rebuilt by dividing by the
//! decay, and the decay's gradient is the sum it is, not a difference of running sums.

use crate::rows::copy;
use crate::{Segment, Tape, Var};
use anser_tensor::{Buf, Context, DisjointMut, math, simd::vectorize};
use std::sync::Arc;

#[cfg(test)]
mod tests;

/// e^-0.5, the bound of the log decay.
const BOUND: f32 = 0.606_530_66;
/// Tokens between kept states.
const BLOCK: usize = 16;

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

/// Dot product in eight partial sums, added pairwise.
#[inline(always)]
fn dot<const N: usize>(x: &[f32; N], y: &[f32; N]) -> f32 {
    let mut s = [0f32; 8];
    for j in (0..N).step_by(8) {
        for l in 0..8 {
            s[l] = x[j + l].mul_add(y[j + l], s[l]);
        }
    }
    ((s[0] + s[4]) + (s[2] + s[6])) + ((s[1] + s[5]) + (s[3] + s[7]))
}

/// One token: `from` to `to` (rows of N), u and y if wanted.
#[inline(always)]
fn step<const N: usize>(
    x: [&[f32; N]; 6], from: &[[f32; N]], to: &mut [[f32; N]], mut u: Option<&mut [f32; N]>, mut y: Option<&mut [f32]>,
) {
    let [r, w, k, v, a, b] = x;
    let d = decay(w);
    for (i, (from, to)) in from.iter().zip(to).enumerate() {
        let ui = dot(from, a);
        for j in 0..N {
            to[j] = from[j].mul_add(d[j], ui.mul_add(b[j], v[i] * k[j]));
        }
        if let Some(u) = &mut u {
            u[i] = ui;
        }
        if let Some(y) = &mut y {
            y[i] = dot(to, r);
        }
    }
}

/// The same in place.
#[inline(always)]
fn step_in_place<const N: usize>(x: [&[f32; N]; 6], s: &mut [[f32; N]], y: &mut [f32]) {
    let [r, w, k, v, a, b] = x;
    let d = decay(w);
    for (i, s) in s.iter_mut().enumerate() {
        let u = dot(s, a);
        for j in 0..N {
            s[j] = s[j].mul_add(d[j], u.mul_add(b[j], v[i] * k[j]));
        }
        y[i] = dot(s, r);
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

fn forward<const N: usize>(
    ctx: &Context, shape: &Shape, inputs: [&[f32]; 6], arena: &[f32], y: &mut [f32], new: Option<&mut [f32]>,
    saved: Option<&mut [f32]>,
) {
    let (heads, c) = (shape.heads, shape.heads * N);
    let y = DisjointMut::new(y);
    let new = new.map(DisjointMut::new);
    let saved = saved.map(DisjointMut::new);
    ctx.threads().run(shape.segments.len() * heads, |task| {
        let (i, h) = (task / heads, task % heads);
        let seg = shape.segments[i];
        let head = Head { inputs: inputs.map(|x| x.get(h * N..).unwrap_or_default()), stride: c };
        let mut s = vec![[0f32; N]; N];
        if let Some(slot) = seg.state_in {
            s.copy_from_slice(as_rows(&arena[(slot * heads + h) * N * N..][..N * N]));
        }
        for t in 0..seg.len {
            if let (Some(saved), true) = (&saved, t % BLOCK == 0) {
                let at = (shape.offsets[i] + h * kept(seg.len) + t / BLOCK) * N * N;
                // SAFETY: every task has its own kept states.
                unsafe { saved.get(at..at + N * N) }.copy_from_slice(s.as_flattened());
            }
            let row = (seg.start + t) * c + h * N;
            // SAFETY: every task has its own head of its segment's rows.
            let y = unsafe { y.get(row..row + N) };
            vectorize(
                #[inline(always)]
                || step_in_place::<N>(head.token(seg.start + t), &mut s, y),
            );
        }
        if let (Some(new), Some(slot)) = (&new, seg.state_out) {
            let at = (slot * heads + h) * N * N;
            // SAFETY: no two segments share a `state_out`.
            unsafe { new.get(at..at + N * N) }.copy_from_slice(s.as_flattened());
        }
    });
}

/// Gradients of the six inputs into `grads` and, for segments with a `state_in`, of their initial states into `initial`
/// ([segments, heads, N, N]).
fn backward<const N: usize>(
    ctx: &Context, shape: &Shape, inputs: [&[f32]; 6], saved: &[f32], dy: Option<&[f32]>, dnew: Option<&[f32]>,
    grads: [&mut [f32]; 6], initial: Option<&mut [f32]>,
) {
    let (heads, c) = (shape.heads, shape.heads * N);
    let grads = grads.map(DisjointMut::new);
    let initial = initial.map(DisjointMut::new);
    let zeros = [0f32; N];
    ctx.threads().run(shape.segments.len() * heads, |task| {
        let (i, h) = (task / heads, task % heads);
        let seg = shape.segments[i];
        let head = Head { inputs: inputs.map(|x| &x[h * N..]), stride: c };
        let mut d = vec![[0f32; N]; N];
        if let (Some(dnew), Some(slot)) = (dnew, seg.state_out) {
            d.copy_from_slice(as_rows(&dnew[(slot * heads + h) * N * N..][..N * N]));
        }
        // States before each token of the block and after its last, and the u of each.
        let mut states = vec![[0f32; N]; N * (BLOCK + 1)];
        let mut us = [[0f32; N]; BLOCK];
        for block in (0..kept(seg.len)).rev() {
            let first = block * BLOCK;
            let len = BLOCK.min(seg.len - first);
            let at = (shape.offsets[i] + h * kept(seg.len) + block) * N * N;
            states[..N].copy_from_slice(as_rows(&saved[at..at + N * N]));
            for t in 0..len {
                let (from, to) = states[t * N..(t + 2) * N].split_at_mut(N);
                vectorize(
                    #[inline(always)]
                    || step::<N>(head.token(seg.start + first + t), from, to, Some(&mut us[t]), None),
                );
            }
            for t in (0..len).rev() {
                let token = seg.start + first + t;
                let row = token * c + h * N;
                let dy: &[f32; N] = dy.map_or(&zeros, |dy| lane(&dy[row..]));
                // SAFETY: every task has its own head of its segment's rows.
                let out = grads.each_ref().map(|g| unsafe { g.get(row..row + N) });
                let (before, after) = states[t * N..(t + 2) * N].split_at(N);
                vectorize(
                    #[inline(always)]
                    || step_back::<N>(head.token(token), before, after, &us[t], dy, &mut d, out),
                );
            }
        }
        if let (Some(initial), Some(_)) = (&initial, seg.state_in) {
            let at = task * N * N;
            // SAFETY: every task has its own initial state.
            unsafe { initial.get(at..at + N * N) }.copy_from_slice(d.as_flattened());
        }
    });
}

/// One token going back: takes D after the token to D before it.
#[inline(always)]
fn step_back<const N: usize>(
    x: [&[f32; N]; 6], before: &[[f32; N]], after: &[[f32; N]], u: &[f32; N], dy: &[f32; N], d: &mut [[f32; N]],
    out: [&mut [f32]; 6],
) {
    let [r, w, k, v, a, b] = x;
    let w_decay = decay(w);
    let (mut dr, mut dd, mut dk, mut da, mut db) = ([0f32; N], [0f32; N], [0f32; N], [0f32; N], [0f32; N]);
    let [gr, gw, gk, gv, ga, gb] = out;
    // Four rows at a time, so that the sums over rows are loaded and stored once for four.
    let rows = d.as_chunks_mut::<4>().0.iter_mut().zip(before.as_chunks::<4>().0).zip(after.as_chunks::<4>().0);
    for (q, ((d, s0), s1)) in rows.enumerate() {
        let mut du = [0f32; 4];
        for l in 0..4 {
            let i = 4 * q + l;
            for j in 0..N {
                d[l][j] = dy[i].mul_add(r[j], d[l][j]);
            }
            gv[i] = dot(&d[l], k);
            du[l] = dot(&d[l], b);
        }
        for j in 0..N {
            let (mut r_sum, mut d_sum, mut k_sum, mut a_sum, mut b_sum) = (dr[j], dd[j], dk[j], da[j], db[j]);
            for l in 0..4 {
                let i = 4 * q + l;
                r_sum = s1[l][j].mul_add(dy[i], r_sum);
                d_sum = d[l][j].mul_add(s0[l][j], d_sum);
                k_sum = d[l][j].mul_add(v[i], k_sum);
                b_sum = d[l][j].mul_add(u[i], b_sum);
                a_sum = s0[l][j].mul_add(du[l], a_sum);
                d[l][j] = d[l][j].mul_add(w_decay[j], du[l] * a[j]);
            }
            (dr[j], dd[j], dk[j], da[j], db[j]) = (r_sum, d_sum, k_sum, a_sum, b_sum);
        }
    }
    gr.copy_from_slice(&dr);
    gk.copy_from_slice(&dk);
    ga.copy_from_slice(&da);
    gb.copy_from_slice(&db);
    for j in 0..N {
        gw[j] = -BOUND * math::sigmoid(w[j]) * math::sigmoid(-w[j]) * w_decay[j] * dd[j];
    }
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
        let mut new = segments.iter().any(|s| s.state_out.is_some()).then(|| copy(&ctx, state));
        let mut saved = needs.then(|| ctx.alloc(shape.kept() * n * n));
        self.run(|| {
            let x = [r, w, k, v, a, b].map(Var::data);
            for_head_size!(n, forward(&ctx, &shape, x, state.data(), &mut y, new.as_deref_mut(), saved.as_deref_mut()));
        });
        let y = self.output(rows, c, y, needs);
        let new = new.map(|new| self.output(state.rows(), state.cols(), new, needs));
        if let Some(saved) = saved {
            let (dy, dnew) = (y.slot(), new.as_ref().map(Var::slot));
            let (inputs, state) = ([r, w, k, v, a, b].map(Var::clone), state.clone());
            self.record(move |back| {
                let (dy, dnew) = (dy.take(), dnew.and_then(|s| s.take()));
                if dy.is_none() && dnew.is_none() {
                    return;
                }
                let mut grads: [Buf; 6] = std::array::from_fn(|_| ctx.alloc(rows * c));
                let mut initial = state.needs_grad().then(|| ctx.alloc(shape.segments.len() * c * n));
                back.run(|_| {
                    let x = inputs.each_ref().map(Var::data);
                    let to = grads.each_mut().map(|g| &mut g[..]);
                    let (dy, dnew) = (dy.as_deref(), dnew.as_deref());
                    for_head_size!(n, backward(&ctx, &shape, x, &saved, dy, dnew, to, initial.as_deref_mut()));
                });
                inputs.iter().zip(grads).for_each(|(x, g)| x.add_grad(g));
                if let Some(initial) = initial {
                    let mut dstate = ctx.alloc(state.rows() * state.cols());
                    back.run(|_| state_grad(&mut dstate, c * n, &shape.segments, dnew.as_deref(), &initial));
                    state.add_grad(dstate);
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
