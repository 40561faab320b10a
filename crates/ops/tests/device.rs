//! Every operation on a GPU against the CPU: values and gradients, in f32 and in 16 bits, twice with the same bits.
//!
//! Needs a GPU: `cargo test -p anser-ops --test device -- --ignored` (the device is cuda:0).

use anser_ops::attention::{Chunks, Past};
use anser_ops::wkv7::Wkv7Inputs;
use anser_ops::{Activation, CrossEntropy, Group, LowRank, Param, ParamSet, Segment, Tape, Var, Weight, batch};
use anser_tensor::{Buf, Context, DType, Device};
use std::sync::Arc;

fn noise(n: usize, seed: u32, scale: f32) -> Vec<f32> {
    let mut s = seed.wrapping_mul(2654435761) | 1;
    let mut next = || {
        s = s.wrapping_mul(1664525).wrapping_add(1013904223);
        (s >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next() * scale).collect()
}

/// How a matrix is stored: activations, or f32 whatever their type (states).
#[derive(Clone, Copy)]
enum Kind {
    Act,
    F32,
}

struct Leaf(usize, usize, f32, Kind);

type Numbers = Vec<Vec<f32>>;
type Op<'a> = &'a dyn Fn(&mut Tape<'_>, &[Var], &[Param]) -> Vec<Var>;

/// Runs `op` and returns values, gradients of leaves and gradients of parameters.
fn run(ctx: &Context, leaves: &[Leaf], params: &[(usize, usize)], op: Op<'_>) -> [Numbers; 3] {
    let spec = |(i, p): (usize, &(usize, usize))| (i.to_string(), vec![p.0, p.1], Group::Plain);
    let (mut set, handles) = ParamSet::new(params.iter().enumerate().map(spec).collect());
    for (i, &h) in handles.iter().enumerate() {
        let n = set.get(h).len();
        set.get_mut(h).copy_from_slice(&rounded(&noise(n, 500 + i as u32, 0.5)));
    }
    set.to_device(ctx);
    let mut grads = ctx.zeros_f32(set.values().len());
    let mut t = Tape::recording(ctx, &set, &mut grads);
    let fill = |n: usize, kind: Kind, values: &[f32]| -> Buf {
        let mut b = if let Kind::Act = kind { ctx.alloc(n) } else { ctx.alloc_f32(n) };
        b.copy_from(values);
        b
    };
    let vars: Vec<Var> = leaves
        .iter()
        .enumerate()
        .map(|(i, l)| Var::leaf(l.0, l.1, fill(l.0 * l.1, l.3, &rounded(&noise(l.0 * l.1, i as u32 + 1, l.2)))))
        .collect();
    let outputs = op(&mut t, &vars, &handles);
    for (i, y) in outputs.iter().enumerate() {
        let mut g = y.buf().duplicate();
        g.copy_from(&rounded(&noise(g.len(), 900 + i as u32, 1.0)));
        y.add_grad(g);
    }
    t.backward();
    let values = outputs.iter().map(Var::to_vec).collect();
    let dleaves = vars.iter().map(|v| v.take_grad().map_or(Vec::new(), |g| g.to_vec())).collect();
    let all = grads.to_vec();
    let dparams = handles.iter().map(|h| all[set.specs()[h.id].range.clone()].to_vec()).collect();
    ctx.check().unwrap();
    [values, dleaves, dparams]
}

/// Values that every type holds exactly, so that only the operation's own rounding counts.
fn rounded(x: &[f32]) -> Vec<f32> {
    x.iter().map(|v| (v * 128.0).round() / 128.0).collect()
}

fn error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let d: f64 = got.iter().zip(want).map(|(g, w)| (*g as f64 - *w as f64).powi(2)).sum();
    let n: f64 = want.iter().map(|w| (*w as f64).powi(2)).sum();
    if n == 0.0 { d.sqrt() } else { (d / n).sqrt() }
}

const TYPES: [(DType, f64); 3] = [(DType::F32, 2e-5), (DType::F16, 5e-3), (DType::BF16, 3e-2)];

fn check(
    name: &str, leaves: &[Leaf], params: &[(usize, usize)], op: impl Fn(&mut Tape<'_>, &[Var], &[Param]) -> Vec<Var>,
) {
    check_in(&TYPES, name, leaves, params, op);
}

fn check_in(
    types: &[(DType, f64)], name: &str, leaves: &[Leaf], params: &[(usize, usize)],
    op: impl Fn(&mut Tape<'_>, &[Var], &[Param]) -> Vec<Var>,
) {
    let want = run(&Context::cpu(2), leaves, params, &op);
    for &(dtype, tolerance) in types {
        let ctx = Context::with_activations(Device::Cuda(0), dtype, 1).unwrap();
        let got = run(&ctx, leaves, params, &op);
        let again = run(&ctx, leaves, params, &op);
        let bits = |n: &[Numbers; 3]| n.iter().flatten().flatten().map(|v| v.to_bits()).collect::<Vec<u32>>();
        assert!(bits(&got) == bits(&again), "{name} {dtype}: two runs differ");
        let mut worst: f64 = 0.0;
        for (part, (got, want)) in ["value", "leaf", "parameter"].iter().zip(got.iter().zip(&want)) {
            for (i, (g, w)) in got.iter().zip(want).enumerate() {
                let e = error(g, w);
                assert!(e <= tolerance, "{name} {dtype}: {part} {i} is off by {e:.1e}");
                worst = worst.max(e);
            }
        }
        println!("{name} {dtype}: worst relative error {worst:.1e}");
    }
}

fn segments() -> Arc<[Segment]> {
    let s = |start, len, state_in, state_out| Segment { start, len, state_in, state_out };
    // Lengths that fill no block, a single token, states that are shared, replaced and left alone.
    vec![s(0, 37, Some(0), Some(1)), s(37, 1, Some(0), Some(2)), s(38, 16, None, None), s(54, 66, Some(3), Some(3))]
        .into()
}

const ROWS: usize = 120;
const SLOTS: usize = 5;

#[test]
#[ignore = "needs a GPU"]
fn elementwise_operations() {
    use Kind::Act;
    for c in [64, 768, 2056] {
        check("layer_norm", &[Leaf(ROWS, c, 2.0, Act)], &[(1, c), (1, c)], |t, x, p| {
            let y = t.layer_norm(&x[0], p[0], p[1]);
            vec![t.add(y, &x[0])]
        });
        let two: [Leaf; 2] = std::array::from_fn(|_| Leaf(ROWS, c, 2.0, Act));
        check("add_norm", &two, &[(1, c), (1, c)], |t, x, p| {
            let (x, y) = t.add_norm(x[0].clone(), &x[1], p[0], p[1]);
            vec![x, y]
        });
        check("relu_squared", &[Leaf(ROWS, c, 2.0, Act)], &[], |t, x, _| vec![t.relu_squared(x[0].clone())]);
        let three: [Leaf; 3] = std::array::from_fn(|_| Leaf(ROWS, c, 2.0, Act));
        check("value_residual", &three, &[], |t, x, _| vec![t.value_residual(&x[0], &x[1], &x[2])]);
    }
    for rows in [1, 3, 3000] {
        check("layer_norm", &[Leaf(rows, 128, 2.0, Act)], &[(1, 128), (1, 128)], |t, x, p| {
            vec![t.layer_norm(&x[0], p[0], p[1])]
        });
    }
}

#[test]
#[ignore = "needs a GPU"]
fn token_shift() {
    use Kind::Act;
    for c in [64, 1032] {
        let leaves = [Leaf(ROWS, c, 1.0, Act), Leaf(SLOTS, c, 1.0, Act)];
        check("token_shift 6", &leaves, &[(1, c); 6], |t, x, p| {
            let mu = std::array::from_fn::<_, 6, _>(|i| p[i]);
            let (y, last) = t.token_shift(&x[0], &x[1], &segments(), mu);
            y.into_iter().chain([last]).collect()
        });
        check("token_shift 1", &leaves, &[(1, c)], |t, x, p| {
            let ([y], last) = t.token_shift(&x[0], &x[1], &segments(), [p[0]]);
            vec![y, last]
        });
    }
}

#[test]
#[ignore = "needs a GPU"]
fn heads() {
    use Kind::Act;
    for (heads, n) in [(2, 16), (3, 32), (12, 64), (3, 128)] {
        let c = heads * n;
        let five: [Leaf; 5] = std::array::from_fn(|_| Leaf(ROWS, c, 1.0, Act));
        for scale in [1.0, 2.0] {
            check("key_path", &five[..2], &[(1, c), (1, c)], |t, x, p| {
                let k = t.key_path(&x[0], &x[1], p[0], p[1], heads, scale);
                vec![k.k, k.a, k.b]
            });
        }
        check("read_out", &five, &[(heads, n), (1, c), (1, c)], |t, x, p| {
            vec![t.read_out(&x[0], &x[1], &x[2], &x[3], &x[4], p[0], p[1], p[2], heads)]
        });
    }
}

#[test]
#[ignore = "needs a GPU"]
fn products() {
    use Kind::Act;
    let (c, out, rank) = (64, 200, 32);
    check("linear", &[Leaf(ROWS, c, 1.0, Act)], &[(out, c)], |t, x, p| vec![t.linear(&x[0], &Weight::OutIn(p[0]))]);
    check("linear [in, out]", &[Leaf(ROWS, c, 1.0, Act)], &[(c, out)], |t, x, p| {
        vec![t.linear(&x[0], &Weight::InOut(p[0]))]
    });
    // Inputs of one piece of memory, weights side by side, gradients where they belong: three products in all, of three each.
    let three = |t: &mut Tape<'_>, x: &[Var], p: &[Param]| {
        let mu = [p[0], p[1], p[2], p[3], p[4], p[5]];
        let (y, _) = t.token_shift(&x[0], &x[1], &segments(), mu);
        let ws = [p[6], p[7], p[8]].map(Weight::OutIn);
        let [gate, k, v] = t.linears([&y[0], &y[1], &y[2]], ws.each_ref());
        vec![t.value_residual(&k, &v, &gate)]
    };
    let (leaves, mut params) = ([Leaf(ROWS, c, 1.0, Act), Leaf(SLOTS, c, 1.0, Act)], vec![(1, c); 6]);
    params.extend([(c, c); 3]);
    check("linears", &leaves, &params, three);
    let ctx = Context::with_activations(Device::Cuda(0), DType::BF16, 1).unwrap();
    let (_, spans) = ctx.cuda().unwrap().profiled(|| run(&ctx, &leaves, &params, &three));
    let names: Vec<&str> = spans.iter().map(|s| s.name.as_str()).filter(|n| n.starts_with("gemm")).collect();
    assert!(names.len() == 3 && names.iter().all(|n| n.contains(" x3 by ")), "{names:?}");
    // Inputs, and gradients of outputs, that lie anywhere; one input needs no gradient.
    let anywhere: [Leaf; 3] = std::array::from_fn(|_| Leaf(ROWS, c, 1.0, Act));
    check("linears anywhere", &anywhere, &[(out, c); 3], |t, x, p| {
        let ws = [p[0], p[1], p[2]].map(Weight::OutIn);
        let fixed = x[1].without_grad();
        t.linears([&x[0], &fixed, &x[2]], ws.each_ref()).into()
    });
    // More maps than go side by side, two with one input, one whose input needs no gradient.
    let ranks = [32, 64, 32, 16, 96];
    let params: Vec<(usize, usize)> = ranks.iter().flat_map(|&r| [(c, r), (r, c), (1, c)]).collect();
    let four: [Leaf; 4] = std::array::from_fn(|_| Leaf(ROWS, c, 1.0, Act));
    check("low_ranks", &four, &params, |t, x, p| {
        use Activation::{Identity, Sigmoid, Tanh};
        let map = |(p, activation): (&[Param], _)| LowRank {
            down: Weight::InOut(p[0]),
            up: Weight::InOut(p[1]),
            bias: (activation != Sigmoid).then_some(p[2]),
            activation,
        };
        let maps: Vec<LowRank> = p.chunks(3).zip([Tanh, Identity, Sigmoid, Identity, Tanh]).map(map).collect();
        let fixed = x[3].without_grad();
        t.low_ranks(&[&x[0], &x[1], &x[2], &fixed, &x[0]].into_iter().zip(&maps).collect::<Vec<_>>())
    });
    // The sum for the bias comes with the gradient, unless something else is added to that.
    for alone in [true, false] {
        check("low_rank gate", &four[..3], &[(c, 32), (32, c), (1, c), (1, c), (1, c)], |t, x, p| {
            let (down, up) = (Weight::InOut(p[0]), Weight::InOut(p[1]));
            let map = LowRank { down, up, bias: Some(p[2]), activation: Activation::Identity };
            let gate = t.low_rank(&x[0], &map);
            let y = t.value_residual(&x[1], &x[2], &gate);
            let key = t.key_path(&y, &gate, p[3], p[4], 1, 1.0);
            if alone { vec![y, key.a] } else { vec![y, key.a, gate] }
        });
        check("low_rank rate", &four[..2], &[(c, 32), (32, c), (1, c), (1, c), (1, c)], |t, x, p| {
            let (down, up) = (Weight::InOut(p[0]), Weight::InOut(p[1]));
            let map = LowRank { down, up, bias: Some(p[2]), activation: Activation::Identity };
            let rate = t.low_rank(&x[0], &map);
            let key = t.key_path(&x[1], &rate, p[3], p[4], 1, 1.0);
            if alone { vec![key.k, key.b] } else { vec![key.k, key.b, rate] }
        });
    }
    for activation in [Activation::Identity, Activation::Tanh, Activation::Sigmoid] {
        for biased in [true, false] {
            let name = format!("low_rank {activation:?}");
            check(&name, &[Leaf(ROWS, c, 1.0, Act)], &[(c, rank), (rank, c), (1, c)], |t, x, p| {
                let (down, up) = (Weight::InOut(p[0]), Weight::InOut(p[1]));
                vec![t.low_rank(&x[0], &LowRank { down, up, bias: biased.then_some(p[2]), activation })]
            });
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn embedding_and_cross_entropy() {
    let c = 64;
    for vocab in [304, 65] {
        let ids: Vec<u32> = (0..ROWS as u32).map(|i| i * i % vocab).collect();
        check("embedding", &[], &[(vocab as usize, c)], |t, _, p| vec![t.embedding(&ids, &Weight::OutIn(p[0]))]);
        check("select", &[Leaf(ROWS, c, 1.0, Kind::Act)], &[], |t, x, _| vec![t.select(&x[0], &[0, 3, 50, 119], 4)]);
        let weights: Vec<f32> = (0..ROWS).map(|i| i as f32 / 64.0).collect();
        // Most rows count, or few.
        for (l2wrap, weights, few) in [
            (false, None, false),
            (true, Some(&weights[..]), false),
            (false, None, true),
            (true, Some(&weights[..]), true),
        ] {
            let target = |i| if (i % 7 == 0) != few { -1 } else { i * 5 % vocab as i32 };
            let targets: Vec<i32> = (0..ROWS as i32).map(target).collect();
            let total = std::cell::Cell::new(0.0);
            check("cross_entropy", &[Leaf(ROWS, c, 1.0, Kind::Act)], &[(vocab as usize, c)], |t, x, p| {
                let opts = CrossEntropy { divisor: 64.0, l2wrap };
                let loss = t.cross_entropy(&x[0], &Weight::OutIn(p[0]), &targets, weights, opts);
                let ctx = t.ctx();
                let mut b = ctx.alloc_f32(ROWS);
                b.copy_from(&loss.per_token());
                total.set(loss.loss());
                let row = |(l, i): (f32, usize)| l as f64 * weights.map_or(1.0, |w| w[i] as f64);
                let sum: f64 = loss.per_token().into_iter().zip(0..).map(row).sum();
                assert!((total.get() - sum / 64.0).abs() <= 1e-12 * sum);
                vec![Var::constant(ROWS, 1, b)]
            });
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn wkv7() {
    use Kind::{Act, F32};
    for (heads, n) in [(2, 16), (3, 32), (3, 64), (2, 128)] {
        let c = heads * n;
        for floor in [0.0, 20.0] {
            let scales = [1.0, 3.0, 1.0, 1.0];
            let mut leaves: Vec<Leaf> = scales.map(|s| Leaf(ROWS, c, s, Act)).into();
            leaves.extend([Leaf(ROWS, c, 1.0, Act), Leaf(SLOTS, c * n, 1.0, F32)]);
            // Removal keys of unit length through key_path, as in the model; floor adds to the decay's logits.
            leaves.push(Leaf(ROWS, c, 1.0, Act));
            // At the floor the gradient of the logits is too small for 16 bits.
            let types = if floor > 0.0 { &TYPES[..1] } else { &TYPES };
            check_in(types, &format!("wkv7 {n} floor {floor}"), &leaves, &[(1, c), (1, c)], |t, x, p| {
                let key = t.key_path(&x[2], &x[4], p[0], p[1], heads, 1.0);
                let mut shift = x[1].buf().duplicate();
                shift.copy_from(&vec![floor; ROWS * c]);
                let w = t.add(x[1].clone(), &Var::constant(ROWS, c, shift));
                let inputs = Wkv7Inputs { r: &x[0], w: &w, k: &key.k, v: &x[3], a: &key.a, b: &key.b };
                let (y, s) = t.wkv7(inputs, &x[5], &segments(), heads);
                vec![y, s]
            });
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn attention() {
    use Kind::Act;
    for (heads, n) in [(2, 16), (3, 32), (2, 64), (1, 128)] {
        let three: [Leaf; 3] = std::array::from_fn(|_| Leaf(ROWS, heads * n, 1.5, Act));
        let segments: Arc<[Segment]> =
            segments().iter().map(|s| Segment { state_in: None, state_out: None, ..*s }).collect();
        for chunks in [Chunks::WHOLE, Chunks::new(5, 2), Chunks::new(16, 1 << 24)] {
            check(&format!("attention {n} {chunks:?}"), &three, &[], |t, x, _| {
                vec![t.attention([&x[0], &x[1], &x[2]], &segments, heads, chunks, &[]).0]
            });
        }
        let keys = || Leaf(ROWS, n, 1.5, Act);
        check(
            &format!("attention {n} with keys shared"),
            &[Leaf(ROWS, heads * n, 1.5, Act), keys(), keys()],
            &[],
            |t, x, _| vec![t.attention([&x[0], &x[1], &x[2]], &segments, heads, Chunks::new(5, 3), &[]).0],
        );
        check(&format!("rotary {n}"), &three[..1], &[], |t, x, _| vec![t.rotary(&x[0], &segments, heads)]);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn head_gate() {
    for (heads, n) in [(3, 16), (1, 32), (5, 64), (2, 128)] {
        let leaves = [Leaf(ROWS, heads * n, 1.0, Kind::Act), Leaf(ROWS, heads, 3.0, Kind::Act)];
        check(&format!("head gate {n}"), &leaves, &[], |t, x, _| vec![t.head_gate(&x[0], &x[1])]);
    }
}

/// Read in pieces, with tokens given up between two of them, as on the CPU.
#[test]
#[ignore = "needs a GPU"]
fn attention_with_a_past() {
    for chunks in [Chunks::new(8, 3), Chunks { sink: 1, window: 1, ..Chunks::new(8, 4) }] {
        attention_in_pieces(chunks);
    }
}

fn attention_in_pieces(chunks: Chunks) {
    let (heads, n, len) = (2, 64, 90);
    let c = heads * n;
    let x: [Vec<f32>; 3] = std::array::from_fn(|i| rounded(&noise(len * c, i as u32 + 1, 1.5)));
    let read = |ctx: &Context| {
        let (params, mut pasts, mut y) = (ParamSet::default(), vec![Past::new(ctx, [heads; 2], n)], Vec::new());
        for (from, to) in [(0, 21), (21, 22), (22, 64), (64, 90)] {
            let mut t = Tape::inference(ctx, &params);
            let var = |x: &Vec<f32>| Var::constant(to - from, c, ctx.copy_of(&x[from * c..to * c]));
            let [q, k, v] = x.each_ref().map(var);
            let out;
            (out, pasts) = t.attention([&q, &k, &v], &batch(1, to - from, true).into(), heads, chunks, &pasts);
            y.extend(out.to_vec());
            if to == 64 {
                let kept: Vec<usize> = (0..16).chain(32..40).chain(50..64).collect();
                pasts[0] = pasts[0].keep(ctx, &kept, chunks);
            }
        }
        ctx.check().unwrap();
        (y, pasts[0].keys())
    };
    let (y, keys) = read(&Context::cpu(2));
    for (dtype, tolerance) in TYPES {
        let got = read(&Context::with_activations(Device::Cuda(0), dtype, 1).unwrap());
        let e = error(&got.0, &y);
        assert!(e <= tolerance, "{dtype}: off by {e:.1e}");
        assert!(got.1 == keys);
    }
}

/// The inputs r, w, k, v, a, b of a model, rounded to bf16; removal keys of unit length, all the same in runs if `repeated`.
fn wkv7_inputs(rows: usize, heads: usize, n: usize, repeated: bool) -> [Vec<f32>; 6] {
    let c = heads * n;
    let round = |x: Vec<f32>| -> Vec<f32> { x.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect() };
    let mut key = noise(rows * c, 77, 1.0);
    if repeated {
        for t in 0..rows {
            let from = t / 24 * 24 * c;
            key.copy_within(from..from + c, t * c);
        }
    }
    let k = noise(rows * c, 78, 1.0);
    for head in key.chunks_exact_mut(n) {
        let norm = head.iter().map(|x| x * x).sum::<f32>().sqrt();
        head.iter_mut().for_each(|x| *x /= norm);
    }
    let rate: Vec<f32> = noise(rows * c, 79, 1.0).iter().map(|x| if repeated { 0.95 } else { 0.5 + 0.5 * x }).collect();
    let b = key.iter().zip(&rate).map(|(k, r)| k * r).collect();
    let a = key.iter().map(|k| -k).collect();
    let w = noise(rows * c, 80, 3.0).iter().map(|w| if repeated { w - 6.0 } else { *w }).collect();
    [noise(rows * c, 81, 1.0), w, k, noise(rows * c, 82, 1.0), a, b].map(round)
}

#[test]
#[ignore = "needs a GPU"]
fn wkv7_in_chunks_heads_of_64() {
    wkv7_in_chunks(2, 64);
}

#[test]
#[ignore = "needs a GPU"]
fn wkv7_in_chunks_heads_of_128() {
    wkv7_in_chunks(1, 128);
}

fn wkv7_in_chunks(heads: usize, n: usize) {
    let s = |start, len, state_in, state_out| Segment { start, len, state_in, state_out };
    // Long enough to be cut into pieces; a piece of a chunk at the ends; one that is not cut.
    let segments: Arc<[Segment]> =
        vec![s(0, 2070, Some(0), Some(1)), s(2070, 37, None, Some(2)), s(2107, 563, Some(2), None)].into();
    let (rows, c) = (2670, heads * n);
    for repeated in [false, true] {
        let inputs = wkv7_inputs(rows, heads, n, repeated);
        let compute = |ctx: &Context| -> Vec<Vec<f32>> {
            let set = ParamSet::default();
            let mut none = ctx.zeros_f32(0);
            let mut t = Tape::recording(ctx, &set, &mut none);
            let vars: Vec<Var> = inputs.iter().map(|x| Var::leaf(rows, c, ctx.copy_of(x))).collect();
            let mut start = ctx.alloc_f32(4 * c * n);
            start.copy_from(&noise(4 * c * n, 5, 1.0));
            let state = Var::leaf(4, c * n, start);
            let x = Wkv7Inputs { r: &vars[0], w: &vars[1], k: &vars[2], v: &vars[3], a: &vars[4], b: &vars[5] };
            let (y, new) = t.wkv7(x, &state, &segments, heads);
            let values = [y.to_vec(), new.to_vec()];
            y.add_grad(ctx.copy_of(&rounded(&noise(rows * c, 6, 1.0))));
            let mut dnew = ctx.alloc_f32(4 * c * n);
            dnew.copy_from(&noise(4 * c * n, 7, 1.0));
            new.add_grad(dnew);
            t.backward();
            ctx.check().unwrap();
            let grads = vars.iter().chain([&state]).map(|v| v.take_grad().unwrap().to_vec());
            values.into_iter().chain(grads).collect()
        };
        let want = compute(&Context::cpu(2));
        let ctx = Context::with_activations(Device::Cuda(0), DType::BF16, 1).unwrap();
        let got = compute(&ctx);
        let bits = |n: &[Vec<f32>]| n.iter().flatten().map(|v| v.to_bits()).collect::<Vec<u32>>();
        assert!(bits(&got) == bits(&compute(&ctx)), "two runs differ");
        let names = ["y", "state", "dr", "dw", "dk", "dv", "da", "db", "dstate"];
        let errors: Vec<f64> = got.iter().zip(&want).map(|(g, w)| error(g, w)).collect();
        let table: Vec<String> = names.iter().zip(&errors).map(|(n, e)| format!("{n} {e:.1e}")).collect();
        println!("wkv7 in chunks, head size {n}, repeated keys {repeated}: {}", table.join(", "));
        assert!(errors.iter().all(|e| *e <= 5e-3));
        // Without gradients, in f16 too.
        for (dtype, tolerance) in [(DType::BF16, 5e-3), (DType::F16, 8e-4)] {
            let ctx = Context::with_activations(Device::Cuda(0), dtype, 1).unwrap();
            let set = ParamSet::default();
            let vars: Vec<Var> = inputs.iter().map(|x| Var::constant(rows, c, ctx.copy_of(x))).collect();
            let mut start = ctx.alloc_f32(4 * c * n);
            start.copy_from(&noise(4 * c * n, 5, 1.0));
            let x = Wkv7Inputs { r: &vars[0], w: &vars[1], k: &vars[2], v: &vars[3], a: &vars[4], b: &vars[5] };
            let state = Var::constant(4, c * n, start);
            let (y, new) = Tape::inference(&ctx, &set).wkv7(x, &state, &segments, heads);
            let errors = [error(&y.to_vec(), &want[0]), error(&new.to_vec(), &want[1])];
            println!("wkv7 in chunks, {dtype}, without gradients: y {:.1e}, state {:.1e}", errors[0], errors[1]);
            assert!(errors.iter().all(|e| *e <= tolerance));
        }
    }
}
