//! Attention on the CPU: tiles of queries against tiles of keys, a softmax with a running maximum.
//!
//! A row takes up the tiles of keys that it sees in ascending order, and its sums are its own: its bits depend neither on its tile nor on
//! where the sequence was cut.

use super::Chunks;
use anser_tensor::{Context, DisjointMut, math, simd::vectorize};
use std::ops::Range;

/// Keys of a tile: the lanes of a vector. Tiles begin where chunks do.
const KEYS: usize = 16;
/// Queries of a tile.
const QUERIES: usize = 32;
/// The largest head.
pub(super) const WIDEST: usize = 128;

/// One sequence: queries from row `start` on, whose keys have `past` others before them.
#[derive(Clone, Copy)]
pub(super) struct Sequence<'a> {
    pub(super) start: usize,
    pub(super) len: usize,
    pub(super) past: usize,
    /// Keys from the sequence's first on, [past + len, key heads x N].
    pub(super) keys: &'a [f32],
    /// Values, likewise.
    pub(super) values: &'a [f32],
    /// Mean keys of full chunks, [chunks, key heads x N].
    pub(super) means: &'a [f32],
}

/// What all heads of a call have in common.
#[derive(Clone, Copy)]
pub(super) struct Shape {
    pub(super) heads: usize,
    /// Heads of keys and values.
    pub(super) key_heads: usize,
    /// Size of a head.
    pub(super) n: usize,
    pub(super) chunks: Chunks,
    /// Places for past chunks of a row and head.
    pub(super) slots: usize,
}

impl Shape {
    /// Heads of queries that share one of keys.
    fn share(&self) -> usize {
        self.heads / self.key_heads
    }
}

/// One head of queries of one sequence.
#[derive(Clone, Copy)]
struct Head<'a> {
    sequence: &'a Sequence<'a>,
    of: Shape,
    head: usize,
}

/// Sixteen keys (or values, or means) as columns, [channel][key].
type Columns = [[f32; KEYS]; WIDEST];

impl<'a> Head<'a> {
    /// Place of query `t` in a matrix [rows, heads].
    fn scalar(&self, t: usize) -> usize {
        (self.sequence.start + t) * self.of.heads + self.head
    }

    /// Query `t` of a matrix [rows, heads x N].
    #[inline(always)]
    fn query<'b>(&self, x: &'b [f32], t: usize) -> &'b [f32] {
        &x[self.scalar(t) * self.of.n..][..self.of.n]
    }

    /// The same for writing.
    fn query_mut<'b>(&self, x: &DisjointMut<'b, f32>, t: usize) -> &'b mut [f32] {
        let at = self.scalar(t) * self.of.n;
        // SAFETY: a row of a head belongs to one task, which takes it once.
        unsafe { x.get(at..at + self.of.n) }
    }

    /// Where row `j` of keys, values or means is.
    #[inline(always)]
    fn place(&self, j: usize) -> Range<usize> {
        let at = (j * self.of.key_heads + self.head / self.of.share()) * self.of.n;
        at..at + self.of.n
    }

    #[inline(always)]
    fn row<'b>(&self, x: &'b [f32], j: usize) -> &'b [f32] {
        &x[self.place(j)]
    }

    /// The row of key `j` of a matrix [rows, key heads x N], for writing.
    fn key_mut<'b>(&self, x: &DisjointMut<'b, f32>, j: usize) -> &'b mut [f32] {
        // SAFETY: a row of a head of keys belongs to one task, which takes it once.
        unsafe { x.get(self.place(self.sequence.start + j)) }
    }

    /// Rows `first..end`, at most sixteen, of keys, values or means; zero beyond.
    #[inline(always)]
    fn columns(&self, x: &[f32], first: usize, end: usize) -> Columns {
        let mut columns = [[0.0; KEYS]; WIDEST];
        for l in 0..KEYS.min(end - first) {
            for (column, &x) in columns.iter_mut().zip(self.row(x, first + l)) {
                column[l] = x;
            }
        }
        columns
    }

    fn scale(&self) -> f32 {
        1.0 / (self.of.n as f32).sqrt()
    }

    /// Position of query `t` in its sequence.
    fn position(&self, t: usize) -> usize {
        self.sequence.past + t
    }

    /// The chunk of query `t`.
    fn chunk(&self, t: usize) -> usize {
        self.position(t) / self.of.chunks.size
    }

    /// The keys of a chunk that queries before query `end` may see.
    fn keys(&self, chunk: usize, end: usize) -> (usize, usize) {
        let first = chunk * self.of.chunks.size;
        (first, first.saturating_add(self.of.chunks.size).min(self.position(end)))
    }

    /// How many keys of the tile from `key` on, in a chunk up to `end`, query `t` sees.
    #[inline(always)]
    fn seen(&self, t: usize, key: usize, end: usize) -> usize {
        KEYS.min(end - key).min((self.position(t) + 1).saturating_sub(key))
    }

    /// The past chunks that query `t` sees, in ascending order.
    fn picks<'b>(&self, picks: &'b [f32], t: usize) -> impl Iterator<Item = usize> + use<'b> {
        let all = &picks[self.scalar(t) * self.of.slots..][..self.of.slots];
        all.iter().take_while(|&&c| c >= 0.0).map(|&c| c as usize)
    }

    /// The chunks that queries `first..end`, at most 32, see, in ascending order, and which of the queries see each.
    fn visible(&self, picks: &[f32], first: usize, end: usize) -> Vec<(usize, u32)> {
        let own = (first..end).map(|t| (self.chunk(t), 1 << (t - first)));
        let past = (first..end).flat_map(|t| self.picks(picks, t).map(move |c| (c, 1 << (t - first))));
        let mut all: Vec<(usize, u32)> = own.chain(past).collect();
        all.sort_unstable();
        all.dedup_by(|b, a| {
            let same = a.0 == b.0;
            a.1 |= if same { b.1 } else { 0 };
            same
        });
        all
    }
}

/// Runs `f(head, first query of the tile)` for all heads and tiles of queries in parallel.
fn tiles(ctx: &Context, sequences: &[Sequence<'_>], of: Shape, f: impl Fn(Head<'_>, usize) + Sync) {
    let list: Vec<(&Sequence<'_>, usize)> =
        sequences.iter().flat_map(|s| (0..s.len).step_by(QUERIES).map(move |first| (s, first))).collect();
    ctx.threads().run(list.len() * of.heads, |i| {
        let (sequence, first) = list[i / of.heads];
        f(Head { sequence, of, head: i % of.heads }, first);
    });
}

/// Products of a row with sixteen columns.
#[inline(always)]
fn dots(x: &[f32], columns: &Columns) -> [f32; KEYS] {
    let mut out = [0f32; KEYS];
    for (x, column) in x.iter().zip(columns) {
        for l in 0..KEYS {
            out[l] = x.mul_add(column[l], out[l]);
        }
    }
    out
}

/// y += a x.
#[inline(always)]
fn add_scaled(y: &mut [f32], a: f32, x: &[f32]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y = a.mul_add(*x, *y);
    }
}

/// The bits of a mask, from the lowest on.
#[inline(always)]
fn bits(mut mask: u32) -> impl Iterator<Item = usize> {
    std::iter::from_fn(move || {
        let bit = mask.trailing_zeros() as usize;
        mask &= mask.wrapping_sub(1);
        (bit < 32).then_some(bit)
    })
}

/// The past chunks of every row and head into `picks` [rows, heads, slots]: ascending numbers, then -1.
pub(super) fn select(ctx: &Context, sequences: &[Sequence<'_>], of: Shape, q: &[f32], picks: &mut [f32]) {
    let picks = DisjointMut::new(picks);
    tiles(ctx, sequences, of, |h, first| {
        let end = h.sequence.len.min(first + QUERIES);
        let most = of.chunks.top - 1;
        // The best so far of every query, the best first.
        let mut best: Vec<Vec<(f32, usize)>> = vec![Vec::with_capacity(of.slots + 1); end - first];
        let past = h.chunk(end - 1);
        vectorize(
            #[inline(always)]
            || {
                for block in (0..if past > most { past } else { 0 }).step_by(KEYS) {
                    let means = h.columns(h.sequence.means, block, past);
                    for t in first..end {
                        let before = h.chunk(t);
                        if before <= most || before <= block {
                            continue;
                        }
                        let best = &mut best[t - first];
                        for (l, &score) in dots(h.query(q, t), &means)[..KEYS.min(before - block)].iter().enumerate() {
                            let always = of.chunks.always(block + l, before);
                            let score = if always { f32::INFINITY } else { score };
                            // Of equal scores the earlier chunk stays before the later one.
                            let place = best.iter().rposition(|b| b.0 >= score).map_or(0, |i| i + 1);
                            if place < most {
                                best.insert(place, (score, block + l));
                                best.truncate(most);
                            }
                        }
                    }
                }
            },
        );
        for (t, best) in (first..end).zip(&mut best) {
            let at = h.scalar(t) * of.slots;
            // SAFETY: a row of a head belongs to one task, which takes it once.
            let to = unsafe { picks.get(at..at + of.slots) };
            let before = h.chunk(t);
            best.sort_unstable_by_key(|b| b.1);
            let chosen = best.iter().map(|b| b.1);
            let all = 0..if before <= most { before } else { 0 };
            to.fill(-1.0);
            to.iter_mut().zip(all.chain(chosen)).for_each(|(to, c)| *to = c as f32);
        }
    });
}

/// y [rows, heads x N] and, if wanted, L [rows, heads].
pub(super) fn forward(
    ctx: &Context, sequences: &[Sequence<'_>], of: Shape, q: &[f32], picks: &[f32], y: &mut [f32],
    lse: Option<&mut [f32]>,
) {
    let (y, lse) = (DisjointMut::new(y), lse.map(DisjointMut::new));
    tiles(ctx, sequences, of, |h, first| {
        let end = h.sequence.len.min(first + QUERIES);
        let (mut top, mut total) = ([f32::NEG_INFINITY; QUERIES], [0f32; QUERIES]);
        let mut out = [[0f32; WIDEST]; QUERIES];
        let visible = h.visible(picks, first, end);
        vectorize(
            #[inline(always)]
            || {
                for &(chunk, rows) in &visible {
                    let (begin, stop) = h.keys(chunk, end);
                    for key in (begin..stop).step_by(KEYS) {
                        let columns = h.columns(h.sequence.keys, key, stop);
                        for i in bits(rows) {
                            let (t, seen) = (first + i, h.seen(first + i, key, stop));
                            if seen == 0 {
                                continue;
                            }
                            let mut p = dots(h.query(q, t), &columns);
                            let mut new = top[i];
                            for (l, s) in p.iter_mut().enumerate() {
                                *s = if l < seen { *s * h.scale() } else { f32::NEG_INFINITY };
                                new = new.max(*s);
                            }
                            let keep = math::exp(top[i] - new);
                            p.iter_mut().for_each(|s| *s = math::exp(*s - new));
                            total[i] = total[i] * keep + p.iter().sum::<f32>();
                            top[i] = new;
                            out[i][..of.n].iter_mut().for_each(|o| *o *= keep);
                            for (l, p) in p[..seen].iter().enumerate() {
                                add_scaled(&mut out[i], *p, h.row(h.sequence.values, key + l));
                            }
                        }
                    }
                }
            },
        );
        for t in first..end {
            let i = t - first;
            h.query_mut(&y, t).iter_mut().zip(&out[i]).for_each(|(y, o)| *y = o / total[i]);
            if let Some(lse) = &lse {
                let at = h.scalar(t);
                // SAFETY: as for rows.
                let to = unsafe { lse.get(at..at + 1) };
                to[0] = top[i] + total[i].ln();
            }
        }
    });
}

/// What the backward pass reads: q, dy [rows, heads x N]; picks [rows, heads, slots]; L and D [rows, heads].
#[derive(Clone, Copy)]
pub(super) struct Saved<'a> {
    pub(super) q: &'a [f32],
    pub(super) dy: &'a [f32],
    pub(super) picks: &'a [f32],
    pub(super) lse: &'a [f32],
    pub(super) delta: &'a [f32],
}

impl Saved<'_> {
    /// p and ds of query `t` with a tile of keys, of which it sees `seen`.
    #[inline(always)]
    fn weights(
        &self, h: Head<'_>, t: usize, seen: usize, keys: &Columns, values: &Columns,
    ) -> ([f32; KEYS], [f32; KEYS]) {
        let (mut p, mut ds) = (dots(h.query(self.q, t), keys), dots(h.query(self.dy, t), values));
        let (lse, delta) = (self.lse[h.scalar(t)], self.delta[h.scalar(t)]);
        for l in 0..KEYS {
            p[l] = if l < seen { math::exp(p[l] * h.scale() - lse) } else { 0.0 };
            ds[l] = p[l] * (ds[l] - delta) * h.scale();
        }
        (p, ds)
    }
}

/// dq [rows, heads x N], dk and dv [rows, key heads x N] of sequences without a past.
pub(super) fn backward(
    ctx: &Context, sequences: &[Sequence<'_>], of: Shape, x: Saved<'_>, [dq, dk, dv]: [&mut [f32]; 3],
) {
    let (dq, dk, dv) = (DisjointMut::new(dq), DisjointMut::new(dk), DisjointMut::new(dv));
    tiles(ctx, sequences, of, |h, first| {
        let end = h.sequence.len.min(first + QUERIES);
        let mut sums = [[0f32; WIDEST]; QUERIES];
        let visible = h.visible(x.picks, first, end);
        vectorize(
            #[inline(always)]
            || {
                for &(chunk, rows) in &visible {
                    let (begin, stop) = h.keys(chunk, end);
                    for key in (begin..stop).step_by(KEYS) {
                        let [keys, values] = [h.sequence.keys, h.sequence.values].map(|m| h.columns(m, key, stop));
                        for i in bits(rows) {
                            let seen = h.seen(first + i, key, stop);
                            if seen == 0 {
                                continue;
                            }
                            let (_, ds) = x.weights(h, first + i, seen, &keys, &values);
                            for (l, ds) in ds[..seen].iter().enumerate() {
                                add_scaled(&mut sums[i], *ds, h.row(h.sequence.keys, key + l));
                            }
                        }
                    }
                }
            },
        );
        (first..end).for_each(|t| h.query_mut(&dq, t).copy_from_slice(&sums[t - first][..of.n]));
    });
    let pickers = pickers(sequences, of, x.picks);
    let list: Vec<(usize, usize, usize)> = sequences
        .iter()
        .enumerate()
        .flat_map(|(i, s)| {
            let chunks = 0..s.len.div_ceil(of.chunks.size);
            chunks.flat_map(move |c| {
                let (begin, stop) = Head { sequence: s, of, head: 0 }.keys(c, s.len);
                (begin..stop).step_by(KEYS).map(move |key| (i, c, key))
            })
        })
        .collect();
    ctx.threads().run(list.len() * of.key_heads, |task| {
        let (i, chunk, key) = list[task / of.key_heads];
        let h = Head { sequence: &sequences[i], of, head: task % of.key_heads * of.share() };
        let (_, stop) = h.keys(chunk, h.sequence.len);
        let [keys, values] = [h.sequence.keys, h.sequence.values].map(|m| h.columns(m, key, stop));
        let mut sums = [[[0f32; WIDEST]; KEYS]; 2];
        vectorize(
            #[inline(always)]
            || {
                for h in (h.head..h.head + of.share()).map(|head| Head { head, ..h }) {
                    for t in (key..stop).chain(pickers[i * of.heads + h.head].of(chunk)) {
                        let seen = h.seen(t, key, stop);
                        let (p, ds) = x.weights(h, t, seen, &keys, &values);
                        for l in 0..seen {
                            add_scaled(&mut sums[0][l], ds[l], h.query(x.q, t));
                            add_scaled(&mut sums[1][l], p[l], h.query(x.dy, t));
                        }
                    }
                }
            },
        );
        for l in 0..KEYS.min(stop - key) {
            h.key_mut(&dk, key + l).copy_from_slice(&sums[0][l][..of.n]);
            h.key_mut(&dv, key + l).copy_from_slice(&sums[1][l][..of.n]);
        }
    });
}

/// The queries of one head of one sequence that picked each chunk, one chunk after another.
struct Pickers {
    queries: Vec<u32>,
    /// Where each chunk's begin, and the end.
    starts: Vec<usize>,
}

impl Pickers {
    fn of(&self, chunk: usize) -> impl Iterator<Item = usize> + '_ {
        self.queries[self.starts[chunk]..self.starts[chunk + 1]].iter().map(|&t| t as usize)
    }
}

/// For each sequence and head.
fn pickers(sequences: &[Sequence<'_>], of: Shape, picks: &[f32]) -> Vec<Pickers> {
    let each = |sequence, head| {
        let h: Head<'_> = Head { sequence, of, head };
        let chunks = sequence.len.div_ceil(of.chunks.size);
        let mut starts = vec![0; chunks + 1];
        (0..sequence.len).flat_map(|t| h.picks(picks, t)).for_each(|c| starts[c + 1] += 1);
        (0..chunks).for_each(|c| starts[c + 1] += starts[c]);
        let (mut next, mut queries) = (starts.clone(), vec![0; starts[chunks]]);
        for t in 0..sequence.len {
            for c in h.picks(picks, t) {
                queries[next[c]] = t as u32;
                next[c] += 1;
            }
        }
        Pickers { queries, starts }
    };
    sequences.iter().flat_map(|s| (0..of.heads).map(move |head| each(s, head))).collect()
}
