//! The whole model against the float64 golden vectors: logits, states and every gradient.

use anser_eval::debug::{self, Mode, Named, Tokens};
use anser_formats::Checkpoint;
use anser_model::{Config, Hybrid};
use anser_tensor::Context;
use safetensors::SafeTensors;
use std::collections::HashMap;
use std::path::PathBuf;

fn fixture(name: &str) -> PathBuf {
    // A test that is carried to another machine finds them there.
    let folder = std::env::var_os("ANSER_FIXTURES").map(PathBuf::from);
    folder.unwrap_or(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures").into()).join("golden").join(name)
}

struct Expected {
    floats: HashMap<String, Vec<f32>>,
    tokens: Vec<Vec<i64>>,
    targets: Vec<Vec<i64>>,
}

fn expected(file: &str) -> Expected {
    let bytes = std::fs::read(fixture(file)).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut floats = HashMap::new();
    let mut ints = HashMap::new();
    for (name, t) in file.tensors() {
        let words = t.data().chunks_exact(4).map(|b| [b[0], b[1], b[2], b[3]]);
        match t.dtype() {
            safetensors::Dtype::F32 => {
                floats.insert(name, words.map(f32::from_le_bytes).collect());
            }
            safetensors::Dtype::I64 => {
                let ids = t.data().chunks_exact(8).map(|b| i64::from_le_bytes(b.try_into().unwrap()));
                ints.insert(name, (t.shape()[1], ids.collect::<Vec<_>>()));
            }
            _ => {
                ints.insert(name, (t.shape()[1], words.map(|b| i32::from_le_bytes(b) as i64).collect()));
            }
        }
    }
    let rows = |name: &str| ints[name].1.chunks(ints[name].0).map(<[i64]>::to_vec).collect();
    Expected { floats, tokens: rows("tokens"), targets: rows("targets") }
}

impl Expected {
    /// Tokens with the last target, as `debug grads` takes them.
    fn rows(&self) -> Vec<Vec<i64>> {
        let row = |(x, y): (&Vec<i64>, &Vec<i64>)| {
            assert_eq!(x[1..], y[..y.len() - 1], "targets are the tokens one further on");
            [x.clone(), vec![*y.last().unwrap()]].concat()
        };
        self.tokens.iter().zip(&self.targets).map(row).collect()
    }
}

fn tokens(rows: &[Vec<i64>]) -> Tokens {
    Tokens::from_json(&serde_json::to_string(rows).unwrap()).unwrap()
}

/// Relative norm error.
fn error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let square = |v: f64| v * v;
    let d: f64 = got.iter().zip(want).map(|(g, w)| square(*g as f64 - *w as f64)).sum();
    (d / want.iter().map(|w| square(*w as f64)).sum::<f64>().max(1e-60)).sqrt()
}

fn check(got: &[Named], want: &HashMap<String, Vec<f32>>, rename: impl Fn(&str) -> String, tolerance: f64) {
    let mut worst = (0.0, String::new());
    for t in got {
        let name = rename(&t.name);
        let e = error(&t.data, want.get(&name).unwrap_or_else(|| panic!("{name} is not in the golden file")));
        assert!(e <= tolerance, "{}: relative error {e:.1e} > {tolerance:.0e}", t.name);
        if e > worst.0 {
            worst = (e, name);
        }
    }
    println!("worst of {}: {} {:.1e}", got.len(), worst.1, worst.0);
}

/// One and two CPU threads and, with ANSER_TEST_DEVICE, that device.
fn contexts() -> Vec<Context> {
    let mut all = vec![Context::cpu(1), Context::cpu(2)];
    if let Ok(device) = std::env::var("ANSER_TEST_DEVICE") {
        all.push(Context::new(device.parse().unwrap(), 1).unwrap());
    }
    all
}

#[test]
fn logits_and_states_in_every_mode() {
    let want = expected("rwkv7_expected.safetensors");
    let tokens = tokens(&want.tokens);
    for file in ["rwkv7.pth", "rwkv7.safetensors"] {
        let ckpt = Checkpoint::open(&fixture(file)).unwrap();
        for ctx in contexts() {
            for mode in [Mode::Parallel, Mode::Recurrent, Mode::Chunked(1), Mode::Chunked(16), Mode::Chunked(23)] {
                let config = Config::from_checkpoint(&ckpt).unwrap();
                let got = debug::logits(&ctx, &ckpt, config, &tokens, mode).unwrap();
                assert_eq!(got.len(), 1 + 3 * 3);
                check(&got, &want.floats, str::to_string, 2e-5);
            }
        }
    }
}

#[test]
fn gradients_of_every_parameter() {
    let want = expected("rwkv7_expected.safetensors");
    let rows = want.rows();
    let ckpt = Checkpoint::open(&fixture("rwkv7.pth")).unwrap();
    for ctx in contexts() {
        for l2wrap in [false, true] {
            let config = Config::from_checkpoint(&ckpt).unwrap();
            let (loss, got) = debug::grads(&ctx, &ckpt, config, &tokens(&rows), l2wrap).unwrap();
            assert!((loss - 6.157841048945122).abs() < 1e-5, "loss {loss}");
            let prefix = if l2wrap { "grad_l2wrap." } else { "grad." };
            check(&got, &want.floats, |n| n.replace("grad.", prefix), 1e-4);
        }
    }
}

/// The hybrid of the golden vectors, whose file doesn't say its chunks.
fn hybrid() -> (Checkpoint, Config) {
    let ckpt = Checkpoint::open(&fixture("rwkvx.pth")).unwrap();
    let config = Config::from_checkpoint(&ckpt).unwrap();
    assert_eq!((config.n_layer, config.hybrid), (4, Some(Hybrid::new(2))));
    let config = Config { hybrid: Some(Hybrid { chunk: 16, ..Hybrid::new(2) }), ..config };
    (ckpt, config)
}

#[test]
fn a_hybrid_in_every_mode() {
    let (ckpt, config) = hybrid();
    for file in ["rwkvx_sparse_expected.safetensors", "rwkvx_dense_expected.safetensors"] {
        let want = expected(file);
        let (tokens, len) = (tokens(&want.tokens), want.tokens[0].len());
        for ctx in contexts() {
            let read = |mode| debug::logits(&ctx, &ckpt, config.clone(), &tokens, mode).unwrap();
            let golden = |all: &[Named]| {
                let some: Vec<Named> = all.iter().filter(|t| !t.name.contains("moba")).cloned().collect();
                assert_eq!((some.len(), all.len()), (1 + 3 * 4, 1 + 3 * 4 + 3 * 2));
                check(&some, &want.floats, str::to_string, 2e-5);
            };
            let whole = read(Mode::Parallel);
            golden(&whole);
            for mode in [Mode::Recurrent, Mode::Chunked(16), Mode::Chunked(23), Mode::Chunked(len - 1)] {
                let cut = read(mode);
                // On the CPU any cut gives the same bits, also of what attention keeps.
                if ctx.cuda().is_none() {
                    assert!(cut == whole, "{file} {mode:?}");
                } else {
                    golden(&cut);
                }
            }
        }
    }
}

#[test]
fn gradients_of_a_hybrid() {
    let (ckpt, config) = hybrid();
    for (file, loss) in [
        ("rwkvx_sparse_expected.safetensors", 6.224993571182705),
        ("rwkvx_dense_expected.safetensors", 6.034151070462818),
    ] {
        let want = expected(file);
        for ctx in contexts() {
            let (got_loss, got) = debug::grads(&ctx, &ckpt, config.clone(), &tokens(&want.rows()), false).unwrap();
            assert!((got_loss - loss).abs() < 1e-5, "loss {got_loss}");
            assert_eq!(got.iter().filter(|t| t.name.starts_with("grad.moba.")).count(), 2 * 11);
            check(&got, &want.floats, str::to_string, 1e-4);
        }
    }
}
