//! Initialisation of a new model: the official trainer's, current and as at the time of the paper.
//!
//! With n = channel 0..D-1, r01 = l / (L - 1), r10 = 1 - l / L, lin = n / (D-1) - 1/2, z = ((n mod N) - (N-1)/2) / ((N-1)/2) and
//! zig = z |z|. Matrices are orthogonal with a gain, or zero; see [`Rule`].

mod orthogonal;

use self::orthogonal::orthogonal;
use crate::tensors::{Place, place};
use crate::{Architecture, Config, Error, Model};
use anser_ops::{Param, ParamSet};
use anser_tensor::Context;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::collections::HashMap;
use std::sync::Mutex;

/// Which initialisation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Init {
    /// The official trainer since May 2025.
    #[default]
    Current,
    /// The official trainer when the paper appeared (March 2025).
    Paper,
    /// For measurements: the official vectors, and matrices of uniform noise that keep a signal's size, none of them zero. Made in
    /// seconds at any size, which orthogonal matrices are not.
    Noise,
}

/// How one tensor is filled.
enum Rule {
    Each(Box<dyn Fn(usize) -> f64>),
    Uniform(f64),
    Orthogonal(f64),
}

/// The rule for parameter `name` of a model.
fn rule(c: &Config, init: Init, name: &str) -> Rule {
    let (d, layers) = (c.n_embd as f64, c.n_layer as f64);
    let (place, part) = place(name);
    let attention = matches!(place, Place::Attention(_)) || c.architecture == Architecture::Transformer;
    let layer = match place {
        Place::Block(i) | Place::Attention(i) => i as f64,
        Place::Outside => 0.0,
    };
    let r01 = if c.n_layer > 1 { layer / (layers - 1.0) } else { 0.0 };
    let r10 = 1.0 - layer / layers;
    let each = |f: Box<dyn Fn(usize) -> f64>| Rule::Each(f);
    let constant = |v: f64| each(Box::new(move |_| v));
    let mix = move |p: f64, minus: f64| each(Box::new(move |n| 1.0 - ((n as f64 / d).powf(p) + minus)));
    // Position along the width, in [0, 1]; a model of width 1 has only the start.
    let along = move |n: usize| if d > 1.0 { n as f64 / (d - 1.0) } else { 0.0 };
    let lin = move |n: usize| along(n) - 0.5;
    let half = (c.head_size as f64 - 1.0) / 2.0;
    let size = c.head_size;
    let zig = move |n: usize| {
        let z = ((n % size) as f64 - half) / half;
        z * z.abs()
    };
    let current = init != Init::Paper;
    match part {
        "emb.weight" => Rule::Uniform(1e-4),
        "head.weight" => {
            let (v, d) = (c.vocab_size as f64, d);
            Rule::Orthogonal(if v > d { 0.5 * (v / d).sqrt() } else { 0.5 })
        }
        "att.x_r" | "att.x_g" => mix(0.2 * r10, 0.0),
        "att.x_w" | "att.x_a" => mix(0.9 * r10, 0.0),
        "att.x_k" if current => mix(0.7 * r10, 0.0),
        "att.x_v" if current => mix(0.7 * r10, 0.0),
        "att.x_k" => mix(0.9 * r10, 0.4 * r01),
        "att.x_v" => mix(0.4 * r10, 0.6 * r01),
        "ffn.x_k" => mix(r10.powi(4), 0.0),
        "att.w0" if current => {
            let p = 1.0 + r01.powf(0.3);
            each(Box::new(move |n| -6.0 + 6.0 * along(n).powf(p) + 0.5 + 2.5 * zig(n)))
        }
        "att.w0" => {
            let p = 0.85 + r01.sqrt();
            each(Box::new(move |n| -7.0 + 5.0 * along(n).powf(p) + 0.5))
        }
        "att.a0" if current => each(Box::new(move |n| -0.19 + 0.3 * zig(n) + 0.4 * lin(n))),
        "att.a0" => constant(0.0),
        "att.v0" if current => each(Box::new(move |n| 0.73 - 0.4 * lin(n))),
        "att.v0" => constant(1.0),
        "att.k_k" if current => each(Box::new(move |n| 0.71 - 0.1 * lin(n))),
        "att.k_k" => constant(0.85),
        "att.k_a" => constant(if current { 1.02 } else { 1.0 }),
        "att.r_k" => constant(if current { -0.04 } else { 0.0 }),
        "att.w2" | "att.a2" | "att.v2" | "att.g2" => Rule::Orthogonal(0.1),
        "att.query.weight" | "att.receptance.weight" | "att.key.weight" if attention => Rule::Orthogonal(0.5),
        "att.receptance.weight" | "att.value.weight" | "ffn.key.weight" => Rule::Orthogonal(1.0),
        "att.key.weight" => Rule::Orthogonal(0.1),
        "att.ln_x.weight" => constant(((1.0 + layer) / layers).powf(0.7)),
        // Everything else: the first low-rank matrices, gates of heads and the two output projections start at zero, LayerNorms at 1 and 0.
        "att.gate.weight" | "att.output.weight" | "ffn.value.weight" => constant(0.0),
        _ if part.ends_with(".weight") => constant(1.0),
        _ => constant(0.0),
    }
}

/// A stream of its own for every tensor, so that one tensor's values depend on the seed, its name and its shape only.
fn stream(seed: u64, name: &str) -> ChaCha8Rng {
    // FNV-1a.
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325u64, |h, b| (h ^ b as u64).wrapping_mul(0x0100_0000_01b3));
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(hash);
    rng
}

/// Uniform in (0, 1).
fn unit(rng: &mut ChaCha8Rng) -> f64 {
    ((rng.next_u64() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

/// Fills `out` with noise in (-bound, bound), of which pieces repeat.
fn noise(rng: &mut ChaCha8Rng, bound: f32, out: &mut [f32]) {
    let table: Vec<f32> = (0..1 << 16).map(|_| (2.0 * unit(rng) - 1.0) as f32 * bound).collect();
    for piece in out.chunks_mut(table.len() / 2) {
        let at = rng.next_u64() as usize % (table.len() / 2);
        piece.copy_from_slice(&table[at..at + piece.len()]);
    }
}

/// Fills `out` with standard normal values (Box-Muller).
fn normal(rng: &mut ChaCha8Rng, out: &mut [f32]) {
    for pair in out.chunks_mut(2) {
        let (radius, angle) = ((-2.0 * unit(rng).ln()).sqrt(), std::f64::consts::TAU * unit(rng));
        pair[0] = (radius * angle.cos()) as f32;
        if let Some(second) = pair.get_mut(1) {
            *second = (radius * angle.sin()) as f32;
        }
    }
}

/// Fills one tensor, seen as a matrix [rows, cols].
fn fill(config: &Config, init: Init, seed: u64, name: &str, [rows, cols]: [usize; 2], out: &mut [f32]) {
    let mut rng = stream(seed, name);
    if init == Init::Noise && rows > 1 && cols > 1 {
        return noise(&mut rng, (3.0 / cols as f64).sqrt() as f32, out);
    }
    match rule(config, init, name) {
        Rule::Each(f) => out.iter_mut().enumerate().for_each(|(i, o)| *o = f(i) as f32),
        Rule::Uniform(bound) => out.iter_mut().for_each(|o| *o = ((2.0 * unit(&mut rng) - 1.0) * bound) as f32),
        Rule::Orthogonal(gain) => {
            orthogonal(&Context::cpu(1), &mut rng, rows, cols, out);
            out.iter_mut().for_each(|o| *o *= gain as f32);
        }
    }
}

impl Config {
    /// The initial values of a parameter that is a vector, or constant.
    pub(crate) fn vector(&self, name: &str) -> Vec<f32> {
        match rule(self, Init::Current, name) {
            Rule::Each(f) => (0..self.n_embd).map(|i| f(i) as f32).collect(),
            _ => unreachable!("{name} is a matrix"),
        }
    }
}

impl Model {
    /// A new model; the same seed gives the same values on any number of threads.
    ///
    /// # Errors
    /// When the configuration is impossible.
    pub fn init(ctx: &Context, config: &Config, init: Init, seed: u64) -> Result<Model, Error> {
        config.validate()?;
        let (mut params, handles) = ParamSet::new(config.tensors());
        let specs = params.specs().to_vec();
        let mut order: Vec<Param> = handles;
        order.sort_by_key(|p| specs[p.id].range.start);
        // Every tensor is one thread's work: a wide model has hundreds of orthogonal matrices, each a chain of small steps.
        let mut rest = params.values_mut();
        let mut tasks = Vec::new();
        for p in order {
            let (mine, more) = rest.split_at_mut(specs[p.id].range.len());
            tasks.push(Mutex::new((p, mine)));
            rest = more;
        }
        tasks.sort_by_key(|t| std::cmp::Reverse(t.lock().map_or(0, |t| t.1.len())));
        ctx.threads().run(tasks.len(), |i| {
            if let Ok(mut task) = tasks[i].lock() {
                let (p, out) = &mut *task;
                fill(config, init, seed, &specs[p.id].name, [p.rows, p.cols], out);
            }
        });
        drop(tasks);
        params.to_device(ctx);
        Ok(Model::assemble(config.clone(), params, &HashMap::new()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(init: Init, name: &str, n: usize) -> f64 {
        match rule(&Config::preset("0.1b").unwrap(), init, name) {
            Rule::Each(f) => f(n),
            _ => panic!("{name} is not given by a formula"),
        }
    }

    #[test]
    fn official_values() {
        let rows = [
            ("blocks.0.att.w0", 0, -8.0),
            ("blocks.0.att.a0", 0, -0.69),
            ("blocks.0.att.v0", 0, 0.93),
            ("blocks.0.att.k_k", 0, 0.76),
            ("blocks.0.att.w0", 63, -2.507171),
            ("blocks.0.att.w0", 384, -4.996089),
            ("blocks.0.att.x_w", 384, 0.464113),
            ("blocks.0.att.x_k", 384, 0.384428),
            ("blocks.0.att.x_r", 384, 0.129449),
            ("blocks.0.ffn.x_k", 384, 0.5),
            ("blocks.0.att.w0", 767, 3.0),
            ("blocks.0.att.a0", 767, 0.31),
            ("blocks.0.att.v0", 767, 0.53),
            ("blocks.5.att.w0", 63, -2.931469),
            ("blocks.11.att.w0", 383, -1.503909),
            ("blocks.0.att.ln_x.weight", 3, 0.175620),
            ("blocks.5.att.ln_x.weight", 3, 0.615572),
            ("blocks.11.att.ln_x.weight", 3, 1.0),
            ("blocks.3.ln1.weight", 3, 1.0),
            ("blocks.3.ln1.bias", 3, 0.0),
            ("blocks.3.att.output.weight", 3, 0.0),
            ("blocks.3.att.k_a", 3, 1.02),
        ];
        for (name, n, expected) in rows {
            let got = value(Init::Current, name, n);
            assert!((got - expected).abs() < 1e-6, "{name}[{n}] = {got}, expected {expected}");
        }
        assert!((value(Init::Paper, "blocks.0.att.w0", 0) + 6.5).abs() < 1e-9);
        assert!((value(Init::Paper, "blocks.0.att.w0", 767) + 1.5).abs() < 1e-9);
        assert_eq!(value(Init::Paper, "blocks.11.att.k_k", 5), 0.85);
        let x_v = 1.0 - ((384f64 / 768.0).powf(0.4 / 12.0) + 0.6);
        assert!((value(Init::Paper, "blocks.11.att.x_v", 384) - x_v).abs() < 1e-12);
    }

    #[test]
    fn matrices_are_orthogonal_with_their_gain() {
        let ctx = Context::cpu(2);
        for (rows, cols) in [(64, 64), (300, 64), (32, 128), (1, 7), (200, 200), (130, 190)] {
            let mut m = vec![0.0; rows * cols];
            orthogonal(&ctx, &mut stream(1, "x"), rows, cols, &mut m);
            let short = rows.min(cols);
            for i in 0..short {
                for j in 0..short {
                    let dot: f64 = match rows >= cols {
                        true => (0..rows).map(|k| m[k * cols + i] as f64 * m[k * cols + j] as f64).sum(),
                        false => (0..cols).map(|k| m[i * cols + k] as f64 * m[j * cols + k] as f64).sum(),
                    };
                    let expected = if i == j { 1.0 } else { 0.0 };
                    assert!((dot - expected).abs() < 1e-5, "{rows}x{cols}: {i} . {j} = {dot}");
                }
            }
        }
        let c = Config::new(2, 64, 256);
        let model = Model::init(&ctx, &c, Init::Current, 7).unwrap();
        let norm = |name: &str| {
            let s = model.params().specs().iter().find(|s| s.name == name).unwrap();
            model.params().values()[s.range.clone()].iter().map(|&v| (v as f64).powi(2)).sum::<f64>()
        };
        // sum of squares = short side x gain^2
        assert!((norm("head.weight") - 64.0 * 0.25 * 4.0).abs() < 1e-2);
        assert!((norm("blocks.1.att.key.weight") - 64.0 * 0.01).abs() < 1e-4);
        assert_eq!(norm("blocks.1.ffn.value.weight"), 0.0);
    }

    #[test]
    fn seeds_decide() {
        let c = Config::new(1, 64, 32);
        let values = |threads, seed| {
            Model::init(&Context::cpu(threads), &c, Init::Current, seed).unwrap().params().values().to_vec()
        };
        assert_eq!(values(1, 3), values(2, 3));
        assert_ne!(values(1, 3), values(1, 4));
    }
}
