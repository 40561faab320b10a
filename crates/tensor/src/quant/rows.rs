//! Activations rounded to 8 bits.

use crate::{Code, Context, DisjointMut};

/// Rows of activations in codes of -127 to 127, a scale for each group. Rows that a kernel takes together lie together, four inputs of each in turn.
pub(super) struct Rows {
    /// By tiles of rows: [groups * group / 4][rows of the tile][4], padded with zeros.
    codes: Vec<i8>,
    /// By tiles: [groups][rows of the tile].
    scales: Vec<f32>,
    /// Likewise -128 times the sum of a group's codes: what products with weights that are 128 too large have too much.
    offsets: Vec<i32>,
    /// Of a single row with many zeros: what is not zero.
    live: Option<Live>,
    count: usize,
    /// Rows of a tile; the last ones may have one less.
    most: usize,
    groups: usize,
    group: usize,
}

/// Some rows of some groups, as kernels take them.
#[derive(Clone, Copy)]
pub(super) struct Tile<'a> {
    /// [groups * group / 4][rows][4].
    pub codes: &'a [i8],
    /// [groups][rows].
    pub scales: &'a [f32],
    /// [groups][rows].
    pub offsets: &'a [i32],
    /// Of a single row with many zeros.
    pub live: Option<&'a Live>,
}

/// The fours of inputs that are not all zero: weights of the others needn't be read.
pub(super) struct Live {
    /// Their numbers in order, and [`AHEAD`](Live::AHEAD) more to fetch behind them.
    fours: Vec<u32>,
    /// How many there are before each group, and in all.
    starts: Vec<u32>,
}

impl Live {
    /// How many are fetched ahead.
    const AHEAD: usize = 16;

    /// Those of group `g`, each with the one that is to be fetched then.
    pub fn of(&self, g: usize) -> impl Iterator<Item = (usize, usize)> {
        let here = self.starts[g] as usize..self.starts[g + 1] as usize;
        let ahead = &self.fours[here.start + Live::AHEAD..];
        self.fours[here].iter().zip(ahead).map(|(four, ahead)| (*four as usize, *ahead as usize))
    }

    pub fn groups(&self) -> usize {
        self.starts.len() - 1
    }

    /// None if they are so many that reading all is sooner done: lines one after another come several times as fast as lines here and there, and
    /// of 4 or 5 bits one has more than four inputs.
    fn new(codes: &[i8], code: Code) -> Option<Live> {
        let (group, one_in) = (code.group(), if code == Code::Int8 { 4 } else { 16 });
        if codes.iter().filter(|c| **c == 0).count() < codes.len() / 2 {
            return None;
        }
        let codes = codes.as_chunks::<4>().0;
        let (mut fours, mut starts) = (vec![0; codes.len() + Live::AHEAD], vec![0]);
        let mut count = 0;
        for (g, here) in codes.chunks_exact(group / 4).enumerate() {
            // Without a branch, which nobody could predict.
            for (i, four) in here.iter().enumerate() {
                fours[count] = (g * (group / 4) + i) as u32;
                count += usize::from(*four != [0; 4]);
            }
            starts.push(count as u32);
        }
        if count * one_in > codes.len() {
            return None;
        }
        fours.truncate(count);
        fours.resize(count + Live::AHEAD, 0);
        Some(Live { fours, starts })
    }
}

impl Rows {
    /// Rounds x [m, k] for weights in `code`, for tiles of at most so many rows.
    pub fn new(ctx: &Context, code: Code, k: usize, most: usize, x: &[f32]) -> Rows {
        let group = code.group();
        let (count, groups) = (x.len() / k, k.div_ceil(group));
        // As even as can be.
        let most = count.div_ceil(count.div_ceil(most).max(1)).max(1);
        let mut rows = Rows {
            codes: vec![0; count * groups * group],
            scales: vec![0.0; count * groups],
            offsets: vec![0; count * groups],
            live: None,
            count,
            most,
            groups,
            group,
        };
        let codes = DisjointMut::new(&mut rows.codes);
        let (scales, offsets) = (DisjointMut::new(&mut rows.scales), DisjointMut::new(&mut rows.offsets));
        ctx.threads().run(count.div_ceil(most), |t| {
            let here = most.min(count - t * most);
            let all = t * most * groups..(t * most + here) * groups;
            // SAFETY: each tile is rounded by one task.
            let (codes, scales, offsets) =
                unsafe { (codes.get(all.start * group..all.end * group), scales.get(all.clone()), offsets.get(all)) };
            for r in 0..here {
                let row = &x[(t * most + r) * k..][..k];
                crate::simd::vectorize(
                    #[inline(always)]
                    || round_row(row, group, (r, here), codes, scales, offsets),
                );
            }
        });
        if count == 1 {
            rows.live = Live::new(&rows.codes, code);
        }
        rows
    }

    pub fn count(&self) -> usize {
        self.count
    }

    /// Rows of a tile.
    pub fn most(&self) -> usize {
        self.most
    }

    /// Tile `t`, its groups from `first` on, so many.
    pub fn tile(&self, t: usize, first: usize, groups: usize) -> Tile<'_> {
        let here = self.most.min(self.count - t * self.most);
        let start = t * self.most * self.groups + first * here;
        let at = start..start + groups * here;
        Tile {
            codes: &self.codes[at.start * self.group..at.end * self.group],
            scales: &self.scales[at.clone()],
            offsets: &self.offsets[at],
            live: self.live.as_ref().filter(|_| groups == self.groups),
        }
    }
}

/// Rounds a row, number `r` of `here` in its tile.
#[inline(always)]
fn round_row(
    x: &[f32], group: usize, (r, here): (usize, usize), codes: &mut [i8], scales: &mut [f32], offsets: &mut [i32],
) {
    let mut rounded = [0i8; 64];
    for (g, x) in x.chunks(group).enumerate() {
        scales[g * here + r] = round(x, &mut rounded);
        let mut sum = 0;
        for v in rounded {
            sum += i32::from(v);
        }
        offsets[g * here + r] = -128 * sum;
        let to = &mut codes[g * group * here..(g + 1) * group * here];
        for (to, from) in to.chunks_exact_mut(4 * here).zip(rounded.as_chunks::<4>().0) {
            to[4 * r..4 * r + 4].copy_from_slice(from);
        }
    }
}

/// Codes of at most 64 activations, zeros behind them, and their scale; NaN if one of them is no finite number, so that products are none either.
#[inline(always)]
fn round(x: &[f32], codes: &mut [i8; 64]) -> f32 {
    let mut padded = [0f32; 64];
    padded[..x.len()].copy_from_slice(x);
    let mut largest = [0f32; 8];
    // The product with 0 is 0, or NaN.
    let mut strange = [0f32; 8];
    for x in padded.as_chunks::<8>().0 {
        for i in 0..8 {
            largest[i] = if x[i].abs() > largest[i] { x[i].abs() } else { largest[i] };
            strange[i] += x[i] * 0.0;
        }
    }
    let largest = largest.into_iter().fold(0.0, f32::max);
    *codes = [0; 64];
    if strange.iter().any(|v| v.is_nan()) {
        return f32::NAN;
    }
    // Below that its inverse is no number.
    if largest < 1e-30 {
        return 0.0;
    }
    let inverse = 127.0 / largest;
    // A number of this size has whole numbers in its last bits: adding rounds to the nearest, of two the even one.
    const WHOLE: f32 = 12_582_912.0;
    for (c, v) in codes.iter_mut().zip(&padded) {
        *c = (v * inverse + WHOLE).to_bits() as i8;
    }
    largest / 127.0
}
