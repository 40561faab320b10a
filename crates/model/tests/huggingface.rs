//! A folder written by the real flash-linear-attention and transformers packages (`tools/huggingface_fixture.py`) is the
//! same model as the official file with the same weights.

use anser_formats::{CONFIG_JSON, Checkpoint, Naming};
use anser_model::{Config, Load, Model, State};
use anser_ops::{Tape, batch};
use anser_tensor::{Context, DType};
use std::path::PathBuf;

fn fixture(name: &str) -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures")).join(name)
}

fn logits(ctx: &Context, path: &str, load: Load) -> Vec<f32> {
    let model = Model::load(ctx, &Checkpoint::open(&fixture(path)).unwrap(), load).unwrap();
    let tokens: Vec<u32> = (0..50).map(|i| i * i * 7 % 300).collect();
    let mut tape = Tape::inference(ctx, model.params());
    let state = State::zeros(ctx, model.config(), 0);
    let (hidden, _) = model.forward(&mut tape, &tokens, &batch(1, 50, false).into(), &state, false).unwrap();
    model.logits(&mut tape, &hidden).data().to_vec()
}

#[test]
fn loads_to_the_same_bits() {
    let ctx = Context::cpu(2);
    let folder = Checkpoint::open(&fixture("huggingface")).unwrap();
    assert_eq!(folder.naming(), Naming::HuggingFace);
    let official = Checkpoint::open(&fixture("golden/rwkv7_bf16.pth")).unwrap();
    assert_eq!(Config::from_checkpoint(&folder).unwrap(), Config::from_checkpoint(&official).unwrap());
    for load in [
        Load::Train,
        Load::Inference(DType::F32.into()),
        Load::Inference(DType::BF16.into()),
        Load::Inference(DType::F16.into()),
    ] {
        let (ours, theirs) = (logits(&ctx, "huggingface", load), logits(&ctx, "golden/rwkv7_bf16.pth", load));
        assert!(ours == theirs && ours.iter().all(|x| x.is_finite()), "{load:?}");
    }
}

#[test]
fn a_config_that_changes_the_result_is_refused() {
    let folder = std::env::temp_dir().join(format!("anser-hf-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    for name in std::fs::read_dir(fixture("huggingface")).unwrap() {
        let from = name.unwrap().path();
        std::fs::copy(&from, folder.join(from.file_name().unwrap())).unwrap();
    }
    let text = std::fs::read_to_string(folder.join(CONFIG_JSON)).unwrap();
    for (from, to, says) in [
        ("\"norm_eps\": 1e-05", "\"norm_eps\": 1e-06", "norm_eps"),
        ("\"model_type\": \"rwkv7\"", "\"model_type\": \"mamba2\"", "mamba2"),
        ("\"attn\": null", "\"attn\": {\"layers\": [1]}", "attention layers"),
        ("{", "", "config.json"),
    ] {
        assert!(text.contains(from));
        std::fs::write(folder.join(CONFIG_JSON), text.replacen(from, to, 1)).unwrap();
        let e = Config::from_checkpoint(&Checkpoint::open(&folder).unwrap()).unwrap_err().to_string();
        assert!(e.contains(says), "{e}");
    }
    std::fs::remove_dir_all(folder).unwrap();
}
