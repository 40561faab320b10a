use super::*;
use anser_tensor::{DType, Device};

fn values(n: usize, seed: u32) -> Vec<f32> {
    let mut s = seed;
    let mut next = || {
        s = s.wrapping_mul(1664525).wrapping_add(1013904223);
        (s >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// The choice as its documentation says, in f64: the shares of the tokens that stay, in the order of tokens.
fn shares(logits: &[f32], cuts: &Cuts) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let distances: Vec<f64> = logits.iter().map(|l| f64::from(max - l) * f64::from(cuts.before)).collect();
    let total: f64 = distances.iter().map(|d| (-d).exp()).sum();
    let mut order = distances.clone();
    order.sort_unstable_by(f64::total_cmp);
    let mut sum = 0.0;
    let reached = order.iter().copied().find(|d| {
        sum += (-d).exp() / total;
        sum >= f64::from(cuts.top_p)
    });
    let mut limit = if cuts.top_p < 1.0 { reached.unwrap_or(16.0).min(16.0) } else { f64::INFINITY };
    if cuts.min_p > 0.0 {
        limit = limit.min(-f64::from(cuts.min_p).ln());
    }
    let kept = |d: &f64| if *d <= limit + 1e-6 { (-d * f64::from(cuts.after)).exp() } else { 0.0 };
    let weights: Vec<f64> = distances.iter().map(kept).collect();
    let total: f64 = weights.iter().sum();
    weights.iter().map(|w| w / total).collect()
}

#[test]
#[ignore = "needs a GPU"]
fn tokens_are_chosen_as_from_their_shares() {
    let ctx = Context::with_activations(Device::Cuda(0), DType::F32, 1).unwrap();
    let plain = Cuts { before: 1.0, after: 1.0, top_p: 1.0, min_p: 0.0, random: 0 };
    let all = [
        plain,
        Cuts { top_p: 0.85, ..plain },
        Cuts { top_p: 0.0, ..plain },
        Cuts { top_p: 0.6, after: 0.5, ..plain },
        Cuts { top_p: 0.999, before: 2.0, min_p: 0.01, ..plain },
        Cuts { min_p: 0.3, after: 3.0, ..plain },
    ];
    for (vocab, spread) in [(1, 1.0), (33, 2.0), (2049, 0.0), (3000, 6.0), (65536, 0.5), (65536, 8.0)] {
        let (rows, mut random) = (2, 0x1234_5678_9abc_def1u64);
        let logits: Vec<f32> = values(rows * vocab, 7).iter().map(|v| v * spread).collect();
        let mut draws = vec![Draw { row: 1, from: None }];
        for (i, cuts) in all.iter().cycle().take(48).enumerate() {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let random = [random, 0, u64::MAX][if i < 36 { 0 } else { 1 + i % 2 }];
            draws.push(Draw { row: i % rows, from: Some(Cuts { random, ..*cuts }) });
        }
        let tokens = chosen(&ctx, &logits, &draws, vocab).unwrap();
        assert_eq!(tokens, chosen(&ctx, &logits, &draws, vocab).unwrap());
        let max = logits[vocab..].iter().copied().fold(f32::NEG_INFINITY, f32::max);
        assert_eq!(tokens[0], logits[vocab..].iter().position(|l| *l == max).unwrap() as i32);
        for (draw, token) in draws.iter().zip(tokens).skip(1) {
            let cuts = draw.from.unwrap();
            let shares = shares(&logits[draw.row * vocab..][..vocab], &cuts);
            let (before, at) = (shares[..token as usize].iter().sum::<f64>(), cuts.random as f64 / 2f64.powi(64));
            let share = shares[token as usize];
            assert!(
                share > 0.0 && before - 2e-5 <= at && at <= before + share + 2e-5,
                "{vocab} x {spread}, {cuts:?}: token {token} stands for {before} to {} and {at} was drawn",
                before + share
            );
        }
    }
    let mut logits = vec![0.0; 100];
    logits[70] = f32::NAN;
    assert_eq!(chosen(&ctx, &logits, &[Draw { row: 0, from: None }], 100).unwrap(), [-1]);
}
