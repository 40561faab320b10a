//! What `anser debug` computes: logits, states and gradients of given tokens, in f32, for comparison with other implementations.

use anser_formats::Checkpoint;
use anser_model::{Config, Load, Model, State};
use anser_ops::{CrossEntropy, Segment, Tape, batch};
use anser_tensor::{Context, DType};
use std::str::FromStr;
use std::sync::Arc;

/// A named f32 tensor.
#[derive(Clone, Debug, PartialEq)]
pub struct Named {
    /// Name.
    pub name: String,
    /// Shape.
    pub shape: Vec<usize>,
    /// Values, row-major.
    pub data: Vec<f32>,
}

/// How the tokens are fed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// All at once.
    #[default]
    Parallel,
    /// One token a call, with the state carried.
    Recurrent,
    /// N tokens a call, with the state carried.
    Chunked(usize),
}

impl FromStr for Mode {
    type Err = String;
    fn from_str(s: &str) -> Result<Mode, String> {
        match s {
            "parallel" => Ok(Mode::Parallel),
            "recurrent" => Ok(Mode::Recurrent),
            _ => s
                .strip_prefix("chunked:")
                .and_then(|n| n.parse().ok())
                .filter(|&n| n > 0)
                .map(Mode::Chunked)
                .ok_or_else(|| format!("unknown mode {s:?}: use parallel, recurrent or chunked:N with N >= 1")),
        }
    }
}

/// Sequences of one length, row after row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    ids: Vec<u32>,
    rows: usize,
    len: usize,
}

impl Tokens {
    /// Parses `[[ids...], ...]`.
    ///
    /// # Errors
    /// When it isn't that, or the sequences are empty or differ in length.
    pub fn from_json(text: &str) -> Result<Tokens, crate::Error> {
        let bad = |m: String| crate::Error::Input(format!("tokens: {m}"));
        let rows: Vec<Vec<u32>> =
            serde_json::from_str(text).map_err(|e| bad(format!("expected [[ids...], ...]: {e}")))?;
        let len = rows.first().map_or(0, Vec::len);
        if len == 0 {
            return Err(bad("there must be at least one sequence of at least one token".into()));
        }
        if let Some(i) = rows.iter().position(|r| r.len() != len) {
            return Err(bad(format!(
                "sequence {i} has {} tokens, the first has {len}: they must be equal",
                rows[i].len()
            )));
        }
        Ok(Tokens { rows: rows.len(), len, ids: rows.concat() })
    }

    /// Columns `from..to` of every row, row after row.
    fn columns(&self, from: usize, to: usize) -> Vec<u32> {
        self.ids.chunks(self.len).flat_map(|r| &r[from..to]).copied().collect()
    }
}

/// Logits [B, T, V] and the final state, as `logits`, `state.{layer}.att_x`, `.wkv`, `.ffn_x`; of attention block j of a hybrid
/// `state.moba.{j}.ffn_x`, `.keys` and `.values` [B, T, key heads x N].
///
/// # Errors
/// When the model doesn't load or a token is outside its vocabulary.
pub fn logits(
    ctx: &Context, ckpt: &Checkpoint, config: Config, tokens: &Tokens, mode: Mode,
) -> Result<Vec<Named>, crate::Error> {
    let model = Model::load_as(ctx, ckpt, config, Load::Inference(DType::F32.into()))?;
    let (b, t, v) = (tokens.rows, tokens.len, model.config().vocab_size);
    let step = match mode {
        Mode::Parallel => t,
        Mode::Recurrent => 1,
        Mode::Chunked(n) => n,
    };
    let mut state = State::zeros(ctx, model.config(), b);
    let mut out = vec![0.0; b * t * v];
    for from in (0..t).step_by(step) {
        let n = step.min(t - from);
        let segments: Arc<[Segment]> = batch(b, n, true).into();
        let mut tape = Tape::inference(ctx, model.params());
        let hidden;
        (hidden, state) = model.forward(&mut tape, &tokens.columns(from, from + n), &segments, &state, false)?;
        let part = model.logits(&mut tape, &hidden).to_vec();
        for i in 0..b {
            out[(i * t + from) * v..][..n * v].copy_from_slice(&part[i * n * v..][..n * v]);
        }
    }
    let mut named = vec![Named { name: "logits".into(), shape: vec![b, t, v], data: out }];
    let (c, h, s) = (model.config().n_embd, model.config().heads(), model.config().head_size);
    for (i, l) in state.layers.iter().enumerate() {
        let mut add = |part: &str, shape: Vec<usize>, v: &anser_ops::Var| {
            named.push(Named { name: format!("state.{i}.{part}"), shape, data: v.to_vec() });
        };
        add("att_x", vec![b, c], &l.att_x);
        add("wkv", vec![b, h, s, s], &l.wkv);
        add("ffn_x", vec![b, c], &l.ffn_x);
    }
    for (j, a) in state.attention.iter().enumerate() {
        let mut add = |part: &str, shape: Vec<usize>, data: Vec<f32>| {
            named.push(Named { name: format!("state.moba.{j}.{part}"), shape, data });
        };
        add("ffn_x", vec![b, c], a.ffn_x.to_vec());
        let pasts: Vec<Vec<Vec<f32>>> = a.pasts.iter().map(|p| p.to_vecs()).collect();
        let wide = model.config().key_heads() * s;
        add("keys", vec![b, t, wide], pasts.iter().flat_map(|p| &p[0]).copied().collect());
        add("values", vec![b, t, wide], pasts.iter().flat_map(|p| &p[1]).copied().collect());
    }
    ctx.check()?;
    Ok(named)
}

/// Mean cross entropy of predicting ids[1..] from ids[..-1], and the gradient of every parameter as `grad.<name>`.
///
/// # Errors
/// When the model doesn't load, a token is outside its vocabulary or the sequences have one token only.
pub fn grads(
    ctx: &Context, ckpt: &Checkpoint, config: Config, tokens: &Tokens, l2wrap: bool,
) -> Result<(f64, Vec<Named>), crate::Error> {
    if tokens.len < 2 {
        return Err(crate::Error::Input("tokens: gradients need sequences of at least 2 tokens".into()));
    }
    let model = Model::load_as(ctx, ckpt, config, Load::Train)?;
    let (b, t) = (tokens.rows, tokens.len - 1);
    let inputs = tokens.columns(0, t);
    let targets: Vec<i32> = tokens.columns(1, t + 1).iter().map(|&i| i as i32).collect();
    if let Some(position) = targets.iter().position(|&t| t as usize >= model.config().vocab_size) {
        let (token, vocab) = (targets[position] as u32, model.config().vocab_size);
        return Err(anser_model::Error::Token { token, position, vocab }.into());
    }
    let mut grads = ctx.zeros_f32(model.params().values().len());
    let mut tape = Tape::recording(ctx, model.params(), &mut grads);
    let segments: Arc<[Segment]> = batch(b, t, false).into();
    let state = State::zeros(ctx, model.config(), 0);
    let (hidden, _) = model.forward(&mut tape, &inputs, &segments, &state, false)?;
    let loss = model.loss(&mut tape, &hidden, &targets, None, CrossEntropy { divisor: (b * t) as f64, l2wrap });
    tape.backward();
    let grads = grads.to_vec();
    ctx.check()?;
    let named = |s: &anser_ops::ParamSpec| Named {
        name: format!("grad.{}", s.name),
        shape: s.shape.clone(),
        data: grads[s.range.clone()].to_vec(),
    };
    Ok((loss.loss(), model.params().specs().iter().map(named).collect()))
}
