//! The whole model against the float64 golden vectors: logits, states and every gradient.

use anser_eval::debug::{self, Mode, Named, Tokens};
use anser_formats::Checkpoint;
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

fn expected() -> Expected {
    let bytes = std::fs::read(fixture("rwkv7_expected.safetensors")).unwrap();
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
    let want = expected();
    let tokens = tokens(&want.tokens);
    for file in ["rwkv7.pth", "rwkv7.safetensors"] {
        let ckpt = Checkpoint::open(&fixture(file)).unwrap();
        for ctx in contexts() {
            for mode in [Mode::Parallel, Mode::Recurrent, Mode::Chunked(1), Mode::Chunked(16), Mode::Chunked(23)] {
                let got = debug::logits(&ctx, &ckpt, &tokens, mode).unwrap();
                assert_eq!(got.len(), 1 + 3 * 3);
                check(&got, &want.floats, str::to_string, 2e-5);
            }
        }
    }
}

#[test]
fn gradients_of_every_parameter() {
    let want = expected();
    let rows: Vec<Vec<i64>> =
        want.tokens.iter().zip(&want.targets).map(|(x, y)| [x.clone(), vec![*y.last().unwrap()]].concat()).collect();
    // The targets are the tokens one further on, or `debug grads` could not compute this.
    for (x, y) in want.tokens.iter().zip(&want.targets) {
        assert_eq!(x[1..], y[..y.len() - 1]);
    }
    let ckpt = Checkpoint::open(&fixture("rwkv7.pth")).unwrap();
    for ctx in contexts() {
        for l2wrap in [false, true] {
            let (loss, got) = debug::grads(&ctx, &ckpt, &tokens(&rows), l2wrap).unwrap();
            assert!((loss - 6.157841048945122).abs() < 1e-5, "loss {loss}");
            let prefix = if l2wrap { "grad_l2wrap." } else { "grad." };
            check(&got, &want.floats, |n| n.replace("grad.", prefix), 1e-4);
        }
    }
}
