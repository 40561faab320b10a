//! The GPU's side against sums in f64 over the keys that its own picks name, and the picks against f64 scores.
//!
//! Needs a GPU: `cargo test -p anser-ops --lib attention -- --ignored` (the device is cuda:0).

use super::plan::{self, Plan};
use super::{Chunks, cuda};
use anser_tensor::{Buf, Context, DType, Device};

/// Heads of size `n`; of each sequence the keys before its queries, and its queries.
struct Case<'a> {
    heads: usize,
    /// Heads of queries that share one of keys.
    share: usize,
    n: usize,
    size: usize,
    top: usize,
    /// First and last chunks of the past that are always seen.
    always: [usize; 2],
    sequences: &'a [(usize, usize)],
    /// All chunks have the same keys: all scores are equal.
    same: bool,
    /// Of the numbers, beside 1.7.
    scale: f32,
    /// Bytes between kernels.
    between: usize,
}

fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut s = seed.wrapping_mul(2654435761) | 1;
    let mut next = || {
        s = s.wrapping_mul(1664525).wrapping_add(1013904223);
        (s >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next() * 1.7).collect()
}

fn wide(b: &Buf) -> Vec<f64> {
    b.to_vec().iter().map(|v| f64::from(*v)).collect()
}

fn error(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let d: f64 = got.iter().zip(want).map(|(g, w)| (g - w).powi(2)).sum();
    let n: f64 = want.iter().map(|w| w.powi(2)).sum();
    (d / n.max(1e-30)).sqrt()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// What one run gives: picks, then y, lse and, without a past, dq, dk, dv; and the inputs as the device has them.
struct Out {
    picks: Vec<i32>,
    values: Vec<Vec<f64>>,
    inputs: [Vec<f64>; 4],
}

fn run(ctx: &Context, case: &Case<'_>) -> Out {
    let (c, kc) = (case.heads * case.n, case.heads / case.share * case.n);
    let rows: usize = case.sequences.iter().map(|s| s.1).sum();
    let keys: usize = case.sequences.iter().map(|s| s.0 + s.1).sum();
    let k: Vec<f32> = if case.same {
        noise(case.size * kc, 2).into_iter().cycle().take(keys * kc).collect()
    } else {
        noise(keys * kc, 2)
    };
    let [q, k, v, dy] = [noise(rows * c, 1), k, noise(keys * kc, 3), noise(rows * c, 4)].map(|x| {
        // As every type holds them, so that the choice is the same in all.
        ctx.copy_of(&x.iter().map(|x| half::bf16::from_f32(x * case.scale).to_f32()).collect::<Vec<_>>())
    });
    let chunks: usize = case.sequences.iter().map(|s| (s.0 + s.1).div_ceil(case.size)).sum();
    let means = ctx.alloc_f32(chunks * kc);
    let (mut row, mut key, mut chunk) = (0, 0, 0);
    let list: Vec<_> = case
        .sequences
        .iter()
        .map(|&(past, len)| {
            let at = |b: &Buf, row: usize| b.ptr().offset(row * kc, b.dtype());
            let s = plan::Sequence {
                first_row: row,
                len,
                past,
                known: 0,
                keys: at(&k, key),
                values: at(&v, key),
                means: at(&means, chunk),
            };
            row += len;
            key += past + len;
            chunk += (past + len).div_ceil(case.size);
            s
        })
        .collect();
    let gpu = ctx.cuda().unwrap();
    let [sink, window] = case.always;
    let chunks = Chunks { sink, window, ..Chunks::new(case.size, case.top) };
    let heads = [case.heads, case.heads / case.share];
    let plan = Plan::within(ctx, rows, heads, case.n, chunks, &list, case.between);
    let mut choice = cuda::choose(ctx, gpu, &plan, &q);
    let (y, lse) = (ctx.alloc(rows * c), ctx.alloc_f32(rows * case.heads));
    cuda::forward(ctx, gpu, &plan, &q, &mut choice, &y, Some(&lse));
    let mut values = vec![wide(&y), wide(&lse)];
    if rows == keys {
        let grads = [c, kc, kc].map(|cols| ctx.alloc(rows * cols));
        cuda::backward(ctx, gpu, &plan, &q, &choice, [&y, &dy, &lse], grads.each_ref());
        values.extend(grads.iter().map(wide));
    }
    ctx.check().unwrap();
    let picks = choice.picks.to_vec().iter().map(|p| p.to_bits() as i32).collect();
    Out { picks, values, inputs: [&q, &k, &v, &dy].map(wide) }
}

/// The same in f64 with the picks of `out`, which are held to be right.
fn reference(case: &Case<'_>, out: &Out) -> Vec<Vec<f64>> {
    let (n, heads, size, slots) = (case.n, case.heads, case.size, case.top - 1);
    let [q, k, v, dy] = &out.inputs;
    let c = heads * n;
    let (mut y, mut lse) = (vec![0.0; q.len()], vec![0.0; q.len() / n]);
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; k.len()]);
    let (mut first_row, mut first_key) = (0, 0);
    for &(past, len) in case.sequences {
        for (i, h) in (0..len).flat_map(|i| (0..heads).map(move |h| (i, h))) {
            let (row, t) = ((first_row + i) * heads + h, past + i);
            let at = |key: usize| ((first_key + key) * heads / case.share + h / case.share) * n;
            let (query, own) = (&q[row * n..][..n], t / size);
            let picks = &out.picks[(h * (q.len() / c) + first_row + i) * slots..][..slots];
            let count = slots.min(own);
            assert!(picks[count..].iter().all(|p| *p == -1), "{picks:?} of {own}");
            let picks: Vec<usize> = picks[..count].iter().map(|p| *p as usize).collect();
            assert!(picks.windows(2).all(|w| w[0] < w[1]) && picks.iter().all(|p| *p < own), "{picks:?} of {own}");
            let always = |chunk: usize| chunk < case.always[0] || own - chunk <= case.always[1];
            assert!((0..own).filter(|c| always(*c)).all(|c| picks.contains(&c)), "{picks:?} of {own}");
            let (mut least, mut most) = (f64::INFINITY, f64::NEG_INFINITY);
            let mut slack: f64 = 0.0;
            for chunk in (0..own).filter(|c| !always(*c)) {
                let mean = |j: usize| (0..size).map(|i| k[at(chunk * size + i) + j]).sum::<f64>() / size as f64;
                let mean: Vec<f64> = (0..n).map(mean).collect();
                let score = dot(query, &mean);
                slack = slack.max(3e-5 * query.iter().zip(&mean).map(|(a, b)| (a * b).abs()).sum::<f64>());
                if picks.contains(&chunk) { least = least.min(score) } else { most = most.max(score) }
            }
            assert!(least >= most - slack, "query {t}: picks {picks:?} of {own}, {least} below {most}");
            let chosen: Vec<usize> = picks.iter().copied().filter(|p| !always(*p)).collect();
            let first = || (0..own).filter(|c| !always(*c));
            assert!(
                !case.same || chosen.iter().copied().eq(first().take(chosen.len())),
                "of equals the first: {picks:?}"
            );
            let seen = picks.iter().flat_map(|p| p * size..(p + 1) * size).chain(own * size..t + 1);
            let scale = 1.0 / (n as f64).sqrt();
            let p: Vec<(usize, f64)> =
                seen.map(|key| (at(key), (dot(query, &k[at(key)..][..n]) * scale).exp())).collect();
            let total: f64 = p.iter().map(|p| p.1).sum();
            lse[row] = total.ln();
            for &(key, p) in &p {
                (0..n).for_each(|j| y[row * n + j] += p / total * v[key + j]);
            }
            let grad = &dy[row * n..][..n];
            let delta = dot(grad, &y[row * n..][..n]);
            for &(key, p) in &p {
                let p = p / total;
                let ds = p * (dot(grad, &v[key..][..n]) - delta) * scale;
                for j in 0..n {
                    dq[row * n + j] += ds * k[key + j];
                    dk[key + j] += ds * query[j];
                    dv[key + j] += p * grad[j];
                }
            }
        }
        first_row += len;
        first_key += past + len;
    }
    assert_eq!(first_row * c, q.len());
    vec![y, lse, dq, dk, dv]
}

fn check(types: &[DType], case: &Case<'_>) {
    for &dtype in types {
        let tolerance = if dtype == DType::F32 { 1e-5 } else { 5e-3 };
        let ctx = Context::with_activations(Device::Cuda(0), dtype, 1).unwrap();
        let out = run(&ctx, case);
        let again = run(&ctx, case);
        assert!(out.picks == again.picks, "two runs differ");
        let bits = |o: &Out| o.values.iter().flatten().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert!(bits(&out) == bits(&again), "two runs differ");
        let want = reference(case, &out);
        let names = ["y", "lse", "dq", "dk", "dv"];
        let errors: Vec<f64> = out.values.iter().zip(&want).map(|(g, w)| error(g, w)).collect();
        let text: Vec<String> = names.iter().zip(&errors).map(|(n, e)| format!("{n} {e:.1e}")).collect();
        let Case { heads, n, size, top, sequences, .. } = case;
        println!("{dtype}, {heads} heads of {n}, {top} chunks of {size}, {sequences:?}: {}", text.join(", "));
        assert!(errors.iter().all(|e| *e <= tolerance));
    }
}

const ALL: [DType; 3] = [DType::F32, DType::BF16, DType::F16];
const SHAPE: Case<'_> = Case {
    heads: 2,
    share: 1,
    n: 64,
    size: 16,
    top: 3,
    always: [0; 2],
    sequences: &[],
    same: false,
    scale: 1.0,
    between: plan::BETWEEN,
};

#[test]
#[ignore = "needs a GPU"]
fn ragged() {
    let sequences = [(0, 37), (0, 1), (0, 64), (0, 130)];
    check(&ALL, &Case { sequences: &sequences, ..SHAPE });
    check(&ALL, &Case { size: 24, top: 2, sequences: &[(0, 100), (0, 24), (0, 23), (0, 25)], ..SHAPE });
    check(&ALL, &Case { heads: 1, n: 128, size: 64, sequences: &[(0, 150), (0, 129)], ..SHAPE });
}

#[test]
#[ignore = "needs a GPU"]
fn small_heads() {
    for n in [16, 32] {
        check(&ALL, &Case { n, sequences: &[(0, 70), (0, 33)], ..SHAPE });
    }
}

/// Lists of several tiles and pieces; groups of one head.
#[test]
#[ignore = "needs a GPU"]
fn long_lists() {
    check(&ALL, &Case { size: 128, top: 2, sequences: &[(0, 290)], between: 1, ..SHAPE });
    check(&[DType::BF16], &Case { n: 128, size: 40, top: 2, sequences: &[(0, 230)], between: 1, ..SHAPE });
}

/// Chunks whose keys a kernel for Hopper keeps, and the first chunks, which it sees in one piece where they are longer.
#[test]
#[ignore = "needs a GPU"]
fn short_and_long_chunks() {
    const HALF: [DType; 2] = [DType::BF16, DType::F16];
    for (size, top) in [(128, 3), (150, 2), (256, 2), (260, 2)] {
        check(&HALF, &Case { size, top, sequences: &[(0, 3 * size + 70), (0, 40), (0, size)], ..SHAPE });
    }
    check(&[DType::BF16], &Case { size: 130, sequences: &[(300, 260), (0, 130), (125, 12)], heads: 1, ..SHAPE });
    // No query sees all keys before it.
    check(&[DType::BF16], &Case { size: 128, top: 2, sequences: &[(300, 150), (700, 20)], ..SHAPE });
    check(
        &[DType::BF16],
        &Case { size: 257, top: 2, sequences: &[(300, 300), (900, 70), (20, 30)], heads: 1, ..SHAPE },
    );
}

#[test]
#[ignore = "needs a GPU"]
fn many_picks() {
    check(&ALL, &Case { size: 8, top: 16, sequences: &[(0, 290)], heads: 1, ..SHAPE });
    // More chunks than are scored at a time, and more picks than are chosen at a time.
    check(&[DType::BF16], &Case { size: 1, top: 16, sequences: &[(0, 290), (150, 30)], heads: 1, ..SHAPE });
    check(&[DType::F32, DType::BF16], &Case { size: 4, top: 21, sequences: &[(0, 140)], heads: 1, ..SHAPE });
}

#[test]
#[ignore = "needs a GPU"]
fn extremes() {
    check(&ALL, &Case { size: 1, sequences: &[(0, 70)], ..SHAPE });
    // More chunks than one block sums up.
    check(&[DType::BF16], &Case { size: 1, sequences: &[(0, 270)], heads: 1, ..SHAPE });
    check(&ALL, &Case { size: 32, top: 1, sequences: &[(0, 100)], ..SHAPE });
    check(&ALL, &Case { size: 1000, sequences: &[(0, 100)], ..SHAPE });
}

#[test]
#[ignore = "needs a GPU"]
fn equal_scores() {
    check(&ALL, &Case { same: true, sequences: &[(0, 140)], ..SHAPE });
    check(&ALL, &Case { same: true, size: 7, top: 5, sequences: &[(0, 100)], ..SHAPE });
    // More than are kept while others come.
    check(&[DType::BF16], &Case { same: true, size: 5, top: 16, sequences: &[(0, 360)], heads: 1, ..SHAPE });
}

#[test]
#[ignore = "needs a GPU"]
fn always_seen() {
    check(&ALL, &Case { size: 8, top: 4, always: [1, 1], sequences: &[(0, 140), (0, 20), (77, 70)], ..SHAPE });
    check(&ALL, &Case { size: 8, top: 3, always: [0, 2], sequences: &[(0, 100)], heads: 1, ..SHAPE });
    // More than are chosen at a time, of which some are always seen; all the same elsewhere.
    let many = Case { size: 2, top: 22, heads: 1, ..SHAPE };
    check(&[DType::F32, DType::BF16], &Case { always: [18, 1], sequences: &[(0, 140)], ..many });
    check(&[DType::F32], &Case { always: [3, 5], same: true, sequences: &[(0, 140)], ..many });
}

#[test]
#[ignore = "needs a GPU"]
fn heads_that_share_keys() {
    let groups = Case { heads: 4, share: 2, ..SHAPE };
    check(&ALL, &Case { sequences: &[(0, 37), (0, 1), (0, 130)], ..groups });
    check(&ALL, &Case { share: 4, sequences: &[(40, 30), (0, 20), (63, 70)], ..groups });
    check(&ALL, &Case { n: 128, heads: 2, size: 40, top: 2, sequences: &[(0, 130)], between: 1, ..groups });
    check(&ALL, &Case { n: 16, sequences: &[(0, 70)], ..groups });
    check(&[DType::BF16], &Case { size: 128, top: 2, sequences: &[(0, 290)], ..groups });
}

#[test]
#[ignore = "needs a GPU"]
fn with_a_past() {
    check(&ALL, &Case { sequences: &[(40, 30), (130, 1), (0, 20), (63, 70)], ..SHAPE });
    check(&ALL, &Case { size: 64, sequences: &[(150, 50), (64, 64)], ..SHAPE });
}

/// Many ragged sequences and scores far apart, as in a training step: 16 bits against f32 on the same device.
#[test]
#[ignore = "needs a GPU"]
fn many_sequences() {
    // What the emulator has time for; ANSER_TEST_ROWS=65536 is a training step.
    let rows: usize = std::env::var("ANSER_TEST_ROWS").map_or(600, |v| v.parse().unwrap());
    for (size, top, scale) in [(512, 1, 3.0), (200, 2, 3.0), (512, 3, 3.0), (64, 16, 1.0), (16, 4, 3.0)] {
        let (mut sequences, mut left, mut s) = (Vec::new(), rows, size as u32);
        while left > 0 {
            s = s.wrapping_mul(1664525).wrapping_add(1013904223);
            let len = (1 + (s >> 8) as usize % (rows / 2).min(4000)).min(left);
            sequences.push((0, len));
            left -= len;
        }
        let case = Case { size, top, sequences: &sequences, scale, ..SHAPE };
        let out = |dtype| run(&Context::with_activations(Device::Cuda(0), dtype, 1).unwrap(), &case);
        let (exact, fast) = (out(DType::F32), out(DType::BF16));
        let same = exact.picks.iter().zip(&fast.picks).filter(|(a, b)| a == b).count();
        println!(
            "{top} chunks of {size}, scale {scale}: {} of {} picks differ",
            exact.picks.len() - same,
            exact.picks.len()
        );
        assert!(exact.picks.len() - same <= exact.picks.len() / 1000);
        for (name, (a, b)) in ["y", "lse", "dq", "dk", "dv"].iter().zip(exact.values.iter().zip(&fast.values)) {
            let most = |x: &[f64]| x.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
            println!("  {name}: {:.1e}, at most {:.2} and {:.2}", error(b, a), most(a), most(b));
            assert!(error(b, a) < 3e-2, "{name}");
        }
    }
}
