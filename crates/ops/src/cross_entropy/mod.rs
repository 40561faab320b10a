//! Output head and cross entropy in one operation, over chunks of rows: the whole [tokens, V] matrix of logits never exists. Where
//! many targets are ignored, as where answers alone are learnt, only the rows that count reach the head.
//!
//! loss = sum_i weight_i (logsumexp(z_i) - `z_i[target_i]`) / divisor, with z = x W^T, over rows whose target is not ignored.
//! dz_i = (weight_i (softmax(z_i) - onehot) + `[L2Wrap]` 1e-4 max(z_i) onehot(argmax z_i)) / divisor.
//! L2Wrap (official trainer) pulls the largest logit towards 0; it changes gradients only. Of equal logits the first counts.
//! The gradients are made at once, in the forward pass: this operation is the root. A loss that is not finite makes its gradients NaN, so
//! that whoever looks at the gradients has seen the loss.

use crate::linear::Weight;
use crate::{Tape, Var};
use anser_tensor::{Buf, DisjointMut, math, simd::vectorize};

mod cuda;
#[cfg(test)]
mod tests;

/// Options of [`Tape::cross_entropy`].
#[derive(Clone, Copy, Debug)]
pub struct CrossEntropy {
    /// What the sum is divided by: the number of targets that are not ignored in the global batch.
    pub divisor: f64,
    /// Whether the gradient has the L2Wrap term.
    pub l2wrap: bool,
}

/// The loss and what it is made of. On a GPU it stays there until it is asked for, so that work goes on meanwhile.
pub struct Loss {
    place: Place,
    /// If only some rows went through the head: which, and how many there are.
    some: Option<(Vec<u32>, usize)>,
}

enum Place {
    Host {
        loss: f64,
        per_token: Vec<f32>,
        divisor: f64,
    },
    /// `total` is one f64, not yet divided.
    Device {
        total: Buf,
        per_token: Buf,
        divisor: f64,
    },
}

impl Loss {
    /// sum of weight x loss over the divisor; waits for the device. 0 in a forecast.
    pub fn loss(&self) -> f64 {
        match &self.place {
            Place::Host { loss, .. } => *loss,
            Place::Device { total, divisor, .. } => total.to_f64().first().map_or(0.0, |t| t / divisor),
        }
    }

    /// The same with all weights 1: the mean cross entropy, which tells how good a model is whatever it is trained for. Waits for the device.
    pub fn unweighted(&self) -> f64 {
        let (Place::Host { divisor, .. } | Place::Device { divisor, .. }) = &self.place;
        self.per_token().iter().map(|&l| l as f64).sum::<f64>() / divisor
    }

    /// Negative log-likelihood of each row in nats, unweighted; 0 for ignored rows. Waits for the device.
    pub fn per_token(&self) -> Vec<f32> {
        let computed = match &self.place {
            Place::Host { per_token, .. } => per_token.clone(),
            Place::Device { per_token, .. } => per_token.to_vec(),
        };
        let Some((rows, all)) = &self.some else { return computed };
        let mut each = vec![0.0; *all];
        rows.iter().zip(computed).for_each(|(&row, loss)| each[row as usize] = loss);
        each
    }
}

/// The rows whose target counts, if leaving out the others pays.
fn some(targets: &[i32]) -> Option<Vec<u32>> {
    let rows: Vec<u32> = (0..targets.len() as u32).filter(|&i| targets[i as usize] >= 0).collect();
    (!rows.is_empty() && room(rows.len(), targets.len()) * 4 <= targets.len() * 3).then_some(rows)
}

/// Rows that are computed where `count` of `all` count: as few different numbers as memory and plans of products are kept for.
fn room(count: usize, all: usize) -> usize {
    count.next_multiple_of(all.div_ceil(16).max(1))
}

/// Logits held at a time: 4 Mi, 16 MiB.
const CHUNK: usize = 1 << 22;
const L2WRAP: f64 = 1e-4;

/// The largest logit of a row and the sum of exp(z - largest), in sixteen partial sums: vectorised, and in a fixed order.
#[inline(always)]
fn max_and_sum(z: &[f32]) -> (f32, f64) {
    let mut max = f32::NEG_INFINITY;
    for &v in z.iter() {
        max = if v > max { v } else { max };
    }
    let mut parts = [0f32; 16];
    let chunks = z.chunks_exact(16);
    let rest: f32 = chunks.remainder().iter().map(|&v| math::exp(v - max)).sum();
    for c in chunks {
        for (p, &v) in parts.iter_mut().zip(c) {
            *p += math::exp(v - max);
        }
    }
    (max, parts.iter().map(|&p| p as f64).sum::<f64>() + rest as f64)
}

/// log(sum(exp(z))): the log probability of a token is its logit less this, by the arithmetic of [`Tape::cross_entropy`].
pub fn log_sum_exp(z: &[f32]) -> f64 {
    vectorize(
        #[inline(always)]
        || {
            let (max, sum) = max_and_sum(z);
            max as f64 + sum.ln()
        },
    )
}

/// Loss of one row and, with `grad`, its gradient in place of the logits.
fn row(z: &mut [f32], target: usize, weight: f64, opts: CrossEntropy, grad: bool) -> f32 {
    vectorize(
        #[inline(always)]
        || {
            let (max, sum) = max_and_sum(z);
            let lse = max as f64 + sum.ln();
            let loss = (lse - z[target] as f64) as f32;
            if grad {
                let first_max = z.iter().position(|&v| v == max);
                let scale = (weight / opts.divisor / sum) as f32;
                for v in z.iter_mut() {
                    *v = math::exp(*v - max) * scale;
                }
                z[target] -= (weight / opts.divisor) as f32;
                if let (true, Some(i)) = (opts.l2wrap, first_max) {
                    z[i] += (L2WRAP * max as f64 / opts.divisor) as f32;
                }
                if !loss.is_finite() {
                    z.fill(f32::NAN);
                }
            }
            loss
        },
    )
}

impl<'p> Tape<'p> {
    /// Cross entropy of x [tokens, C] through the head [V, C] against `targets` `[tokens]` (negative: ignored), with
    /// optional `weights` `[tokens]`. When recording, the gradients of the head and of the rows that reach it are added at once.
    pub fn cross_entropy(
        &mut self, x: &Var, head: &Weight, targets: &[i32], weights: Option<&[f32]>, opts: CrossEntropy,
    ) -> Loss {
        assert_eq!(targets.len(), x.rows());
        assert!(weights.is_none_or(|w| w.len() == x.rows()));
        let Some(rows) = some(targets) else { return self.cross_entropy_of_all(x, head, targets, weights, opts) };
        let room = room(rows.len(), x.rows());
        let mut few: Vec<i32> = rows.iter().map(|&r| targets[r as usize]).collect();
        few.resize(room, -1);
        let weights = weights.map(|w| {
            let mut few: Vec<f32> = rows.iter().map(|&r| w[r as usize]).collect();
            few.resize(room, 0.0);
            few
        });
        let chosen = self.select(x, &rows, room);
        let loss = self.cross_entropy_of_all(&chosen, head, &few, weights.as_deref(), opts);
        Loss { some: Some((rows, x.rows())), ..loss }
    }

    fn cross_entropy_of_all(
        &mut self, x: &Var, head: &Weight, targets: &[i32], weights: Option<&[f32]>, opts: CrossEntropy,
    ) -> Loss {
        let (rows, cols, vocab) = (x.rows(), x.cols(), head.outputs());
        let ctx = self.ctx().clone();
        let params = self.params();
        let grad = self.needs_grad(&[x], head.param().as_slice());
        let held = if ctx.cuda().is_some() { cuda::CHUNK } else { CHUNK };
        let chunk = (held / vocab).clamp(1, rows.max(1));
        let mut z = ctx.alloc(chunk * vocab);
        let mut dx = (grad && x.needs_grad()).then(|| ctx.alloc(rows * cols));
        if let Some(gpu) = ctx.cuda() {
            let out = cuda::run(self, gpu, x, head, targets, weights, opts, &z, chunk, dx.as_ref(), grad);
            if let Some(dx) = dx {
                x.add_grad(dx);
            }
            return out;
        }
        let mut per_token = vec![0.0; rows];
        if ctx.is_dry() {
            if let Some(dx) = dx {
                x.add_grad(dx);
            }
            return Loss { place: Place::Host { loss: 0.0, per_token, divisor: opts.divisor }, some: None };
        }
        for start in (0..rows).step_by(chunk) {
            let n = chunk.min(rows - start);
            let z = &mut z[..n * vocab];
            let xs = &x.data()[start * cols..(start + n) * cols];
            head.product(&ctx, params, xs, z);
            let (zs, losses) = (DisjointMut::new(z), DisjointMut::new(&mut per_token[start..start + n]));
            ctx.threads().run(n, |i| {
                // SAFETY: each task has its own row.
                let (z, loss) = unsafe { (zs.get(i * vocab..(i + 1) * vocab), &mut losses.get(i..i + 1)[0]) };
                match usize::try_from(targets[start + i]) {
                    Ok(target) => {
                        let weight = weights.map_or(1.0, |w| w[start + i] as f64);
                        *loss = row(z, target, weight, opts, grad);
                    }
                    Err(_) if grad => z.fill(0.0),
                    Err(_) => {}
                }
            });
            if let Some(dx) = &mut dx {
                head.input_grad(&ctx, params, z, &mut dx[start * cols..(start + n) * cols]);
            }
            if grad {
                self.with_backward(|b| head.add_weight_grad(b, xs, z));
            }
        }
        if let Some(dx) = dx {
            x.add_grad(dx);
        }
        let weighted = |(i, &l): (usize, &f32)| weights.map_or(1.0, |w| w[i] as f64) * l as f64;
        let loss = per_token.iter().enumerate().map(weighted).sum::<f64>() / opts.divisor;
        Loss { place: Place::Host { loss, per_token, divisor: opts.divisor }, some: None }
    }
}
