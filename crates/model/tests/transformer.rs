//! The control: causal, ragged, differentiable, written to files and refused where a recurrent model is needed.

use anser_formats::{Checkpoint, Dtype, Source, write_safetensors};
use anser_model::{Architecture, Config, Init, Load, Model, State};
use anser_ops::{CrossEntropy, Segment, Tape, batch};
use anser_tensor::{Context, DType};
use std::sync::Arc;

const V: usize = 40;

fn model(ctx: &Context) -> Model {
    let config = Config { head_size: 16, ..Config::new(2, 48, V) }.control();
    let mut model = Model::init(ctx, &config, Init::Current, 1).unwrap();
    // Nothing stays zero, so that every path carries signal.
    let mut s = 1u32;
    for v in model.params_mut().values_mut() {
        s = s.wrapping_mul(1664525).wrapping_add(1013904223);
        *v += ((s >> 8) as f32 / (1 << 23) as f32 - 1.0) * 0.2;
    }
    model
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

#[test]
fn a_row_depends_on_what_came_before_it_in_its_segment() {
    let ctx = Context::cpu(2);
    let m = model(&ctx);
    let tokens = ids(50);
    let whole = logits(&ctx, &m, &tokens, batch(1, 50, false));
    assert!(logits(&ctx, &m, &tokens[..33], batch(1, 33, false)) == whole[..33 * V]);
    assert!(logits(&ctx, &m, &tokens.repeat(2), batch(2, 50, false)) == whole.repeat(2));
    let mut other = tokens.clone();
    other[0] = (other[0] + 1) % V as u32;
    let changed = logits(&ctx, &m, &other, batch(1, 50, false));
    assert!(changed[49 * V..] != whole[49 * V..], "the last token sees the first");
    // Positions count: the same tokens in another order.
    other = tokens.clone();
    other.swap(3, 4);
    assert!(logits(&ctx, &m, &other, batch(1, 50, false))[49 * V..] != whole[49 * V..]);
}

#[test]
fn the_gradient_is_the_slope_of_the_loss() {
    let loss = |ctx: &Context, m: &Model, checkpointing: bool| {
        let mut grads = ctx.zeros_f32(m.params().values().len());
        let mut t = Tape::recording(ctx, m.params(), &mut grads);
        let state = State::zeros(ctx, m.config(), 0);
        let segments: Arc<[Segment]> = [(0, 11), (11, 1), (12, 20)]
            .map(|(start, len)| Segment { start, len, state_in: None, state_out: None })
            .into();
        let (hidden, _) = m.forward(&mut t, &ids(32), &segments, &state, checkpointing).unwrap();
        let targets: Vec<i32> = ids(33)[1..].iter().map(|&i| i as i32).collect();
        let loss = m.loss(&mut t, &hidden, &targets, None, CrossEntropy { divisor: 32.0, l2wrap: false }).loss();
        t.backward();
        (loss, grads.to_vec())
    };
    let (one, two) = (Context::cpu(1), Context::cpu(2));
    let m = model(&one);
    let (_, grads) = loss(&one, &m, false);
    assert!(loss(&two, &m, true).1 == grads, "checkpointing or threads change the gradient");
    for s in m.params().specs() {
        let g = &grads[s.range.clone()];
        let norm = g.iter().map(|g| (*g as f64).powi(2)).sum::<f64>().sqrt();
        assert!(norm > 0.0, "{} gets no gradient", s.name);
        // Along the gradient itself the slope is its norm.
        let step = 2e-2 / norm.max(1.0);
        let moved = |sign: f64| {
            let mut m = model(&one);
            for (v, g) in m.params_mut().values_mut()[s.range.clone()].iter_mut().zip(g) {
                *v += (sign * step * *g as f64 / norm) as f32;
            }
            loss(&one, &m, false).0
        };
        let slope = (moved(1.0) - moved(-1.0)) / (2.0 * step);
        assert!((slope / norm - 1.0).abs() < 2e-2, "{}: slope {slope}, norm {norm}", s.name);
    }
}

#[test]
fn files_say_what_they_hold_and_states_are_refused() {
    let ctx = Context::cpu(1);
    let m = model(&ctx);
    let values = m.params().values();
    let source =
        |s: &anser_model::ParamSpec| Source::new(s.name.as_str(), &s.shape, Dtype::F32, &values[s.range.clone()]);
    let tensors: Vec<Source<'_>> = m.params().specs().iter().map(source).collect();
    let path = std::env::temp_dir().join(format!("anser-transformer-{}.safetensors", std::process::id()));
    write_safetensors(&path, &tensors, &[m.config().description()].into()).unwrap();
    let file = Checkpoint::open(&path).unwrap();
    let want = logits(&ctx, &m, &ids(9), batch(1, 9, false));
    for load in [Load::Train, Load::Inference(DType::F32.into())] {
        let loaded = Model::load(&ctx, &file, load).unwrap();
        assert!(loaded.config().architecture == Architecture::Transformer && loaded.config() == m.config());
        let got = logits(&ctx, &loaded, &ids(9), batch(1, 9, false));
        assert!(got.iter().zip(&want).all(|(g, w)| (g - w).abs() < 1e-4), "{load:?}");
    }
    write_safetensors(&path, &tensors, &Default::default()).unwrap();
    let e = Model::load(&ctx, &Checkpoint::open(&path).unwrap(), Load::Train).err().unwrap().to_string();
    assert!(e.contains("not a RWKV-7 checkpoint"), "{e}");
    std::fs::remove_file(path).unwrap();

    let mut t = Tape::inference(&ctx, m.params());
    let state = State::zeros(&ctx, m.config(), 1);
    let e = m.forward(&mut t, &ids(4), &batch(1, 4, true).into(), &state, false).err().unwrap().to_string();
    assert!(e.contains("no state"), "{e}");
}
