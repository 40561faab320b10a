//! The model that a run begins with.

use crate::trainer::free_memory;
use crate::{Error, ModelConfig, RunConfig};
use anser_formats::Checkpoint;
use anser_model::{Config, Hybrid, Load, Model};
use anser_tensor::Context;
use anser_tokenizer::Tokenizer;

/// The model to begin with: a file's, or a new one.
///
/// # Errors
/// When it is impossible, memory will not hold it, or the file cannot be read.
pub(super) fn first(ctx: &Context, config: &RunConfig, tokenizer: Option<&Tokenizer>) -> Result<Model, Error> {
    let m = &config.model;
    // Weights, gradients and two moments in f32, before any of them is made.
    let fits = |dims: &Config| {
        let (needed, room) = (4 * 4 * dims.parameters() as u64, free_memory(ctx).unwrap_or(u64::MAX));
        let advice = "train a smaller model".into();
        if needed > room { Err(Error::Memory { needed: needed >> 20, available: room >> 20, advice }) } else { Ok(()) }
    };
    if !m.load.as_os_str().is_empty() {
        let file = Checkpoint::open(&m.load)?;
        let mut dims = Config::from_checkpoint(&file)?;
        dims.hybrid = chunks(m, dims.hybrid)?;
        if let Some(h) = dims.hybrid {
            let other =
                [("gate", m.gate && !h.gate), ("key_heads", m.key_heads > 0 && m.key_heads != dims.key_heads())];
            if let Some((name, _)) = other.iter().find(|(_, other)| *other) {
                let advice = "leave it out, or make such blocks with `anser expand`";
                return Err(Error::Config(format!("model.{name}: the model loaded has others: {advice}")));
            }
        }
        fits(&dims)?;
        return Ok(Model::load_as(ctx, &file, dims, Load::Train)?);
    }
    let vocab = match (m.vocab_size, tokenizer) {
        (0, Some(t)) => t.vocab_size(),
        (0, None) => return Err(Error::Config("model.vocab_size: give it, as data.tokenizer is \"none\"".into())),
        (n, _) => n,
    };
    let mut dims = match m.preset.as_str() {
        "" => Config::new(m.n_layer, m.n_embd, vocab),
        name => Config { vocab_size: vocab, ..Config::preset(name)? },
    };
    if m.head_size > 0 {
        dims.head_size = m.head_size;
    }
    dims.double_rate = m.double_rate;
    let key_heads = Some(m.key_heads).filter(|k| *k > 0 && *k != dims.heads());
    let new = Hybrid { gate: m.gate, key_heads, ..Hybrid::new(m.attention) };
    dims.hybrid = chunks(m, (m.attention > 0).then_some(new))?;
    dims.validate()?;
    fits(&dims)?;
    Ok(Model::init(ctx, &dims, m.init, m.seed)?)
}

/// A hybrid with the chunks that the configuration names.
fn chunks(m: &ModelConfig, hybrid: Option<Hybrid>) -> Result<Option<Hybrid>, Error> {
    let all = [
        ("chunk", m.chunk),
        ("topk", m.topk),
        ("sink", m.sink),
        ("window", m.window),
        ("gate", m.gate.into()),
        ("key_heads", m.key_heads),
    ];
    if let Some((name, _)) = all.iter().find(|(_, n)| hybrid.is_none() && *n > 0) {
        return Err(Error::Config(format!("model.{name} is of attention: set model.attention too")));
    }
    Ok(hybrid.map(|h| Hybrid {
        chunk: or(m.chunk, h.chunk),
        topk: or(m.topk, h.topk),
        sink: or(m.sink, h.sink),
        window: or(m.window, h.window),
        ..h
    }))
}

/// What is asked for; 0 asks for what is there.
fn or(asked: usize, there: usize) -> usize {
    if asked == 0 { there } else { asked }
}

/// Names of the dimensions in which a checkpoint's model is not the configured one.
pub(super) fn differences(config: &RunConfig, found: &Config) -> Option<String> {
    let m = &config.model;
    if !m.load.as_os_str().is_empty() {
        return None;
    }
    let (layers, width) = match m.preset.as_str() {
        "" => (m.n_layer, m.n_embd),
        name => Config::preset(name).map_or((0, 0), |c| (c.n_layer, c.n_embd)),
    };
    let of = |f: fn(Hybrid) -> usize| found.hybrid.map_or(0, f);
    let wanted = [
        ("n_layer", layers, found.n_layer),
        ("n_embd", width, found.n_embd),
        ("head_size", or(m.head_size, found.head_size), found.head_size),
        ("vocab_size", or(m.vocab_size, found.vocab_size), found.vocab_size),
        ("double_rate", m.double_rate.into(), found.double_rate.into()),
        ("attention", m.attention, of(|h| h.layers)),
        ("chunk", or(m.chunk, of(|h| h.chunk)), of(|h| h.chunk)),
        ("topk", or(m.topk, of(|h| h.topk)), of(|h| h.topk)),
        ("sink", or(m.sink, of(|h| h.sink)), of(|h| h.sink)),
        ("gate", m.gate.into(), found.hybrid.is_some_and(|h| h.gate).into()),
        ("key_heads", or(m.key_heads, found.heads()), found.key_heads()),
        ("window", or(m.window, of(|h| h.window)), of(|h| h.window)),
    ];
    let names: Vec<&str> = wanted.iter().filter(|w| w.1 != w.2).map(|w| w.0).collect();
    (!names.is_empty()).then(|| names.join(", "))
}
