//! AdamW over the flat arenas: one pass over values, gradients and both moments.

use anser_ops::{Group, ParamSet};
use anser_tensor::cuda::{Arg, DevicePtr, Module};
use anser_tensor::{Buf, Context, DisjointMut, simd::vectorize};
use std::ops::Range;

static KERNELS: Module = Module::new(include_bytes!("kernel.fatbin"));

/// Hyper-parameters of [`AdamW`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hyper {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay of the `Decay` group.
    pub weight_decay: f64,
}

impl Default for Hyper {
    /// The official trainer's, with its weight decay for large data.
    fn default() -> Hyper {
        Hyper { beta1: 0.9, beta2: 0.99, eps: 1e-18, weight_decay: 0.1 }
    }
}

/// The optimiser's state: moments laid out like the parameter arena, and the number of steps taken.
pub struct AdamW {
    /// First moment, f32.
    pub m: Buf,
    /// Second moment, f32.
    pub v: Buf,
    /// Steps taken.
    pub steps: u64,
}

/// Elements of one task.
const PIECE: usize = 1 << 14;

/// `range` in pieces.
fn pieces(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let end = range.end;
    range.step_by(PIECE).map(move |i| i..end.min(i + PIECE))
}

/// All trainable parameters in pieces that lie in one parameter.
fn tasks(params: &ParamSet) -> impl Iterator<Item = (Range<usize>, Group)> {
    params.specs().iter().filter(|s| s.trainable).flat_map(|s| pieces(s.range.clone()).map(|r| (r, s.group)))
}

/// The tasks as the kernels have them: {start / 8, length, group}; and how many there are. Made once for a set of trainable parameters.
fn table(ctx: &Context, params: &ParamSet) -> (DevicePtr, usize) {
    let words = |(r, g): (Range<usize>, Group)| [(r.start / 8) as i32, r.len() as i32, g as i32];
    (ctx.table(params.layout(), "optimiser", || tasks(params).flat_map(words).collect()), tasks(params).count())
}

impl AdamW {
    /// Zero moments for an arena of `len` parameters.
    pub fn new(ctx: &Context, len: usize) -> AdamW {
        AdamW { m: ctx.zeros_f32(len), v: ctx.zeros_f32(len), steps: 0 }
    }

    /// One step with learning rate `lr` (2x for the `Double` group), gradients multiplied by what `norm` says (clipping). Frozen
    /// parameters and their moments stay as they are; so does everything if the norm is not finite, but for the number of steps,
    /// which on a GPU is counted before the norm is known.
    pub fn step(&mut self, ctx: &Context, params: &mut ParamSet, grads: &Buf, hyper: Hyper, lr: f64, norm: &GradNorm) {
        assert!(grads.len() == self.m.len() && params.values().len() == self.m.len());
        self.steps += 1;
        let t = self.steps.min(i32::MAX as u64) as i32;
        let (b1, b2) = (hyper.beta1 as f32, hyper.beta2 as f32);
        let (n1, n2) = ((1.0 - hyper.beta1) as f32, (1.0 - hyper.beta2) as f32);
        let root = (1.0 / (1.0 - hyper.beta2.powi(t)).sqrt()) as f32;
        let eps = hyper.eps as f32;
        let scale = match &norm.0 {
            Place::Host { norm, .. } if !norm.is_finite() => return,
            Place::Host { scale, .. } => *scale as f32,
            Place::Device(verdict) => {
                let Some(gpu) = ctx.cuda() else { return };
                let rate = |lr: f64| Arg::F32((lr / (1.0 - hyper.beta1.powi(t))) as f32);
                let keep = Arg::F32((1.0 - lr * hyper.weight_decay) as f32);
                let (table, count) = table(ctx, params);
                let (master, rounded) = params.arenas();
                let mut args = vec![Arg::Ptr(master), Arg::Ptr(rounded)];
                args.extend([grads, &self.m, &self.v].map(|b| Arg::Ptr(b.ptr())));
                args.extend([table, verdict.ptr()].map(Arg::Ptr));
                args.extend([b1, b2, n1, n2, root, eps].map(Arg::F32));
                args.extend([keep, rate(lr), rate(2.0 * lr)]);
                let name = format!("adamw_{}", ctx.dtype());
                return gpu.launch(&KERNELS, &name, [count, 1, 1], [256, 1, 1], &args);
            }
        };
        let tasks: Vec<_> = tasks(params).collect();
        let (values, ms, vs) =
            (DisjointMut::new(params.values_mut()), DisjointMut::new(&mut self.m), DisjointMut::new(&mut self.v));
        ctx.threads().run(tasks.len(), |i| {
            let (range, group) = tasks[i].clone();
            let lr = if group == Group::Double { 2.0 * lr } else { lr };
            let decay = if group == Group::Decay { hyper.weight_decay } else { 0.0 };
            let keep = (1.0 - lr * decay) as f32;
            let rate = (lr / (1.0 - hyper.beta1.powi(t))) as f32;
            // SAFETY: tasks are disjoint pieces of the arenas.
            let (p, m, v) = unsafe { (values.get(range.clone()), ms.get(range.clone()), vs.get(range.clone())) };
            let g = &grads[range];
            vectorize(
                #[inline(always)]
                || {
                    for j in 0..g.len() {
                        let g = g[j] * scale;
                        m[j] = b1 * m[j] + n1 * g;
                        v[j] = b2 * v[j] + n2 * g * g;
                        p[j] = p[j] * keep - rate * m[j] / (v[j].sqrt() * root + eps);
                    }
                },
            );
        });
    }
}

/// Euclidean norm of the gradients of all trainable parameters, in f64 over fixed pieces in order, and what clipping multiplies them
/// by. On a GPU both stay there until they are asked for, so that the optimiser's step waits for nobody.
pub struct GradNorm(Place);

enum Place {
    Host {
        norm: f64,
        scale: f64,
    },
    /// {norm as f64, scale as f32, whether the norm is finite as an int}.
    Device(Buf),
}

impl GradNorm {
    /// Measures `grads`; clipping makes the norm at most `max` (0: no limit).
    pub fn new(ctx: &Context, params: &ParamSet, grads: &Buf, max: f64) -> GradNorm {
        if let Some(gpu) = ctx.cuda() {
            let (table, count) = table(ctx, params);
            let (parts, verdict) = (ctx.alloc_f32(2 * count), ctx.alloc_f32(4));
            let args = [grads.ptr(), table, parts.ptr()].map(Arg::Ptr);
            gpu.launch(&KERNELS, "sums_of_squares", [count, 1, 1], [256, 1, 1], &args);
            let args = [parts.ptr().into(), (count as i32).into(), (max as f32).into(), verdict.ptr().into()];
            gpu.launch(&KERNELS, "verdict", [1, 1, 1], [1024, 1, 1], &args);
            return GradNorm(Place::Device(verdict));
        }
        let tasks: Vec<_> = tasks(params).collect();
        let mut sums = vec![0f64; tasks.len()];
        let shared = DisjointMut::new(&mut sums);
        ctx.threads().run(tasks.len(), |i| {
            let mut parts = [0f64; 8];
            for c in grads[tasks[i].0.clone()].chunks(8) {
                for (p, &g) in parts.iter_mut().zip(c) {
                    *p += g as f64 * g as f64;
                }
            }
            // SAFETY: every task has its own sum.
            let sum = unsafe { shared.get(i..i + 1) };
            sum[0] = parts.iter().sum();
        });
        let norm = sums.iter().sum::<f64>().sqrt();
        let scale = if max > 0.0 { (max / (norm + 1e-6)).min(1.0) } else { 1.0 };
        GradNorm(Place::Host { norm, scale })
    }

    /// The norm before clipping; waits for the device.
    pub fn norm(&self) -> f64 {
        match &self.0 {
            Place::Host { norm, .. } => *norm,
            Place::Device(verdict) => verdict.to_f64().first().copied().unwrap_or(0.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set() -> ParamSet {
        let list = [("a", Group::Plain), ("b", Group::Decay), ("c", Group::Double)];
        let (mut set, _) = ParamSet::new(list.map(|(n, g)| (n.into(), vec![40000], g)).to_vec());
        set.values_mut().iter_mut().enumerate().for_each(|(i, v)| *v = (i as f32).sin());
        set
    }

    /// One parameter, step by step, in f64 as in the paper.
    fn reference(mut p: f64, g: f64, lr: f64, wd: f64, h: Hyper, steps: i32) -> f64 {
        let (mut m, mut v) = (0.0, 0.0);
        for t in 1..=steps {
            m = h.beta1 * m + (1.0 - h.beta1) * g;
            v = h.beta2 * v + (1.0 - h.beta2) * g * g;
            p -= lr * wd * p;
            p -= lr * (m / (1.0 - h.beta1.powi(t))) / ((v / (1.0 - h.beta2.powi(t))).sqrt() + h.eps);
        }
        p
    }

    #[test]
    fn groups_clipping_and_threads() {
        let hyper = Hyper { eps: 1e-8, ..Hyper::default() };
        let grads: Vec<f32> = (0..120_000).map(|i| (i as f32 * 0.7).cos()).collect();
        let run = |threads| {
            let (ctx, mut p) = (Context::cpu(threads), set());
            let mut adam = AdamW::new(&ctx, 120_000);
            let grads = ctx.copy_of(&grads);
            let norm = GradNorm::new(&ctx, &p, &grads, 1.0);
            for _ in 0..3 {
                adam.step(&ctx, &mut p, &grads, hyper, 1e-2, &norm);
            }
            (p, norm.norm())
        };
        let (p, norm) = run(2);
        assert!(p.values() == run(1).0.values() && norm == run(3).1);
        let exact = grads.iter().map(|&g| (g as f64).powi(2)).sum::<f64>().sqrt();
        assert!((norm / exact - 1.0).abs() < 1e-12);
        let clip = |norm: f64| 1.0 / (norm + 1e-6);
        let start = set();
        for s in p.specs() {
            let (lr, wd) = match s.group {
                Group::Double => (2e-2, 0.0),
                Group::Decay => (1e-2, 0.1),
                Group::Plain => (1e-2, 0.0),
            };
            for i in [s.range.start, s.range.end - 1] {
                let g = grads[i] as f64 * clip(norm);
                let want = reference(start.values()[i] as f64, g, lr, wd, hyper, 3);
                assert!((p.values()[i] as f64 - want).abs() < 1e-6, "{} {} {want}", s.name, p.values()[i]);
            }
        }
    }

    #[test]
    fn frozen_parameters_stay() {
        let (ctx, mut p) = (Context::cpu(1), set());
        p.set_trainable(|n| n != "b");
        let grads = ctx.copy_of(&[1.0; 120_000]);
        let norm = GradNorm::new(&ctx, &p, &grads, 0.0);
        assert!((norm.norm() - 80_000f64.sqrt()).abs() < 1e-9);
        AdamW::new(&ctx, 120_000).step(&ctx, &mut p, &grads, Hyper::default(), 1e-2, &norm);
        let start = set();
        for s in p.specs() {
            let same = p.values()[s.range.clone()] == start.values()[s.range.clone()];
            assert_eq!(same, s.name == "b");
        }
    }
}
