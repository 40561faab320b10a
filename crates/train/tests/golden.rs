//! The 40-step AdamW trajectory of the float64 reference.

use anser_formats::Checkpoint;
use anser_model::{Load, Model};
use anser_tensor::Context;
use anser_train::{Hyper, Schedule, trajectory};
use safetensors::SafeTensors;
use std::path::PathBuf;

fn fixture(name: &str) -> PathBuf {
    // A test that is carried to another machine finds them there.
    let folder = std::env::var_os("ANSER_FIXTURES").map(PathBuf::from);
    folder.unwrap_or(concat!(env!("CARGO_MANIFEST_DIR"), "/../../fixtures").into()).join("golden").join(name)
}

#[test]
fn official_recipe_step_by_step() {
    let meta: serde_json::Value = serde_json::from_slice(&std::fs::read(fixture("meta.json")).unwrap()).unwrap();
    let meta = &meta["trajectory"];
    let number = |key: &str| meta[key].as_f64().unwrap();
    let list = |key: &str| meta[key].as_array().unwrap().iter().map(|v| v.as_f64().unwrap()).collect::<Vec<_>>();
    let bytes = std::fs::read(fixture("trajectory.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let tokens = file.tensor("tokens").unwrap();
    let [steps, b, t1] = tokens.shape()[..] else { panic!() };
    let size = tokens.data().len() / (steps * b * t1);
    let ids: Vec<u32> = tokens.data().chunks(size).map(|c| u32::from_le_bytes(c[..4].try_into().unwrap())).collect();
    let mut contexts = vec![Context::cpu(1), Context::cpu(2)];
    if let Ok(device) = std::env::var("ANSER_TEST_DEVICE") {
        contexts.push(Context::new(device.parse().unwrap(), 1).unwrap());
    }
    for ctx in contexts {
        let start = Checkpoint::open(&fixture(meta["start"].as_str().unwrap())).unwrap();
        let mut model = Model::load(&ctx, &start, Load::Train).unwrap();
        let schedule = Schedule {
            init: number("lr_init"),
            last: number("lr_final"),
            warmup: number("warmup_steps") as u64,
            total: steps as u64,
        };
        let hyper = Hyper {
            beta1: number("beta1"),
            beta2: number("beta2"),
            eps: number("adam_eps"),
            weight_decay: number("weight_decay"),
        };
        let got = trajectory(&ctx, &mut model, &ids, b, t1 - 1, schedule, hyper, number("grad_clip"), true).unwrap();
        for (key, got, tolerance) in
            [("losses", &got.losses, 2e-4), ("lrs", &got.lrs, 1e-15), ("grad_norms_before_clip", &got.grad_norms, 2e-3)]
        {
            let want = list(key);
            assert_eq!(want.len(), got.len());
            let worst = want.iter().zip(got).map(|(w, g)| (w - g).abs()).fold(0.0, f64::max);
            println!("{key}: {worst:.1e}");
            assert!(worst <= tolerance, "{key}: off by {worst}");
        }
        for s in model.params().specs() {
            let want = file.tensor(&format!("final.{}", s.name)).unwrap();
            let want = want.data().chunks(4).map(|c| f32::from_le_bytes(c.try_into().unwrap()) as f64);
            let (mut d, mut n) = (0.0, 0.0);
            for (g, w) in model.params().values()[s.range.clone()].iter().zip(want) {
                d += (*g as f64 - w).powi(2);
                n += w * w;
            }
            assert!((d / n).sqrt() < 1e-3, "final {}: {:.1e}", s.name, (d / n).sqrt());
        }
    }
}
