//! The fused decoding step on a GPU against the model's own forward pass, operation by operation: logits and states.
//!
//! Needs a GPU (or the emulator): `cargo test -p anser-infer --test decoder -- --ignored`.

use anser_formats::{Checkpoint, Dtype, Source, coded, write_safetensors};
use anser_infer::{Decoder, Session};
use anser_model::{Config, Hybrid, Init, Load, Model, State};
use anser_ops::{Tape, batch};
use anser_tensor::{Code, Context, DType, Device, WeightType};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

fn error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let d: f64 = got.iter().zip(want).map(|(g, w)| (*g as f64 - *w as f64).powi(2)).sum();
    let n: f64 = want.iter().map(|w| (*w as f64).powi(2)).sum();
    (d / n.max(1e-30)).sqrt()
}

/// A model in which everything has a part: no zeros where initialisation has them.
fn model(config: &Config) -> Model {
    let mut model = Model::init(&Context::cpu(2), config, Init::Current, 3).unwrap();
    let mut s = 1u32;
    for v in model.params_mut().values_mut() {
        s = s.wrapping_mul(1664525).wrapping_add(1013904223);
        *v += 0.05 * ((s >> 8) as f32 / (1 << 23) as f32 - 1.0);
    }
    model
}

fn config(head_size: usize, n_embd: usize, n_layer: usize) -> Config {
    Config { head_size, ..Config::new(n_layer, n_embd, 200) }
}

/// Logits after every token of a sequence and the final state, by the forward pass.
fn reference(ctx: &Context, model: &Model, tokens: &[u32]) -> (Vec<f32>, State) {
    let mut tape = Tape::inference(ctx, model.params());
    let state = State::zeros(ctx, model.config(), 1);
    let (hidden, state) =
        model.forward(&mut tape, tokens, &batch(1, tokens.len(), true).into(), &state, false).unwrap();
    (model.logits(&mut tape, &hidden).to_vec(), state)
}

fn sequence(i: usize, len: usize) -> Vec<u32> {
    (0..len).map(|t| ((t * 37 + i * 11 + 5) % 200) as u32).collect()
}

const TYPES: [(DType, f64); 2] = [(DType::F16, 5e-3), (DType::BF16, 4e-2)];

#[test]
#[ignore = "needs a GPU"]
fn steps_equal_the_forward_pass() {
    for (head_size, n_embd, layers) in
        [(64, 128, 3), (64, 192, 2), (64, 320, 1), (64, 1088, 1), (64, 2112, 1), (128, 1280, 1)]
    {
        let model = model(&config(head_size, n_embd, layers));
        let types = if n_embd > 1000 { &TYPES[..1] } else { &TYPES };
        for &(dtype, tolerance) in types {
            let ctx = Context::with_activations(Device::Cuda(0), dtype, 2).unwrap();
            let device = model.packed(&ctx, dtype);
            for n in if n_embd > 1000 { vec![1, 4] } else { vec![1, 2, 3, 4] } {
                let vocab = model.config().vocab_size;
                let sequences: Vec<Vec<u32>> = (0..n).map(|i| sequence(i, 6)).collect();
                let mut decoder = Decoder::new(&ctx, &device, n + 1).unwrap().unwrap();
                // Slot 0 stays empty, the others are used backwards; the second half of the first sequence is read as a prompt.
                let slot = |i: usize| n - i;
                let mut got = vec![Vec::new(); n];
                for t in 0..6 {
                    let inputs: Vec<(usize, u32)> = (0..n).map(|i| (slot(i), sequences[i][t])).collect();
                    let logits = decoder.step(&inputs).unwrap();
                    logits.chunks(vocab).zip(&mut got).for_each(|(l, g)| g.extend_from_slice(l));
                }
                let (mut worst, mut apart): (f64, f64) = (0.0, 0.0);
                for i in 0..n {
                    let (logits, state) = reference(&Context::cpu(2), &model, &sequences[i]);
                    let mut see = |what: &str, got: &[f32], want: &[f32]| {
                        let e = error(got, want);
                        assert!(e < tolerance, "{what} of sequence {i} of {n}, N {head_size}, {dtype}: off by {e:.1e}");
                        worst = worst.max(e);
                    };
                    see("logits", &got[i], &logits);
                    let mine = decoder.state(slot(i)).unwrap();
                    for (a, b) in mine.vars().zip(state.vars()) {
                        see("state", &a.to_vec(), &b.to_vec());
                    }
                    let (logits, state) = reference(&ctx, &device, &sequences[i]);
                    apart = apart.max(error(&got[i], &logits));
                    for (a, b) in mine.vars().zip(state.vars()) {
                        apart = apart.max(error(&a.to_vec(), &b.to_vec()));
                    }
                }
                let empty = decoder.state(0).unwrap();
                assert!(empty.vars().all(|v| v.to_vec().iter().all(|&x| x == 0.0)));
                println!(
                    "C {n_embd} N {head_size} {dtype} B {n}: worst relative error {worst:.1e}, from operation by operation {apart:.1e}"
                );
                assert!(apart < tolerance);
            }
        }
    }
}

/// A sequence that is kept apart gives the same bits alone and in steps of any number.
#[test]
#[ignore = "needs a GPU"]
fn apart_in_any_number() {
    let hybrid = Config { hybrid: Some(Hybrid { chunk: 16, topk: 4, ..Hybrid::new(1) }), ..config(64, 128, 1) };
    let (f16, bf16) = (DType::F16.into(), DType::BF16.into());
    let configs = [
        (config(64, 192, 2), DType::F16, f16, 71, 3, vec![1, 3, 5, 17, 33]),
        (config(64, 192, 1), DType::F16, WeightType::Int8, 6, 2, vec![1, 4, 5]),
        (config(128, 256, 1), DType::BF16, bf16, 64, 3, vec![1, 40]),
        (hybrid, DType::F16, f16, 9, 36, vec![1, 5]),
    ];
    for (config, dtype, kept, most, tokens, some) in configs {
        let model = model(&config);
        let ctx = Context::with_activations(Device::Cuda(0), dtype, 2).unwrap();
        let device = model.packed(&ctx, kept);
        let mut decoder = Decoder::new(&ctx, &device, most).unwrap().unwrap();
        assert_eq!(decoder.set_apart(), most);
        let mut steps = |slots: &[usize]| {
            slots.iter().for_each(|&slot| decoder.clear(slot).unwrap());
            let mut logits = Vec::new();
            for t in 0..tokens {
                let inputs: Vec<(usize, u32)> = slots.iter().map(|&i| (i, sequence(i, tokens)[t])).collect();
                logits = decoder.step(&inputs).unwrap().to_vec();
            }
            let state = |&slot: &usize| decoder.state(slot).unwrap().vars().flat_map(|v| v.to_vec()).collect();
            let states: Vec<Vec<f32>> = slots.iter().map(state).collect();
            (logits, states)
        };
        let slots: Vec<usize> = (0..most).collect();
        let (all, states) = steps(&slots);
        assert!(all.iter().all(|v| v.is_finite()) && all[..200] != all[200..400]);
        for n in some {
            let some: Vec<usize> = (0..n).map(|i| (i * 7 + 2) % most).collect();
            let (logits, states_of_some) = steps(&some);
            for (i, &slot) in some.iter().enumerate() {
                assert!(logits[i * 200..][..200] == all[slot * 200..][..200], "logits of {slot} among {n}");
                assert!(states_of_some[i] == states[slot], "state of {slot} among {n}");
            }
        }
    }
}

/// With matrices in codes of 8 bits a step is that of the weights that the codes stand for: in f32 on a CPU, and operation by operation.
#[test]
#[ignore = "needs a GPU"]
fn matrices_in_eight_bits() {
    let hybrid = Config { hybrid: Some(Hybrid { chunk: 16, topk: 4, ..Hybrid::new(1) }), ..config(64, 320, 1) };
    let [f16, bf16] = TYPES;
    eight_bits(&config(64, 192, 2), f16, &[1, 2, 3, 4, 6, 40, 70]);
    eight_bits(&config(64, 1088, 1), f16, &[1, 4, 5]);
    eight_bits(&hybrid, f16, &[1, 4, 5]);
    eight_bits(&config(128, 640, 1), bf16, &[1, 6, 40, 70]);
}

#[test]
#[ignore = "needs a GPU"]
fn wide_matrices_in_eight_bits() {
    eight_bits(&Config { n_hidden: 2176, ..config(64, 2112, 1) }, TYPES[0], &[1, 4]);
}

fn eight_bits(config: &Config, (dtype, tolerance): (DType, f64), numbers: &[usize]) {
    let (plain, mut rounded) = (model(config), model(config));
    let coded = |s: &anser_model::ParamSpec| {
        let kept = anser_model::kept_as(WeightType::Int8, &s.name, &s.shape);
        kept == Some(WeightType::Int8) && !s.name.ends_with("emb.weight")
    };
    let specs: Vec<_> = plain.params().specs().iter().filter(|s| coded(s)).cloned().collect();
    assert!(specs.len() == 6 * (config.n_layer + config.hybrid.map_or(0, |h| h.layers)) + 1);
    for spec in specs {
        let k = spec.shape[1];
        for row in rounded.params_mut().values_mut()[spec.range].chunks_mut(k) {
            let (mut codes, mut scales) = (vec![0; k], vec![Default::default(); k.div_ceil(64)]);
            Code::Int8.encode(row, &mut codes, &mut scales);
            let value = |i: usize| f32::from(codes[i] as i8) * scales[i / 64].to_f32();
            row.iter_mut().enumerate().for_each(|(i, w)| *w = value(i));
        }
    }
    let ctx = Context::with_activations(Device::Cuda(0), dtype, 2).unwrap();
    let device = plain.packed(&ctx, WeightType::Int8);
    let vocab = config.vocab_size;
    for &n in numbers {
        let mut decoder = Decoder::new(&ctx, &device, n).unwrap().unwrap();
        let mut logits = Vec::new();
        for t in 0..4 {
            let inputs: Vec<(usize, u32)> = (0..n).map(|i| (i, sequence(i, 4)[t])).collect();
            logits = decoder.step(&inputs).unwrap().to_vec();
        }
        for i in BTreeSet::from([0, n / 2, n - 1]) {
            let got = &logits[i * vocab..][..vocab];
            for (what, of) in [("the CPU", &rounded), ("unrounded weights", &plain)] {
                let (want, state) = reference(&Context::cpu(2), of, &sequence(i, 4));
                let e = error(got, &want[3 * vocab..]);
                println!("C {} {dtype} B {n}: from {what} {e:.1e}", config.n_embd);
                assert!(e < if what == "the CPU" { tolerance } else { 5e-2 }, "{what}: {e:.1e}");
                if what == "the CPU" {
                    for (a, b) in decoder.state(i).unwrap().vars().zip(state.vars()) {
                        assert!(error(&a.to_vec(), &b.to_vec()) < tolerance);
                    }
                }
            }
            let (want, _) = reference(&ctx, &device, &sequence(i, 4));
            assert!(error(got, &want[3 * vocab..]) < tolerance);
        }
    }
}

/// A file whose matrices are in codes gives the same on a GPU as coding those of a file in f32.
#[test]
#[ignore = "needs a GPU"]
fn a_file_in_eight_bits() {
    let model = model(&config(64, 192, 1));
    let folder = std::env::temp_dir().join(format!("anser-eight-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let [plain, small] = ["plain", "small"].map(|n| folder.join(format!("{n}.safetensors")));
    let value = |s: &anser_model::ParamSpec| {
        let values = &model.params().values()[s.range.clone()];
        let values = Box::new(move || Ok(Cow::Borrowed(values)));
        Source { name: s.name.clone(), shape: s.shape.clone(), dtype: Dtype::F32, values }
    };
    write_safetensors(&plain, &model.params().specs().iter().map(value).collect::<Vec<_>>(), &BTreeMap::new()).unwrap();
    let file = Checkpoint::open(&plain).unwrap();
    let mut sources = Vec::new();
    for spec in model.params().specs() {
        // The embedding, of which a row is read, is in 16 bits on a GPU.
        let kept = anser_model::kept_as(WeightType::Int8, &spec.name, &spec.shape);
        if kept != Some(WeightType::Int8) || spec.name.ends_with("emb.weight") {
            sources.push(value(spec));
            continue;
        }
        let (rows, k) = (spec.shape[0], spec.shape[1]);
        let code = move |values: &[f32]| {
            let groups = k.div_ceil(64);
            let (mut codes, mut scales) = (vec![0; rows * k], vec![Default::default(); rows * groups]);
            let each = codes.chunks_mut(k).zip(scales.chunks_mut(groups));
            values.chunks(k).zip(each).for_each(|(w, (c, s))| Code::Int8.encode(w, c, s));
            (codes, scales)
        };
        sources.extend(coded::sources(file.get(&spec.name).unwrap(), Dtype::I8, code).unwrap());
    }
    write_safetensors(&small, &sources, &coded::metadata(&[Dtype::I8]).collect()).unwrap();
    assert!(std::fs::metadata(&small).unwrap().len() * 2 < std::fs::metadata(&plain).unwrap().len());
    let ctx = Context::with_activations(Device::Cuda(0), DType::F16, 2).unwrap();
    let logits = |path: &Path, kept: WeightType| {
        let model = Model::load(&ctx, &Checkpoint::open(path).unwrap(), Load::Inference(kept)).unwrap();
        let mut decoder = Decoder::new(&ctx, &model, 1).unwrap().unwrap();
        decoder.step(&[(0, 7)]).unwrap();
        decoder.step(&[(0, 9)]).unwrap().to_vec()
    };
    let want = logits(&plain, WeightType::Int8);
    assert!(logits(&small, WeightType::Int8) == want && logits(&plain, DType::F16.into()) != want);
    // In f16 the file in codes is that of the values that they stand for.
    assert!(error(&logits(&small, DType::F16.into()), &want) < 5e-3);
    std::fs::remove_dir_all(&folder).unwrap();
}

/// Steps of more sequences than the kernels for few serve, against operation by operation.
#[test]
#[ignore = "needs a GPU"]
fn any_number_of_sequences() {
    let configs = [
        (config(64, 128, 2), DType::F16, 5e-3, vec![5, 64, 65, 200]),
        (Config { vocab_size: 203, ..config(64, 1088, 1) }, DType::F16, 5e-3, vec![17, 33]),
        (config(64, 192, 2), DType::BF16, 4e-2, vec![9, 70]),
        (config(64, 320, 1), DType::F16, 5e-3, vec![6, 20]),
    ];
    for (config, dtype, tolerance, batches) in configs {
        let (model, vocab) = (model(&config), config.vocab_size);
        let ctx = Context::with_activations(Device::Cuda(0), dtype, 2).unwrap();
        let device = model.packed(&ctx, dtype);
        let most = *batches.iter().max().unwrap();
        let tokens: Vec<Vec<u32>> = (0..most).map(|i| sequence(i, 3)).collect();
        let mut tape = Tape::inference(&ctx, device.params());
        let state = State::zeros(&ctx, &config, most);
        let all: Vec<u32> = tokens.concat();
        let (hidden, state) = device.forward(&mut tape, &all, &batch(most, 3, true).into(), &state, false).unwrap();
        let want = device.logits(&mut tape, &hidden).to_vec();
        let states: Vec<Vec<f32>> = state.vars().map(|v| v.to_vec()).collect();
        let mut decoder = Decoder::new(&ctx, &device, most).unwrap().unwrap();
        for n in batches {
            (0..most).for_each(|slot| decoder.clear(slot).unwrap());
            let mut logits = Vec::new();
            let slot = |i: usize| (i * 7 + 3) % n;
            let order: Vec<usize> = if n % 7 == 0 { (0..n).collect() } else { (0..n).map(slot).collect() };
            for t in 0..3 {
                let inputs: Vec<(usize, u32)> = (0..n).map(|i| (order[i], tokens[i][t])).collect();
                logits = decoder.step(&inputs).unwrap().to_vec();
            }
            assert!(
                decoder.logits(n - 1..n).unwrap() == &logits[(n - 1) * vocab..] && decoder.logits(n..n + 1).is_err()
            );
            let mut worst: f64 = 0.0;
            for i in 0..n {
                worst = worst.max(error(&logits[i * vocab..][..vocab], &want[(i * 3 + 2) * vocab..][..vocab]));
                for (v, want) in decoder.state(order[i]).unwrap().vars().zip(&states) {
                    worst = worst.max(error(&v.to_vec(), &want[i * v.cols()..][..v.cols()]));
                }
            }
            println!("C {} {dtype} B {n}: from operation by operation {worst:.1e}", config.n_embd);
            assert!(worst < tolerance, "{worst:.1e}");
        }
        // Going on without the host is the same, in every number of sequences.
        let inputs: Vec<(usize, u32)> = (0..most).map(|i| (i, tokens[i][0])).collect();
        (0..most).for_each(|slot| decoder.clear(slot).unwrap());
        let last = decoder.greedy(&inputs, 2).unwrap();
        (0..most).for_each(|slot| decoder.clear(slot).unwrap());
        let once = decoder.greedy(&inputs, 1).unwrap();
        let next: Vec<(usize, u32)> = once.into_iter().enumerate().collect();
        assert_eq!(decoder.greedy(&next, 1).unwrap(), last);
    }
}

#[test]
#[ignore = "needs a GPU"]
fn prompts_then_steps_and_the_same_bits_whatever_the_neighbours() {
    [DType::F16.into(), WeightType::Int8].into_iter().for_each(steps_of_neighbours);
}

fn steps_of_neighbours(kept: WeightType) {
    let model = model(&config(64, 128, 2));
    let ctx = Context::with_activations(Device::Cuda(0), DType::F16, 2).unwrap();
    let device = model.packed(&ctx, kept);
    let tokens = sequence(0, 9);
    let (want, _) = match kept {
        WeightType::Float(_) => reference(&Context::cpu(2), &model, &tokens),
        _ => reference(&ctx, &device, &tokens),
    };
    let mut decoder = Decoder::new(&ctx, &device, 4).unwrap().unwrap();
    decoder.prefill(2, &tokens[..5]).unwrap();
    let fork = decoder.state(2).unwrap();
    let mut alone = Vec::new();
    for &t in &tokens[5..] {
        alone = decoder.step(&[(2, t)]).unwrap().to_vec();
    }
    assert!(error(&alone, &want[8 * 200..]) < 5e-3);
    // Again: among others of its batch, and through recorded work.
    for neighbours in [0, 1, 2, 3] {
        decoder.set_state(2, &fork).unwrap();
        for &t in &tokens[5..] {
            let others = [(0, 7), (1, 9), (3, 11)];
            let mut inputs = others[..neighbours].to_vec();
            inputs.push((2, t));
            let logits = decoder.step(&inputs).unwrap();
            if t == tokens[8] {
                let same = logits[neighbours * 200..].iter().zip(&alone).all(|(a, b)| a.to_bits() == b.to_bits());
                assert!(same, "{neighbours} neighbours change the result");
            }
        }
    }
    // A session goes through the same steps.
    let mut session = Session::new(&ctx, &device);
    session.feed(&tokens[..5]).unwrap();
    let before = session.fork();
    for &t in &tokens[5..] {
        session.feed(&[t]).unwrap();
    }
    let mut fork = session.fork();
    assert!(session.logits().unwrap() == alone);
    let mut again = before.fork();
    again.feed(&tokens[5..]).unwrap();
    assert!(error(again.logits().unwrap(), &alone) < 5e-3);
    fork.feed(&[3]).unwrap();
    session.feed(&[3]).unwrap();
    assert!(session.logits().unwrap() == fork.logits().unwrap());
    // The most probable tokens, chosen on the device.
    decoder.clear(3).unwrap();
    let mut token = 1;
    for _ in 0..5 {
        let logits = decoder.step(&[(3, token)]).unwrap();
        let best = logits.iter().fold(f32::MIN, |m, &v| m.max(v));
        token = logits.iter().position(|&v| v == best).unwrap() as u32;
    }
    decoder.clear(3).unwrap();
    assert_eq!(decoder.greedy(&[(3, 1)], 5).unwrap(), [token]);
    let zero = decoder.zero_share();
    assert!(if kept == WeightType::Int8 { zero == 0.0 } else { zero > 0.2 && zero < 0.8 }, "{zero}");
    assert!(
        decoder.step(&[(4, 1)]).is_err()
            && decoder.step(&[(0, 200)]).is_err()
            && decoder.step(&[(0, 1), (0, 2)]).is_err()
    );
}

/// Where rows of the second matrix of channel mixing under zeros are not read, which ones these are depends on the neighbours, and bits still don't.
#[test]
#[ignore = "needs a GPU"]
fn rows_that_are_skipped_change_no_bits() {
    let model = model(&config(64, 1088, 1));
    for dtype in [DType::F16, DType::BF16] {
        let ctx = Context::with_activations(Device::Cuda(0), dtype, 2).unwrap();
        let device = model.packed(&ctx, dtype);
        let mut decoder = Decoder::new(&ctx, &device, 4).unwrap().unwrap();
        let mut alone = Vec::new();
        for neighbours in [0, 1, 3] {
            decoder.clear(2).unwrap();
            let mut all = Vec::new();
            for t in [5, 77] {
                let mut inputs = [(0, 7), (1, 9), (3, 11)][..neighbours].to_vec();
                inputs.push((2, t));
                let logits = decoder.step(&inputs).unwrap();
                all.extend(logits[neighbours * 200..].iter().map(|v| v.to_bits()));
            }
            if neighbours == 0 {
                alone = all;
                let zero = decoder.zero_share();
                assert!(zero > 0.2 && zero < 0.8, "{zero}");
            } else {
                assert!(all == alone, "{neighbours} neighbours change the result, {dtype}");
            }
        }
    }
}

/// What is too large for 16 bits becomes infinite, and then no number: blocks that wait for values take that for one.
#[test]
#[ignore = "needs a GPU"]
fn a_value_that_is_no_number_is_not_waited_for() {
    let mut model = model(&config(64, 128, 2));
    let specs = model.params().specs().to_vec();
    for s in specs.iter().filter(|s| s.name.ends_with("ffn.key.weight")) {
        model.params_mut().values_mut()[s.range.clone()].iter_mut().for_each(|w| *w *= 2e4);
    }
    let ctx = Context::with_activations(Device::Cuda(0), DType::F16, 2).unwrap();
    for kept in [WeightType::from(DType::F16), WeightType::Int8] {
        let device = model.packed(&ctx, kept);
        let mut decoder = Decoder::new(&ctx, &device, 2).unwrap().unwrap();
        for inputs in [&[(0, 5)][..], &[(1, 7), (0, 9)], &[(0, 5)]] {
            let logits = decoder.step(inputs).unwrap().to_vec();
            assert!(logits.len() == 200 * inputs.len() && logits.iter().all(|v| v.is_nan()));
        }
    }
}

/// Rounding the states at every step, for 300 steps, moves the logits less than 16-bit activations do.
#[test]
#[ignore = "needs a GPU"]
fn states_in_f16_follow_those_in_f32() {
    let model = model(&config(64, 128, 1));
    for ((dtype, tolerance), batches) in TYPES.into_iter().zip([&[1, 5][..], &[5]]) {
        let ctx = Context::with_activations(Device::Cuda(0), dtype, 2).unwrap();
        let device = model.packed(&ctx, dtype);
        for &n in batches {
            let decoder = |kept| Decoder::with_states(&ctx, &device, n, kept).unwrap().unwrap();
            let (mut exact, mut rounded) = (decoder(DType::F32), decoder(DType::F16));
            let sequences: Vec<Vec<u32>> = (0..n).map(|i| sequence(i, 300)).collect();
            let mut worst: f64 = 0.0;
            for t in 0..300 {
                let inputs: Vec<(usize, u32)> = (0..n).map(|i| (i, sequences[i][t])).collect();
                worst = worst.max(error(rounded.step(&inputs).unwrap(), exact.step(&inputs).unwrap()));
            }
            println!("{dtype} B {n}: states in f16 move the logits by {worst:.1e} at most");
            assert!(worst > 0.0 && worst < tolerance, "{worst:.1e}");
            let (state, want) = (rounded.state(0).unwrap(), exact.state(0).unwrap());
            let apart = state.vars().zip(want.vars()).map(|(a, b)| error(&a.to_vec(), &b.to_vec()));
            assert!(apart.fold(0.0, f64::max) < tolerance);
            rounded.clear(0).unwrap();
            rounded.set_state(0, &state).unwrap();
            let again = rounded.state(0).unwrap();
            assert!(again.vars().zip(state.vars()).all(|(a, b)| a.to_vec() == b.to_vec()));
        }
    }
    let ctx = Context::with_activations(Device::Cuda(0), DType::F16, 2).unwrap();
    let device = model.packed(&ctx, DType::F16);
    assert!(Decoder::with_states(&ctx, &device, 1, DType::BF16).is_err());
}

#[test]
#[ignore = "needs a GPU"]
fn what_the_kernels_do_not_know_goes_operation_by_operation() {
    let plain = config(64, 128, 2);
    let doubled = model(&Config { double_rate: true, ..plain.clone() });
    let ctx = Context::with_activations(Device::Cuda(0), DType::F32, 2).unwrap();
    let device = doubled.packed(&ctx, DType::F32);
    assert!(Decoder::new(&ctx, &device, 1).unwrap().is_none());
    let control = model(&plain.control()).packed(&ctx, DType::F32);
    assert!(Decoder::new(&ctx, &control, 1).unwrap().is_none());
    let half = Context::with_activations(Device::Cuda(0), DType::F16, 2).unwrap();
    for (head_size, known) in [(32, false), (64, true)] {
        let other = model(&config(head_size, 128, 1)).packed(&half, DType::F16);
        assert!(Decoder::new(&half, &other, 1).unwrap().is_some() == known, "heads of {head_size}");
    }
    let tokens = sequence(0, 9);
    let mut session = Session::new(&ctx, &device);
    for t in &tokens {
        session.feed(&[*t]).unwrap();
    }
    let (want, _) = reference(&Context::cpu(2), &doubled, &tokens);
    assert!(error(session.logits().unwrap(), &want[8 * 200..]) < 2e-5);
    let (other, _) = reference(&Context::cpu(2), &model(&plain), &tokens);
    assert!(error(&other[8 * 200..], &want[8 * 200..]) > 1e-3, "the rate makes no difference");
    assert!(Session::new(&ctx, &control).feed(&tokens).unwrap_err().to_string().contains("no state"));
}
