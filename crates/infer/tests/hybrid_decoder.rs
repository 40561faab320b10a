//! The decoding step of hybrids on a GPU against the model's own forward pass: logits, states, what attention keeps.
//!
//! Needs a GPU (or the emulator): `cargo test -p anser-infer --test hybrid_decoder -- --ignored`.

use anser_infer::{Decoder, Session};
use anser_model::{Cache, Config, Eviction, Hybrid, Init, Model, State};
use anser_ops::{Tape, batch};
use anser_tensor::{Context, DType, Device};

fn error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let d: f64 = got.iter().zip(want).map(|(g, w)| (*g as f64 - *w as f64).powi(2)).sum();
    let n: f64 = want.iter().map(|w| (*w as f64).powi(2)).sum();
    (d / n.max(1e-30)).sqrt()
}

/// A hybrid in which everything has a part: no zeros where initialisation has them.
fn model(head_size: usize, n_embd: usize, hybrid: Hybrid) -> Model {
    let config = Config { head_size, hybrid: Some(hybrid), ..Config::new(hybrid.layers.max(2), n_embd, 200) };
    let mut model = Model::init(&Context::cpu(2), &config, Init::Current, 3).unwrap();
    let mut s = 1u32;
    for v in model.params_mut().values_mut() {
        s = s.wrapping_mul(1664525).wrapping_add(1013904223);
        *v += 0.05 * ((s >> 8) as f32 / (1 << 23) as f32 - 1.0);
    }
    model
}

fn sequence(i: usize, len: usize) -> Vec<u32> {
    (0..len).map(|t| ((t * t * 7 + t * 37 + i * 11 + 5) % 200) as u32).collect()
}

/// A state of one slot with a bound.
fn empty(ctx: &Context, model: &Model, cache: Option<Cache>) -> State {
    State { cache, ..State::zeros(ctx, model.config(), 1) }
}

/// Logits after each of the tokens, and the state, by the forward pass in pieces of `piece` tokens or as many as fit.
fn forward(ctx: &Context, model: &Model, state: &State, tokens: &[u32], piece: usize) -> (Vec<f32>, State) {
    let (mut state, mut logits, mut rest) = (state.clone(), Vec::new(), tokens);
    while !rest.is_empty() {
        let (now, after) = rest.split_at(rest.len().min(state.room(0)).min(piece));
        let mut tape = Tape::inference(ctx, model.params());
        let segments = batch(1, now.len(), true).into();
        let (hidden, next) = model.forward(&mut tape, now, &segments, &state, false).unwrap();
        logits.extend(model.logits(&mut tape, &hidden).to_vec());
        (state, rest) = (next, after);
    }
    (logits, state)
}

const TYPES: [(DType, f64); 2] = [(DType::F16, 2e-3), (DType::BF16, 1.6e-2)];

/// All that a state is, as numbers: matrices, then what attention keeps of every block.
fn all(state: &State) -> Vec<Vec<f32>> {
    let pasts = state.attention.iter().flat_map(|a| a.pasts[0].to_vecs());
    state.vars().map(|v| v.to_vec()).chain(pasts).collect()
}

/// Steps of `n` sequences after prompts of some tokens against the forward pass over the same tokens on the device, from the same state. Where chunks are chosen, scores that
/// are equal up to rounding may tip a choice: a step in thirty may be farther off then.
fn check(dtype: DType, tolerance: f64, model: &Model, cache: Option<Cache>, n: usize, [read, steps]: [usize; 2]) {
    let ctx = Context::with_activations(Device::Cuda(0), dtype, 2).unwrap();
    let device = model.packed(&ctx, dtype);
    let vocab = model.config().vocab_size;
    let mut decoder = Decoder::new(&ctx, &device, n + 1).unwrap().expect("the kernels know hybrids");
    let slot = |i: usize| (i * 3 + 1) % (n + 1);
    let slots: Vec<usize> = if n % 3 == 2 { (1..=n).collect() } else { (0..n).map(slot).collect() };
    // Of different lengths.
    let lengths: Vec<usize> = (0..n).map(|i| read + i * 5 % 13).collect();
    let sequences: Vec<Vec<u32>> = (0..n).map(|i| sequence(i, lengths[i] + steps)).collect();
    let mut before = Vec::new();
    for i in 0..n {
        decoder.set_state(slots[i], &empty(&ctx, &device, cache)).unwrap();
        if lengths[i] > 0 {
            decoder.prefill(slots[i], &sequences[i][..lengths[i]]).unwrap();
        }
        before.push(decoder.state(slots[i]).unwrap());
    }
    let mut got = vec![Vec::new(); n];
    for t in 0..steps {
        let inputs: Vec<(usize, u32)> = (0..n).map(|i| (slots[i], sequences[i][lengths[i] + t])).collect();
        let logits = decoder.step(&inputs).unwrap();
        logits.chunks(vocab).zip(&mut got).for_each(|(l, g)| g.extend_from_slice(l));
    }
    let (mut worst, mut tipped, mut off): (f64, usize, f64) = (0.0, 0, 0.0);
    for i in 0..n {
        let (logits, state) = forward(&ctx, &device, &before[i], &sequences[i][lengths[i]..], usize::MAX);
        for (a, b) in got[i].chunks(vocab).zip(logits.chunks(vocab)) {
            let error = error(a, b);
            if error < tolerance { worst = worst.max(error) } else { tipped += 1 }
        }
        let mine = decoder.state(slots[i]).unwrap();
        for (a, b) in mine.attention.iter().zip(&state.attention) {
            assert_eq!(a.pasts[0].len(), b.pasts[0].len());
        }
        for (a, b) in all(&mine).iter().zip(&all(&state)) {
            off = off.max(error(a, b));
        }
    }
    let config = model.config();
    let Hybrid { chunk, topk, .. } = config.hybrid.unwrap();
    let chooses = chunk.saturating_mul(topk) < read + 13 + steps;
    println!(
        "C {} N {} {dtype} B {n}, {:?}, {cache:?}, {read} + {steps}: from operation by operation {worst:.1e}, {tipped} steps tipped, states {off:.1e}",
        config.n_embd, config.head_size, config.hybrid
    );
    assert!(tipped <= if chooses { (n * steps / 30).max(1) } else { 0 }, "{tipped} steps of {}", n * steps);
    assert!(off < tolerance, "{off:.1e}");
}

fn hybrid(layers: usize, chunk: usize, topk: usize) -> Hybrid {
    Hybrid { chunk, topk, ..Hybrid::new(layers) }
}

#[test]
#[ignore = "needs a GPU"]
fn steps_equal_the_forward_pass() {
    for (dtype, tolerance) in TYPES {
        check(dtype, tolerance, &model(64, 128, hybrid(2, 16, 3)), None, 2, [50, 40]);
    }
    let (dtype, tolerance) = TYPES[0];
    check(dtype, tolerance, &model(64, 128, hybrid(1, 5, 4)), None, 1, [0, 60]);
    check(dtype, tolerance, &model(64, 192, hybrid(1, 24, 2)), None, 3, [40, 30]);
    check(dtype, tolerance, &model(64, 64, hybrid(1, 7, 20)), None, 4, [130, 20]);
    check(dtype, tolerance, &model(128, 256, hybrid(1, 40, 3)), None, 4, [170, 20]);
    // Own chunk alone, dense attention, and chunks that are shared among blocks.
    check(dtype, tolerance, &model(64, 128, hybrid(1, 8, 1)), None, 1, [20, 20]);
    check(dtype, tolerance, &model(64, 128, hybrid(1, usize::MAX, 1)), None, 1, [300, 20]);
    check(dtype, tolerance, &model(64, 64, hybrid(1, 1, 9)), None, 1, [600, 5]);
    // Chunks that are always seen, also where blocks share the choice.
    let always = Hybrid { sink: 1, window: 2, ..hybrid(2, 8, 5) };
    check(dtype, tolerance, &model(64, 128, always), None, 2, [90, 20]);
    check(dtype, tolerance, &model(64, 64, Hybrid { sink: 2, window: 3, ..hybrid(1, 1, 9) }), None, 1, [600, 5]);
    // A gate for each head, of few sequences and of more, with an odd number of heads, too.
    let gated = |h: Hybrid| Hybrid { gate: true, ..h };
    check(dtype, tolerance, &model(64, 128, gated(hybrid(2, 16, 3))), None, 2, [50, 20]);
    check(dtype, tolerance, &model(64, 64, gated(hybrid(1, 24, 2))), None, 3, [40, 10]);
    check(dtype, tolerance, &model(64, 192, gated(hybrid(1, 16, 8))), None, 6, [50, 10]);
    // Heads that share keys.
    let shared = |key_heads, h: Hybrid| Hybrid { key_heads: Some(key_heads), ..h };
    check(dtype, tolerance, &model(64, 128, shared(1, hybrid(2, 16, 3))), None, 2, [50, 20]);
    check(dtype, tolerance, &model(64, 256, gated(shared(2, hybrid(1, 8, 4)))), None, 3, [40, 10]);
    check(dtype, tolerance, &model(64, 192, shared(1, hybrid(1, 16, 8))), None, 6, [50, 10]);
    // More sequences than the kernels for few serve; with every chunk seen, too.
    check(dtype, tolerance, &model(64, 128, hybrid(2, 16, 8)), None, 6, [50, 20]);
    check(dtype, tolerance, &model(64, 128, hybrid(2, 16, 3)), None, 6, [50, 20]);
}

/// The past is given up after the same tokens and by the same rule, and what is kept for it is part of the state.
#[test]
#[ignore = "needs a GPU"]
fn a_full_cache_is_thinned_as_elsewhere() {
    let (dtype, tolerance) = TYPES[0];
    let plain = hybrid(1, 8, 3);
    let always = Hybrid { sink: 1, window: 1, ..hybrid(1, 8, 4) };
    let shared = Hybrid { key_heads: Some(1), ..plain };
    // Sequences in which every choice of chunks is clear: what is chosen last and what comes next are 1.3% of the greatest score apart or more (of the CPU, in f32), some
    // ten times what 16 bits round. In most sequences one of some 130 choices is closer than that.
    let cases = [
        (plain, Eviction::Recent, 36),
        (plain, Eviction::Attention, 30),
        (plain, Eviction::Error, 8),
        (always, Eviction::Recent, 77),
        (shared, Eviction::Attention, 144),
        (shared, Eviction::Error, 37),
    ];
    for (hybrid, by, number) in cases {
        for whole_chunks in [true, false] {
            let model = model(64, 128, hybrid);
            let cache = Some(Cache { window: 16, ..Cache::new(64, by, whole_chunks) });
            let ctx = Context::with_activations(Device::Cuda(0), dtype, 2).unwrap();
            let device = model.packed(&ctx, dtype);
            let tokens = sequence(number, 90);
            let mut decoder = Decoder::new(&ctx, &device, 1).unwrap().unwrap();
            decoder.set_state(0, &empty(&ctx, &device, cache)).unwrap();
            let mut state = empty(&ctx, &device, cache);
            let (mut worst, mut before): (f64, usize) = (0.0, 0);
            for t in tokens {
                // From the same state every time: what it keeps was chosen by the decoder.
                let (logits, next) = forward(&ctx, &device, &state, &[t], 1);
                worst = worst.max(error(decoder.step(&[(0, t)]).unwrap(), &logits));
                state = decoder.state(0).unwrap();
                let (kept, other) = (&state.attention[0].pasts[0], &next.attention[0].pasts[0]);
                assert_eq!((kept.len(), kept.to_vecs().len()), (other.len(), other.to_vecs().len()));
                assert!(kept.len() < 64);
                let thinned = kept.len() < before;
                before = kept.len();
                // Of single tokens two may be about as good, so that another one goes.
                let (mut mine, mut other) = (all(&state), all(&next));
                if thinned && !whole_chunks {
                    [&mut mine, &mut other].into_iter().for_each(|all| all.truncate(state.vars().count()));
                }
                worst = mine.iter().zip(&other).map(|(a, b)| error(a, b)).fold(worst, f64::max);
            }
            println!("{by:?}, whole chunks {whole_chunks}: {worst:.1e}");
            assert!(worst < tolerance, "{worst:.1e}");
        }
    }
}

#[test]
#[ignore = "needs a GPU"]
fn states_go_in_and_out_and_through_files() {
    let model = model(64, 128, hybrid(2, 8, 3));
    let bound = Cache::new(64, Eviction::Error, true);
    let cache = Some(bound);
    let ctx = Context::with_activations(Device::Cuda(0), DType::F16, 2).unwrap();
    let device = model.packed(&ctx, DType::F16);
    let tokens = sequence(0, 120);
    let mut decoder = Decoder::new(&ctx, &device, 4).unwrap().unwrap();
    let begin = empty(&ctx, &device, cache);
    (0..4).for_each(|slot| decoder.set_state(slot, &begin).unwrap());
    for &t in &tokens[..60] {
        decoder.step(&[(2, t)]).unwrap();
    }
    let middle = decoder.state(2).unwrap();
    let kept = all(&middle);
    let mut alone = Vec::new();
    for &t in &tokens[60..] {
        alone.extend_from_slice(decoder.step(&[(2, t)]).unwrap());
    }
    let end = all(&decoder.state(2).unwrap());
    // What was taken out stayed as it was, and goes on alike in any slot and company: the same bits.
    assert!(all(&middle) == kept);
    for neighbours in [0, 1, 3] {
        let slot = 3 - neighbours;
        (0..4).for_each(|slot| decoder.set_state(slot, &begin).unwrap());
        decoder.set_state(slot, &middle).unwrap();
        let mut again = Vec::new();
        for &t in &tokens[60..] {
            let mut inputs: Vec<(usize, u32)> = (slot + 1..=slot + neighbours).map(|s| (s, t / 2 + s as u32)).collect();
            inputs.push((slot, t));
            again.extend_from_slice(&decoder.step(&inputs).unwrap()[neighbours * 200..]);
        }
        assert!(again == alone, "{neighbours} neighbours change the result");
        assert!(all(&decoder.state(slot).unwrap()) == end);
    }
    assert!(all(&middle) == kept);
    // Without the host in between.
    decoder.set_state(0, &middle).unwrap();
    let last = decoder.greedy(&[(0, tokens[60])], 9).unwrap()[0];
    decoder.set_state(0, &middle).unwrap();
    let mut token = tokens[60];
    for _ in 0..9 {
        token = decoder.greedy(&[(0, token)], 1).unwrap()[0];
    }
    assert_eq!(token, last);
    // A session goes through the same steps, and so does one that was saved in the middle; a long text comes between.
    let mut session = Session::new(&ctx, &device).bounded(bound).unwrap();
    tokens[..60].iter().for_each(|&t| session.feed(&[t]).unwrap());
    assert_eq!(session.cached(), middle.attention[0].pasts[0].len());
    let path = std::env::temp_dir().join(format!("anser-hybrid-state-{}.safetensors", std::process::id()));
    session.save(&path).unwrap();
    let mut fork = session.fork();
    let mut loaded = Session::load(&ctx, &device, &path).unwrap();
    std::fs::remove_file(path).unwrap();
    for &t in &tokens[60..] {
        [&mut session, &mut fork, &mut loaded].into_iter().for_each(|s| s.feed(&[t]).unwrap());
    }
    assert!(session.logits().unwrap() == &alone[alone.len() - 200..]);
    assert!(fork.logits().unwrap() == session.logits().unwrap());
    assert!(loaded.logits().unwrap() == session.logits().unwrap());
    let mut other = session.fork();
    session.feed(&tokens[..50]).unwrap();
    tokens[..50].iter().for_each(|&t| other.feed(&[t]).unwrap());
    assert_eq!(session.cached(), other.cached());
    assert!(error(session.logits().unwrap(), other.logits().unwrap()) < 5e-3);
}

/// In an engine's slots, with a bound that is reached again and again: what a session alone gives, from cached prefixes, too.
#[test]
#[ignore = "needs a GPU"]
fn an_engine_decodes_hybrids_in_slots() {
    use anser_infer::engine::{Engine, EngineOptions, Event, Request, Stream};
    use anser_infer::{Sampler, Sampling};
    let ctx = Context::with_activations(Device::Cuda(0), DType::F16, 2).unwrap();
    let device = std::sync::Arc::new(model(64, 64, hybrid(1, 8, 3)).packed(&ctx, DType::F16));
    let bound = Cache::new(64, Eviction::Error, true);
    let options = EngineOptions { slots: 3, stride: 0, bound: Some(bound), ..EngineOptions::default() };
    let engine = Engine::start(ctx.clone(), device.clone(), options).unwrap();
    let sampling = Sampling { temperature: 0.0, ..Sampling::default() };
    let go = |prompt: &[u32], max_tokens: usize| {
        let request = Request { prompt: prompt.to_vec(), max_tokens, sampling: sampling.clone(), ..Request::default() };
        engine.submit(Request { owner: "a".into(), ..request }).unwrap()
    };
    let answer = |mut stream: Stream| {
        let (mut tokens, mut cached) = (Vec::new(), 0);
        while let Some(event) = stream.recv() {
            match event {
                Event::Prompt { cached: c, .. } => cached = c,
                Event::Token(t) => tokens.push(t.token),
                Event::State(_) | Event::End(_) => {}
            }
        }
        (tokens, cached)
    };
    let alone = |prompt: &[u32], count: usize| {
        let mut session = Session::new(&ctx, &device).bounded(bound).unwrap();
        session.feed(prompt).unwrap();
        let mut sampler = Sampler::new(sampling.clone()).unwrap();
        let mut tokens = Vec::new();
        for _ in 0..count {
            tokens.push(sampler.sample(session.logits().unwrap()).unwrap());
            session.feed(&tokens[tokens.len() - 1..]).unwrap();
        }
        tokens
    };
    let prompts: Vec<Vec<u32>> = (0..5).map(|i| sequence(i, 30 + 17 * i)).collect();
    let streams: Vec<Stream> = prompts.iter().enumerate().map(|(i, p)| go(p, 20 + 9 * i)).collect();
    let answers: Vec<_> = streams.into_iter().map(answer).collect();
    for (i, (prompt, (tokens, _))) in prompts.iter().zip(&answers).enumerate() {
        assert_eq!(tokens, &alone(prompt, 20 + 9 * i), "{i}");
    }
    let (text, last) = answers[3].0.split_at(30);
    let (tokens, cached) = answer(go(&[&prompts[3][..], text].concat(), last.len()));
    assert!(cached >= prompts[3].len(), "{cached}");
    assert_eq!(tokens, last);
}
