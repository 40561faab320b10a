use super::{Chunks, Past};
use crate::testing::{check, matrix, noise};
use crate::{ParamSet, Segment, Tape, Var, batch};
use anser_tensor::Context;
use std::sync::Arc;

fn ragged(lengths: &[usize]) -> Vec<Segment> {
    let piece = |start: &mut usize, &len: &usize| {
        *start += len;
        Some(Segment { start: *start - len, len, state_in: None, state_out: None })
    };
    lengths.iter().scan(0, piece).collect()
}

/// The definition, with the whole matrix of weights of each head.
fn reference(x: &[Vec<f64>], segments: &[Segment], heads: usize, n: usize, chunks: Chunks) -> Vec<Vec<f64>> {
    let c = heads * n;
    let share = x[0].len().checked_div(x[1].len()).unwrap_or(1);
    let mut y = vec![0.0; x[0].len()];
    for s in segments {
        for h in 0..heads {
            let query = |t: usize| &x[0][(s.start + t) * c + h * n..][..n];
            let row = |m: usize, t: usize| &x[m][(s.start + t) * c / share + h / share * n..][..n];
            for t in 0..s.len {
                let dot = |j: usize| query(t).iter().zip(row(1, j)).map(|(q, k)| q * k).sum::<f64>();
                let own = t / chunks.size;
                let keys = |chunk: usize| (chunk * chunks.size..(chunk + 1) * chunks.size).map(dot);
                let mut past: Vec<usize> = (0..own).collect();
                // A stable sort leaves the earlier of equal chunks first.
                past.sort_by(|&a, &b| keys(b).sum::<f64>().total_cmp(&keys(a).sum()));
                past.sort_by_key(|&a| !(a < chunks.sink || own - a <= chunks.window));
                past.truncate(chunks.top - 1);
                let seen: Vec<usize> =
                    (0..=t).filter(|j| j / chunks.size == own || past.contains(&(j / chunks.size))).collect();
                let scores: Vec<f64> = seen.iter().map(|&j| dot(j) / (n as f64).sqrt()).collect();
                let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let p: Vec<f64> = scores.iter().map(|s| (s - top).exp()).collect();
                let total: f64 = p.iter().sum();
                for e in 0..n {
                    y[(s.start + t) * c + h * n + e] =
                        seen.iter().zip(&p).map(|(&j, p)| p / total * row(2, j)[e]).sum();
                }
            }
        }
    }
    vec![y]
}

const fn chunks(size: usize, top: usize) -> Chunks {
    Chunks::new(size, top)
}

#[test]
fn values_and_gradients() {
    // No tokens, one token, lengths on both sides of a tile of keys and of queries, scores far apart; chunks smaller and larger than tiles,
    // of one token, with and without past ones, more wanted than there are, none full, all full; first and last ones always seen, and nothing else.
    let cases: [(&[usize], usize, usize, f32, Chunks); 18] = [
        (&[], 1, 4, 1.0, Chunks::WHOLE),
        (&[1], 2, 4, 1.0, Chunks::WHOLE),
        (&[3, 1, 18], 2, 4, 1.0, Chunks::WHOLE),
        (&[16, 17], 1, 5, 3.0, Chunks::WHOLE),
        (&[35], 1, 4, 2.0, Chunks::WHOLE),
        (&[2, 4], 1, 128, 1.0, Chunks::WHOLE),
        (&[], 1, 4, 1.0, chunks(2, 2)),
        (&[1, 9, 1], 2, 4, 1.0, chunks(1, 3)),
        (&[4, 23], 2, 4, 1.0, chunks(4, 2)),
        (&[35], 1, 4, 2.0, chunks(4, 3)),
        (&[36], 1, 4, 1.0, chunks(17, 2)),
        (&[20, 7], 2, 5, 1.0, chunks(5, 1)),
        (&[12, 11], 1, 4, 1.0, chunks(3, 9)),
        (&[40], 1, 4, 3.0, chunks(1, 17)),
        (&[4, 23], 2, 4, 1.0, Chunks { sink: 1, ..chunks(3, 3) }),
        (&[35], 1, 4, 2.0, Chunks { window: 2, ..chunks(2, 4) }),
        (&[30, 9], 1, 4, 2.0, Chunks { sink: 1, window: 1, ..chunks(2, 5) }),
        (&[27], 2, 4, 1.0, Chunks { sink: 2, window: 1, ..chunks(2, 4) }),
    ];
    for (lengths, heads, n, scale, chunks) in cases {
        let segments = ragged(lengths);
        let rows = lengths.iter().sum();
        let shared: Arc<[Segment]> = segments.clone().into();
        // Every head of queries has keys of its own, or two share them.
        for key_heads in [heads, heads / 2].into_iter().filter(|k| *k > 0) {
            let x = [(1, heads), (2, key_heads), (3, key_heads)];
            check(
                &x.map(|(seed, heads)| matrix(rows, heads * n, seed, scale)),
                &[],
                |t, x, _| vec![t.attention([&x[0], &x[1], &x[2]], &shared, heads, chunks, &[]).0],
                |x| reference(x, &segments, heads, n, chunks),
            );
        }
    }
}

/// q, k and v of `len` tokens.
fn qkv(ctx: &Context, len: usize, c: usize, scale: f32) -> [Var; 3] {
    [1, 2, 3].map(|seed| {
        let x: Vec<f32> = noise(len * c, seed).iter().map(|v| v * scale).collect();
        Var::constant(len, c, ctx.copy_of(&x))
    })
}

fn attend(
    ctx: &Context, [q, k, v]: &[Var; 3], segments: Vec<Segment>, heads: usize, chunks: Chunks, pasts: &[Past],
) -> (Vec<f32>, Vec<Past>) {
    let set = ParamSet::default();
    let mut t = Tape::inference(ctx, &set);
    let (y, pasts) = t.attention([q, k, v], &segments.into(), heads, chunks, pasts);
    (y.to_vec(), pasts)
}

#[test]
fn cuts_do_not_change_a_bit() {
    let (ctx, heads, n, len) = (Context::cpu(2), 2, 8, 150);
    let [q, mut k, mut v] = qkv(&ctx, len, heads * n, 2.0);
    let always = Chunks { sink: 1, window: 2, ..chunks(5, 6) };
    for chunks in [Chunks::WHOLE, chunks(16, 3), chunks(7, 2), chunks(40, 1), chunks(1, 5), always] {
        // The last rule with one head of keys.
        if chunks == always {
            [k, v] = [k, v].map(|x| Var::constant(len, n, x.buf().part(0, len * n)));
        }
        let (x, key_heads) = ([q.clone(), k.clone(), v.clone()], k.cols() / n);
        let (whole, _) = attend(&ctx, &x, batch(1, len, false), heads, chunks, &[]);
        for cut in [1, 5, 16, 33, 149] {
            let mut pasts = vec![Past::new(&ctx, [heads, key_heads], n)];
            let mut y = Vec::new();
            for first in (0..len).step_by(cut) {
                let count = cut.min(len - first);
                let piece = x.each_ref().map(|x| {
                    let c = x.cols();
                    Var::constant(count, c, x.buf().part(first * c, count * c))
                });
                let part;
                (part, pasts) = attend(&ctx, &piece, batch(1, count, true), heads, chunks, &pasts);
                y.extend(part);
            }
            assert!(y == whole, "{chunks:?} in pieces of {cut}");
            assert!(pasts[0].to_vecs() == [x[1].to_vec(), x[2].to_vec()]);
        }
    }
}

#[test]
fn a_fork_goes_on_from_its_own_past() {
    let (ctx, heads, n) = (Context::cpu(1), 1, 4);
    let x = qkv(&ctx, 20, n, 1.0);
    let rule = chunks(4, 2);
    let rows =
        |from: usize, count: usize| x.each_ref().map(|x| Var::constant(count, n, x.buf().part(from * n, count * n)));
    let (_, start) = attend(&ctx, &rows(0, 9), batch(1, 9, true), heads, rule, &[Past::new(&ctx, [1, 1], n)]);
    let (a, after) = attend(&ctx, &rows(9, 5), batch(1, 5, true), heads, rule, &start);
    let (b, _) = attend(&ctx, &rows(14, 5), batch(1, 5, true), heads, rule, &start);
    // From the same past, in either order and beside each other.
    assert!(attend(&ctx, &rows(9, 5), batch(1, 5, true), heads, rule, &start).0 == a && a != b);
    let segments = |slots: [usize; 2]| {
        [0, 1].map(|i| Segment { start: 5 * i, len: 5, state_in: Some(slots[i]), state_out: Some(slots[i]) }).to_vec()
    };
    let (both, next) = attend(&ctx, &rows(9, 10), segments([1, 0]), heads, rule, &[start[0].clone(), start[0].clone()]);
    assert!(both == [a, b].concat());
    assert!(next[1].to_vecs() == after[0].to_vecs() && next[0].to_vecs() != after[0].to_vecs());
    assert_eq!((start[0].len(), next[0].len()), (9, 14));
}

#[test]
fn a_token_changes_nothing_before_it() {
    let (ctx, heads, n, len) = (Context::cpu(2), 1, 8, 70);
    let x = qkv(&ctx, len, n, 1.0);
    let rule = chunks(8, 3);
    let (whole, _) = attend(&ctx, &x, batch(1, len, false), heads, rule, &[]);
    // At edges of chunks, in the last one, which is not full, and elsewhere.
    for changed in [0, 7, 8, 30, 63, 64, 69] {
        let other = x.each_ref().map(|x| {
            let mut values = x.to_vec();
            values[changed * n..][..n].iter_mut().for_each(|v| *v = 3.0 - *v);
            Var::constant(len, n, ctx.copy_of(&values))
        });
        let (y, _) = attend(&ctx, &other, batch(1, len, false), heads, rule, &[]);
        assert!(y[..changed * n] == whole[..changed * n] && y[changed * n..] != whole[changed * n..]);
    }
}

#[test]
fn of_equal_chunks_the_earlier_is_seen() {
    let (ctx, n, len) = (Context::cpu(1), 4, 12);
    let ones = || Var::constant(len, n, ctx.copy_of(&vec![1.0; len * n]));
    let v: Vec<f32> = (0..len).flat_map(|t| [t as f32; 4]).collect();
    let (y, _) = attend(
        &ctx,
        &[ones(), ones(), Var::constant(len, n, ctx.copy_of(&v))],
        batch(1, len, false),
        1,
        chunks(2, 3),
        &[],
    );
    // The last token sees chunks 0 and 1, which are tokens 0 to 3, and its own, 10 and 11.
    assert_eq!(y[11 * n], (0.0 + 1.0 + 2.0 + 3.0 + 10.0 + 11.0) / 6.0);
}

#[test]
fn the_first_and_the_last_chunks_are_always_seen() {
    let (ctx, n, len) = (Context::cpu(1), 4, 22);
    let ones = || Var::constant(len, n, ctx.copy_of(&vec![1.0; len * n]));
    let v: Vec<f32> = (0..len).flat_map(|t| [t as f32; 4]).collect();
    let seen = |sink, window| {
        let x = [ones(), ones(), Var::constant(len, n, ctx.copy_of(&v))];
        let rule = Chunks { sink, window, ..chunks(2, 4) };
        attend(&ctx, &x, batch(1, len, false), 1, rule, &[]).0[21 * n]
    };
    // Of equal scores chunks 0 and 1 are the best; the own one is 10.
    let mean = |chunks: &[usize]| chunks.iter().map(|c| 2.0 * *c as f32 + 0.5).sum::<f32>() / chunks.len() as f32;
    assert_eq!(seen(0, 0), mean(&[0, 1, 2, 10]));
    assert_eq!(seen(0, 1), mean(&[0, 1, 9, 10]));
    assert_eq!(seen(2, 1), mean(&[0, 1, 9, 10]));
    assert_eq!(seen(0, 3), mean(&[7, 8, 9, 10]));
}

#[test]
fn large_scores_do_not_overflow_and_neighbours_do_not_matter() {
    let (heads, n, len) = (2, 16, 50);
    let c = heads * n;
    let run = |copies: usize, chunks: Chunks| {
        let (ctx, set) = (Context::cpu(2), ParamSet::default());
        let mut t = Tape::inference(&ctx, &set);
        let var = |seed| {
            let x: Vec<f32> = noise(len * c, seed).iter().map(|v| v * 100.0).collect::<Vec<_>>().repeat(copies);
            Var::constant(copies * len, c, ctx.copy_of(&x))
        };
        t.attention([&var(1), &var(2), &var(3)], &batch(copies, len, false).into(), heads, chunks, &[]).0.to_vec()
    };
    for chunks in [Chunks::WHOLE, chunks(12, 2)] {
        let one = run(1, chunks);
        assert!(one.iter().all(|y| y.is_finite() && y.abs() <= 100.0));
        assert!(run(3, chunks) == one.repeat(3));
    }
}

#[test]
fn what_is_kept_is_as_if_nothing_else_had_been() {
    let (ctx, n, rule) = (Context::cpu(1), 4, chunks(4, 2));
    let x = qkv(&ctx, 30, n, 1.0);
    let rows = |numbers: &[usize]| {
        x.each_ref().map(|x| {
            let data: Vec<f32> = numbers.iter().flat_map(|&i| x.data()[i * n..][..n].to_vec()).collect();
            Var::constant(numbers.len(), n, ctx.copy_of(&data))
        })
    };
    let first: Vec<usize> = (0..20).collect();
    let (_, all) = attend(&ctx, &rows(&first), batch(1, 20, true), 1, rule, &[Past::new(&ctx, [1, 1], n)]);
    let all = all[0].noting(&ctx, &[x[0].buf()], 0, 20);
    let kept = [0, 1, 2, 3, 8, 9, 13, 17, 18, 19];
    let few = all.keep(&ctx, &kept, rule);
    let (_, want) = attend(&ctx, &rows(&kept), batch(1, 10, true), 1, rule, &[Past::new(&ctx, [1, 1], n)]);
    assert_eq!((few.len(), few.to_vecs().len()), (10, 3));
    assert!(few.to_vecs()[..2] == want[0].to_vecs()[..] && few.to_vecs()[2] == rows(&kept)[0].to_vec());
    let next: Vec<usize> = (20..30).collect();
    let go_on = |past: Past| attend(&ctx, &rows(&next), batch(1, 10, true), 1, rule, &[past]).0;
    assert!(go_on(few) == go_on(want[0].clone()));
    assert_eq!(all.keep(&ctx, &[], rule).len(), 0);
}
