use crate::{AdamW, GradNorm, Hyper, Schedule};
use anser_model::{Error, Model, State};
use anser_ops::{CrossEntropy, Segment, Tape, batch};
use anser_tensor::Context;
use std::sync::Arc;

/// What [`trajectory`] found, one number a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Trajectory {
    /// Mean cross entropy before the step.
    pub losses: Vec<f64>,
    /// Learning rate of the 1x groups.
    pub lrs: Vec<f64>,
    /// Gradient norm before clipping, with the L2Wrap part.
    pub grad_norms: Vec<f64>,
}

/// Trains `model` on given batches, `tokens` [steps, b, t + 1], each row from a fresh state: what `anser debug trajectory` shows.
///
/// # Errors
/// When a token is outside the vocabulary.
pub fn trajectory(
    ctx: &Context, model: &mut Model, tokens: &[u32], b: usize, t: usize, schedule: Schedule, hyper: Hyper,
    grad_clip: f64, l2wrap: bool,
) -> Result<Trajectory, Error> {
    let vocab = model.config().vocab_size;
    if let Some(position) = tokens.iter().position(|&t| t as usize >= vocab) {
        return Err(Error::Token { token: tokens[position], position, vocab });
    }
    let mut out = Trajectory::default();
    model.params_mut().to_device(ctx);
    let mut grads = ctx.zeros_f32(model.params().values().len());
    let mut adam = AdamW::new(ctx, grads.len());
    let segments: Arc<[Segment]> = batch(b, t, false).into();
    for (step, rows) in tokens.chunks_exact(b * (t + 1)).enumerate() {
        let inputs: Vec<u32> = rows.chunks(t + 1).flat_map(|r| &r[..t]).copied().collect();
        let targets: Vec<i32> = rows.chunks(t + 1).flat_map(|r| &r[1..]).map(|&i| i as i32).collect();
        grads.clear();
        let mut tape = Tape::recording(ctx, model.params(), &mut grads);
        let state = State::zeros(ctx, model.config(), 0);
        let (hidden, _) = model.forward(&mut tape, &inputs, &segments, &state, false)?;
        let loss = model.loss(&mut tape, &hidden, &targets, None, CrossEntropy { divisor: (b * t) as f64, l2wrap });
        tape.backward();
        let norm = GradNorm::new(ctx, model.params(), &grads, grad_clip);
        let lr = schedule.at(step as u64);
        adam.step(ctx, model.params_mut(), &grads, hyper, lr, &norm);
        out.losses.push(loss.loss());
        out.lrs.push(lr);
        out.grad_norms.push(norm.norm());
    }
    model.params_mut().to_host();
    Ok(out)
}
