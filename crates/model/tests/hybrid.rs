//! Hybrids: expansion as an identity, checkpoints that are not whole, what trains, and what a forecast knows.

use anser_formats::{Checkpoint, Dtype, Source, write_pth, write_safetensors};
use anser_model::{Config, Error, Expansion, Hybrid, Init, Load, Model, State};
use anser_ops::{CrossEntropy, Segment, Tape, batch};
use anser_tensor::{Context, DType};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

const V: usize = 40;

/// Nothing stays zero, so that every path carries signal.
fn stirred(ctx: &Context, config: &Config) -> Model {
    let mut model = Model::init(ctx, config, Init::Current, 1).unwrap();
    let mut s = 1u32;
    for v in model.params_mut().values_mut() {
        s = s.wrapping_mul(1664525).wrapping_add(1013904223);
        *v += ((s >> 8) as f32 / (1 << 23) as f32 - 1.0) * 0.2;
    }
    model
}

fn plain() -> Config {
    Config { head_size: 16, ..Config::new(5, 48, V) }
}

fn mixed(chunk: usize, topk: usize) -> Config {
    Config { hybrid: Some(Hybrid { chunk, topk, ..Hybrid::new(2) }), ..plain() }
}

fn ids(n: usize) -> Vec<u32> {
    (0..n).map(|i| ((i * 7919 + i * i * 31) % V) as u32).collect()
}

fn logits(ctx: &Context, m: &Model, tokens: &[u32], segments: Vec<Segment>) -> Vec<f32> {
    let mut t = Tape::inference(ctx, m.params());
    let state = State::zeros(ctx, m.config(), 0);
    let (hidden, _) = m.forward(&mut t, tokens, &segments.into(), &state, false).unwrap();
    m.logits(&mut t, &hidden).to_vec()
}

/// A file of its own for every test.
struct TempFile(PathBuf);

impl TempFile {
    fn new(name: &str) -> TempFile {
        TempFile(std::env::temp_dir().join(format!("anser-hybrid-{}-{name}", std::process::id())))
    }
}

impl Drop for TempFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn save(m: &Model, file: &TempFile) -> Checkpoint {
    let p = m.params();
    let source = |s: &anser_model::ParamSpec| Source::new(&s.name, &s.shape, Dtype::F32, &p.values()[s.range.clone()]);
    let sources: Vec<Source<'_>> = p.specs().iter().map(source).collect();
    let metadata = BTreeMap::from([m.config().description()]);
    write_safetensors(&file.0, &sources, &metadata).unwrap();
    Checkpoint::open(&file.0).unwrap()
}

#[test]
fn expansion_is_an_identity_unless_outputs_are_copied() {
    let ctx = Context::cpu(2);
    let (from, to) = (TempFile::new("plain.safetensors"), TempFile::new("expanded.pth"));
    let small = stirred(&ctx, &plain());
    let (tokens, whole) = (ids(60), batch(1, 60, false));
    let before = logits(&ctx, &small, &tokens, whole.clone());
    let file = save(&small, &from);
    let few = Hybrid { chunk: 8, topk: 2, ..Hybrid::new(2) };
    let gated = Hybrid { gate: true, ..few };
    let shared = Hybrid { key_heads: Some(1), ..few };
    let ways = [few, gated, shared].map(|h| (h, Expansion::Identity));
    for (hybrid, how) in ways.into_iter().chain([(few, Expansion::Copy)]) {
        let (config, sources) = hybrid.expand(&file, how).unwrap();
        assert_eq!(config, Config { hybrid: Some(hybrid), ..plain() });
        write_pth(&to.0, &sources).unwrap();
        let written = Checkpoint::open(&to.0).unwrap();
        let model = Model::load_as(&ctx, &written, config.clone(), Load::Train).unwrap();
        let after = logits(&ctx, &model, &tokens, whole.clone());
        let apart = before.iter().zip(&after).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        match how {
            Expansion::Identity => assert!(after == before),
            Expansion::Copy => assert!(apart > 0.1, "{apart}"),
        }
        // The first new block follows block 1, the second block 3.
        let values = |name: &str| written.get(name).unwrap().to_f32_vec().unwrap();
        let keys = values("rwkv.blocks.1.att.key.weight");
        match hybrid.key_heads {
            // The mean of three heads of 16.
            Some(_) => {
                let mean = |i: usize| (keys[i] + keys[16 * 48 + i] + keys[32 * 48 + i]) / 3.0;
                let same = |(i, k): (usize, &f32)| (k - mean(i)).abs() < 1e-6;
                assert!(values("moba.0.att.key.weight").iter().enumerate().all(same));
            }
            None => assert!(values("moba.0.att.key.weight") == keys),
        }
        assert!(values("moba.1.ffn.key.weight") == values("rwkv.blocks.3.ffn.key.weight"));
        assert!(values("moba.1.ln2.weight").iter().all(|&v| v == 1.0));
        // A .pth file doesn't say its chunks.
        let said = Hybrid { chunk: 2048, topk: 3, ..hybrid };
        assert_eq!(Config::from_checkpoint(&written).unwrap().hybrid, Some(said));
        let again = hybrid.expand(&written, how).err().unwrap().to_string();
        assert!(again.contains("RWKV-7 blocks alone"), "{again}");
    }
    assert!(Hybrid::new(0).expand(&file, Expansion::Identity).is_err());
    assert!(
        Hybrid::new(6).expand(&file, Expansion::Identity).err().unwrap().to_string().contains("6 attention blocks")
    );
}

#[test]
fn a_file_says_its_chunks_and_a_missing_tensor_is_named() {
    let ctx = Context::cpu(1);
    let file = TempFile::new("chunks.safetensors");
    let model = stirred(&ctx, &mixed(8, 2));
    let ckpt = save(&model, &file);
    let loaded = Model::load(&ctx, &ckpt, Load::Inference(DType::F32.into())).unwrap();
    assert_eq!((loaded.config(), loaded.fingerprint() == model.fingerprint()), (&mixed(8, 2), false));
    let (tokens, rows) = (ids(70), batch(2, 35, false));
    let (a, b) = (logits(&ctx, &loaded, &tokens, rows.clone()), logits(&ctx, &model, &tokens, rows.clone()));
    assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-4));
    // Other chunks are another model.
    for hybrid in [
        Hybrid { chunk: 8, topk: 1, ..Hybrid::new(2) },
        Hybrid { chunk: 8, topk: 2, sink: 1, ..Hybrid::new(2) },
        Hybrid { chunk: 8, topk: 2, window: 1, ..Hybrid::new(2) },
    ] {
        let config = Config { hybrid: Some(hybrid), ..plain() };
        let other = Model::load_as(&ctx, &ckpt, config.clone(), Load::Inference(DType::F32.into())).unwrap();
        assert!(other.fingerprint() != loaded.fingerprint());
        assert!(logits(&ctx, &other, &tokens, rows.clone()) != a);
        let said: serde_json::Value = serde_json::from_str(&config.description().1).unwrap();
        assert_eq!(serde_json::from_value::<Config>(said["model"].clone()).unwrap(), config);
    }
    let p = model.params();
    let some = |s: &&anser_model::ParamSpec| !s.name.starts_with("moba.1.att.value");
    let source = |s: &anser_model::ParamSpec| Source::new(&s.name, &s.shape, Dtype::F32, &p.values()[s.range.clone()]);
    drop((ckpt, loaded));
    write_pth(&file.0, &p.specs().iter().filter(some).map(source).collect::<Vec<_>>()).unwrap();
    let e = Model::load(&ctx, &Checkpoint::open(&file.0).unwrap(), Load::Train).err().unwrap().to_string();
    assert!(e.contains("moba.1.att.value.weight is missing"), "{e}");
}

#[test]
fn models_that_differ_in_an_option_are_told_apart() {
    // Their vectors are the same, and matrices are packed: a state of one must not go on with another.
    let ctx = Context::cpu(1);
    let few = Hybrid { chunk: 8, topk: 4, ..Hybrid::new(2) };
    let all = [
        few,
        Hybrid { sink: 1, ..few },
        Hybrid { window: 1, ..few },
        Hybrid { gate: true, ..few },
        Hybrid { key_heads: Some(1), ..few },
    ];
    let mut prints = all.map(|hybrid| {
        let config = Config { hybrid: Some(hybrid), ..plain() };
        Model::init(&ctx, &config, Init::Current, 1).unwrap().packed(&ctx, DType::F32).fingerprint()
    });
    prints.sort();
    assert!(prints.windows(2).all(|p| p[0] != p[1]), "{prints:?}");
}

/// For parameters whose names begin with one of `parts`, besides others.
fn the_gradient_is_the_slope(config: &Config, parts: &[&str]) {
    let loss = |ctx: &Context, m: &Model, checkpointing: bool| {
        let mut grads = ctx.zeros_f32(m.params().values().len());
        let mut t = Tape::recording(ctx, m.params(), &mut grads);
        // Packed documents: attention and states begin anew at each.
        let segments: Arc<[Segment]> = [(0, 11), (11, 1), (12, 38)]
            .map(|(start, len)| Segment { start, len, state_in: None, state_out: None })
            .into();
        let state = State::zeros(ctx, m.config(), 0);
        let (hidden, _) = m.forward(&mut t, &ids(50), &segments, &state, checkpointing).unwrap();
        let targets: Vec<i32> = ids(51)[1..].iter().map(|&t| t as i32).collect();
        let loss = m.loss(&mut t, &hidden, &targets, None, CrossEntropy { divisor: 50.0, l2wrap: false });
        t.backward();
        (loss.loss(), grads.to_vec())
    };
    let ctx = Context::cpu(2);
    let mut m = stirred(&ctx, config);
    let (_, gradient) = loss(&ctx, &m, false);
    assert!(loss(&ctx, &m, true).1 == gradient, "a block made again gives the same bits");
    assert!(loss(&Context::cpu(3), &m, false).1 == gradient);
    let always =
        ["moba.0.att.receptance", "moba.0.att.key", "moba.1.att.value", "moba.1.ffn.x_k", "rwkv.blocks.0.att.key"];
    for part in always.iter().chain(parts) {
        let s = m.params().specs().iter().find(|s| s.name.starts_with(part)).unwrap().range.clone();
        let norm = gradient[s.clone()].iter().map(|g| f64::from(*g).powi(2)).sum::<f64>().sqrt();
        let start = m.params().values()[s.clone()].to_vec();
        // Along the gradient, where the slope is its norm; the chunks chosen do not change on so short a way.
        let mut at = |h: f64| {
            for (i, v) in m.params_mut().values_mut()[s.clone()].iter_mut().enumerate() {
                *v = start[i] + (h * f64::from(gradient[s.start + i]) / norm) as f32;
            }
            loss(&ctx, &m, false).0
        };
        let slope = (at(3e-3) - at(-3e-3)) / 6e-3;
        at(0.0);
        assert!((slope - norm).abs() < 3e-3 * norm.max(0.05), "{part}: {slope}, not {norm}");
    }
}

#[test]
fn the_gradient_is_the_slope_of_the_loss() {
    the_gradient_is_the_slope(&mixed(5, 2), &[]);
    let all = Hybrid { chunk: 5, topk: 3, sink: 1, window: 1, gate: true, key_heads: Some(1), ..Hybrid::new(2) };
    the_gradient_is_the_slope(&Config { hybrid: Some(all), ..plain() }, &["moba.0.att.gate", "moba.1.att.key"]);
}

#[test]
fn a_hybrid_does_not_train_in_pieces() {
    let ctx = Context::cpu(1);
    let m = stirred(&ctx, &mixed(8, 2));
    let mut grads = ctx.zeros_f32(m.params().values().len());
    let mut t = Tape::recording(&ctx, m.params(), &mut grads);
    let e = m.forward(&mut t, &ids(4), &batch(1, 4, true).into(), &State::zeros(&ctx, m.config(), 1), false);
    assert!(matches!(e.err(), Some(Error::Pieces)));
}

#[test]
fn memory_of_the_past_is_as_forecast() {
    let (real, dry) = (Context::cpu(1), Context::forecast());
    let m = stirred(&real, &mixed(8, 2));
    let memory = |ctx: &Context| {
        let before = ctx.memory().in_use;
        let mut state = State::zeros(ctx, m.config(), 1);
        for _ in 0..5 {
            let mut t = Tape::inference(ctx, m.params());
            (_, state) = m.forward(&mut t, &ids(7), &batch(1, 7, true).into(), &state, false).unwrap();
        }
        (ctx.memory().in_use - before, state.attention[1].pasts[0].bytes(), state.attention[1].pasts[0].len())
    };
    let (used, past, len) = memory(&real);
    assert_eq!((used, past, len), memory(&dry));
    // Room for 64 tokens and 4 full chunks.
    assert_eq!((past, len), ((2 * 64 + 4) * 48 * 4, 35));
}
