//! Speed of training and decoding, each beside what limits it, measured in the same run.

use crate::profile::Limits;
use anser_data::Batch;
use anser_infer::{Decoder, Session};
use anser_model::{Config, Init, Model, kept_as};
use anser_ops::attention::Chunks;
use anser_ops::{ParamSet, Tape, Var, batch, wkv7::Wkv7Inputs};
use anser_tensor::cuda::Span;
use anser_tensor::{Context, DType, WeightType, bench};
use anser_tokenizer::Tokenizer;
use anser_train::{Bptt, Hyper, Recompute, RecomputeMode, Schedule, Settings, Trainer};
use std::time::Instant;

/// Speed of training.
#[derive(Clone, Debug)]
pub struct Train {
    /// Median over the steps.
    pub tokens_per_second: f64,
    /// 6 x (parameters - embedding) x tokens per second.
    pub flops: f64,
    /// Matrix products, in the same unit.
    pub peak: f64,
    /// The same by the data sheet, where known.
    pub nominal: Option<f64>,
    /// Share of the step that one WKV-7 forward and backward pass a layer takes, measured alone; on a GPU the profile says it.
    pub wkv_share: Option<f64>,
    /// Most bytes of the context's memory in use at a time.
    pub peak_bytes: usize,
    /// What was forecast, and is checked against free memory before the first step.
    pub forecast_bytes: usize,
    /// What was computed again going back.
    pub recompute: Recompute,
    /// What the GPU did in one more step, if that was asked for, and what it can do.
    pub profile: Option<(Vec<Span>, Limits)>,
}

/// Speed of decoding.
#[derive(Clone, Copy, Debug)]
pub struct Decode {
    /// Tokens a second, one sequence.
    pub decode: f64,
    /// Tokens a second of a prompt of 256.
    pub prefill: f64,
    /// Bytes of weights and state that a decoded token must read.
    pub bytes: f64,
    /// Reading memory, bytes a second.
    pub bandwidth: f64,
}

/// The middle one.
pub(crate) fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// Trains a new model on arbitrary tokens for `steps` steps after one to warm up; with `profile` once more, timing each launch.
///
/// # Errors
/// When the dimensions are impossible.
pub fn train(
    ctx: &Context, layers: usize, width: usize, vocab: usize, rows: usize, t: usize, steps: usize, profile: bool,
    recompute: RecomputeMode, tune: bool,
) -> Result<Train, crate::Error> {
    if let Some(gpu) = ctx.cuda().filter(|_| tune) {
        gpu.tune_products("");
    }
    let config = Config::new(layers, width, vocab);
    let schedule = Schedule { init: 1e-4, last: 1e-4, warmup: 0, total: 1 };
    let hyper = Hyper::default();
    let settings = Settings {
        ctx: t,
        schedule,
        hyper,
        grad_clip: 1.0,
        l2wrap: true,
        checkpointing: false,
        recompute: recompute.least(),
        bptt: Bptt::Whole,
        long_ce: None,
    };
    let mut trainer = Trainer::new(ctx, Model::init(ctx, &config, Init::Noise, 1)?, settings);
    let room = trainer.room();
    let forecast = match recompute {
        RecomputeMode::Auto => trainer.recompute_to_fit(rows, room)?,
        _ => trainer.forecast(rows)?,
    };
    if let Some(room) = room.filter(|&room| forecast as u64 > room) {
        let advice = "take fewer rows, or train.recompute = \"all\"".into();
        let (needed, available) = (forecast as u64 >> 20, room >> 20);
        return Err(anser_train::Error::Memory { needed, available, advice }.into());
    }
    let recompute = trainer.settings().recompute;
    let n = rows * t;
    let tokens: Vec<u32> = (0..n).map(|i| (i * 7919 % vocab) as u32).collect();
    let targets = tokens.iter().map(|&t| t as i32).collect();
    let data = [Batch::rows(tokens, targets, t)];
    trainer.step(&data)?;
    let mut seconds = Vec::new();
    for _ in 0..steps.max(1) {
        let start = Instant::now();
        trainer.step(&data)?;
        seconds.push(start.elapsed().as_secs_f64());
    }
    let step = median(seconds);
    let profile = match ctx.cuda() {
        Some(gpu) if profile => {
            let (done, spans) = gpu.profiled(|| trainer.step(&data));
            done?;
            Some(spans)
        }
        _ => None,
    };
    let peak_bytes = ctx.memory().peak;
    drop(trainer);
    ctx.trim();
    let tokens_per_second = n as f64 / step;
    let wkv = || wkv(ctx, rows, t, config.heads(), config.head_size).both * layers as f64;
    let peak = bench::gemm_peak(ctx);
    Ok(Train {
        tokens_per_second,
        flops: config.train_flops_per_token() * tokens_per_second,
        peak,
        nominal: bench::nominal_peak(ctx),
        wkv_share: ctx.cuda().is_none().then(|| wkv() / step),
        peak_bytes,
        forecast_bytes: forecast,
        recompute,
        profile: profile.map(|spans| (spans, Limits { bandwidth: bench::read_bandwidth(ctx), peak })),
    })
}

/// Seconds of one WKV-7 pass, medians.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Wkv {
    /// Forward, as at inference.
    pub forward: f64,
    /// Forward, keeping what the backward pass needs.
    pub recording: f64,
    /// Forward and backward.
    pub both: f64,
    /// Bytes that a pass forward and backward must move at least: six inputs twice, y, dy, six gradients and one state of
    /// 16-bit values for every 64 tokens, written and read.
    pub bytes: f64,
    /// Memory, bytes a second: read on the CPU; copied on a GPU, counted as read and written.
    pub bandwidth: f64,
}

/// WKV-7 over `rows` sequences of `t` tokens with `heads` heads of `n`.
pub fn wkv(ctx: &Context, rows: usize, t: usize, heads: usize, n: usize) -> Wkv {
    let (tokens, c) = (rows * t, heads * n);
    let mut seed = 1u32;
    let mut fill = |scale: f32| {
        let mut next = || {
            seed = seed.wrapping_mul(1664525).wrapping_add(1013904223);
            ((seed >> 8) as f32 / (1 << 23) as f32 - 1.0) * scale
        };
        let values: Vec<f32> = (0..tokens * c).map(|_| next()).collect();
        ctx.copy_of(&values)
    };
    let params = ParamSet::default();
    let segments = batch(rows, t, false).into();
    let [r, w, k, v, b] = [1.0, 3.0, 1.0, 1.0, 0.1].map(|s| Var::leaf(tokens, c, fill(s)));
    // Short removal keys that remove little: any magnitudes are computed alike.
    let a = Var::leaf(tokens, c, fill(0.1));
    let state = Var::constant(0, c * n, ctx.alloc_f32(0));
    let dy = fill(1.0);
    let inputs = Wkv7Inputs { r: &r, w: &w, k: &k, v: &v, a: &a, b: &b };
    // Several passes between two looks at the clock, so that the launches of one overlap the work of another.
    let time = |pass: &dyn Fn()| {
        pass();
        let round = |_| {
            ctx.synchronize();
            let start = Instant::now();
            let passes = if ctx.cuda().is_some() { 10 } else { 1 };
            (0..passes).for_each(|_| pass());
            ctx.synchronize();
            start.elapsed().as_secs_f64() / passes as f64
        };
        median((0..5).map(round).collect())
    };
    let forward = time(&|| {
        Tape::inference(ctx, &params).wkv7(inputs, &state, &segments, heads);
    });
    let recorded = |back: bool| {
        let mut none = ctx.alloc_f32(0);
        let mut tape = Tape::recording(ctx, &params, &mut none);
        let (y, _) = tape.wkv7(inputs, &state, &segments, heads);
        if back {
            y.add_grad(dy.duplicate());
            tape.backward();
            [&r, &w, &k, &v, &a, &b].iter().for_each(|x| drop(x.take_grad()));
        }
    };
    let recording = time(&|| recorded(false));
    // The backward pass takes its gradient up, which here is a copy of one.
    let both = time(&|| recorded(true)) - time(&|| drop(dy.duplicate()));
    let bytes = (tokens * c * ctx.dtype().size()) as f64 * (20.0 + 2.0 * n as f64 / 64.0);
    Wkv { forward, recording, both, bytes, bandwidth: bench::read_bandwidth(ctx) }
}

/// Decoding on a GPU, many sequences at a time.
#[derive(Clone, Debug)]
pub struct DecodeBatch {
    /// Tokens a second of all sequences together, each step going on with the most probable tokens.
    pub decode: f64,
    /// The same for steps whose logits go to the host and whose tokens come from there.
    pub with_logits: f64,
    /// Tokens a second of a prompt of [`PROMPT`] tokens.
    pub prefill: f64,
    /// Bytes that a step moves at least.
    pub bytes: f64,
    /// Copying memory, bytes a second.
    pub bandwidth: f64,
    /// Share of relu(.)^2 that was zero for all sequences.
    pub zero_share: f64,
    /// Bytes of device memory reserved.
    pub memory: usize,
    /// Kind of kernel, seconds a step when it runs alone, bytes it moves at least.
    pub parts: Vec<(String, f64, f64)>,
}

/// Tokens of the prompt that [`decode_batch`] reads.
pub const PROMPT: usize = 4096;

/// Decodes `batch` sequences for `tokens` steps on a GPU, with states in `state`. With `tune` the algorithms of products are chosen by timing.
///
/// # Errors
/// When it needs more memory than there is.
pub fn decode_batch(
    ctx: &Context, model: &Model, batch: usize, tokens: usize, state: DType, tune: bool,
) -> Result<DecodeBatch, crate::Error> {
    if let Some(gpu) = ctx.cuda().filter(|_| tune) {
        gpu.tune_products("");
    }
    let vocab = model.config().vocab_size as u32;
    let mut decoder = Decoder::with_states(ctx, model, batch, state)?
        .ok_or_else(|| crate::Error::Input("decoding in batches needs --device cuda and --dtype f16 or bf16".into()))?;
    let memory = ctx.memory().reserved;
    let inputs: Vec<(usize, u32)> = (0..batch).map(|i| (i, i as u32 * 7919 % vocab)).collect();
    let time = |decoder: &mut Decoder<'_>, steps: usize| {
        let start = Instant::now();
        decoder.greedy(&inputs, steps)?;
        Ok::<f64, crate::Error>(start.elapsed().as_secs_f64())
    };
    time(&mut decoder, 4)?;
    // What a step costs, without the first, which waits for logits.
    let long = |decoder: &mut Decoder<'_>| {
        Ok::<f64, crate::Error>((time(decoder, tokens + 1)? - time(decoder, 1)?) / tokens as f64)
    };
    let seconds = median((0..3).map(|_| long(&mut decoder)).collect::<Result<_, _>>()?);
    let start = Instant::now();
    for _ in 0..tokens {
        decoder.step(&inputs)?;
    }
    let with_logits = batch as f64 * tokens as f64 / start.elapsed().as_secs_f64();
    let zero_share = decoder.zero_share();
    let parts = decoder.profile(batch, zero_share);
    let parts = parts.into_iter().map(|(p, s, b)| (format!("{p:?}").to_lowercase(), s, b)).collect();
    let bytes = decoder.bytes(batch, zero_share);
    let prompt: Vec<u32> = (0..PROMPT as u32).map(|i| i * 37 % vocab).collect();
    let mut read = Vec::new();
    for _ in 0..4 {
        decoder.clear(0)?;
        let start = Instant::now();
        decoder.prefill(0, &prompt)?;
        read.push(start.elapsed().as_secs_f64());
    }
    let prefill = PROMPT as f64 / read.iter().skip(1).copied().fold(f64::INFINITY, f64::min);
    let bandwidth = bench::read_bandwidth(ctx);
    Ok(DecodeBatch {
        decode: batch as f64 / seconds,
        with_logits,
        prefill,
        bytes,
        bandwidth,
        zero_share,
        memory,
        parts,
    })
}

/// Reads `text` with each model, whose matrices are kept as `kept`, token by token and in prompts of 256. The models take turns, so that
/// they meet the same machine.
///
/// # Errors
/// When a token is outside a model's vocabulary.
pub fn decode(
    ctx: &Context, models: &[Model], kept: WeightType, text: &[u32], tokens: usize,
) -> Result<Vec<Decode>, crate::Error> {
    /// Tokens of a turn.
    const TURN: usize = 16;
    let timed = |session: &mut Session<'_>, tokens: &[u32]| {
        let start = Instant::now();
        session.feed(tokens)?;
        Ok::<f64, anser_infer::Error>(start.elapsed().as_secs_f64())
    };
    let prompt: Vec<u32> = text.iter().copied().cycle().take(256).collect();
    let mut sessions: Vec<_> = models.iter().map(|m| Session::new(ctx, m)).collect();
    let mut seconds = vec![(Vec::new(), Vec::new()); models.len()];
    for session in &mut sessions {
        session.feed(&prompt)?;
    }
    for _ in 0..5 {
        for (session, (read, _)) in sessions.iter_mut().zip(&mut seconds) {
            read.push(timed(session, &prompt)?);
        }
    }
    let next: Vec<u32> = text.iter().copied().cycle().skip(256).take(tokens.max(1)).collect();
    for turn in next.chunks(TURN) {
        for (session, (_, step)) in sessions.iter_mut().zip(&mut seconds) {
            for token in turn {
                step.push(timed(session, &[*token])?);
            }
        }
    }
    let bandwidth = bench::read_bandwidth(ctx);
    let of = |(model, (read, step)): (&Model, (Vec<f64>, Vec<f64>))| {
        // One row of the embedding is read; the head may be kept otherwise.
        let config = model.config();
        let head = config.vocab_size * config.n_embd;
        let of_head = kept_as(kept, "head.weight", &[config.vocab_size, config.n_embd]).unwrap_or(kept);
        let matrices = kept.bytes_of(config.parameters() - 2 * head) + of_head.bytes_of(head);
        let bytes = (matrices + config.state_len() * 4) as f64;
        Decode { decode: 1.0 / median(step), prefill: 256.0 / median(read), bytes, bandwidth }
    };
    Ok(models.iter().zip(seconds).map(of).collect())
}

/// Speed of a tokenizer.
#[derive(Clone, Copy, Debug)]
pub struct Tokenize {
    /// Bytes of text a second, one core.
    pub bytes_per_second: f64,
    /// Bytes of the text.
    pub bytes: usize,
    /// Its tokens.
    pub tokens: usize,
}

/// Encodes the bundled text several times; the median.
pub fn tokenize(tokenizer: &Tokenizer) -> Tokenize {
    let text = anser_data::bundled::corpus();
    let mut tokens = 0;
    let run = |_| {
        let start = Instant::now();
        tokens = tokenizer.encode(text.as_bytes()).len();
        start.elapsed().as_secs_f64()
    };
    let seconds = median((0..7).map(run).collect());
    Tokenize { bytes_per_second: text.len() as f64 / seconds, bytes: text.len(), tokens }
}

/// Bytes of resident memory of the process; 0 where the system doesn't say.
pub(crate) fn resident() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    statm.split(' ').nth(1).and_then(|pages| pages.parse::<u64>().ok()).unwrap_or(0) * 4096
}

/// Speed of top-k chunk attention alone, over one sequence of random queries and keys.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Attention {
    /// Tokens of the sequence.
    pub tokens: usize,
    /// Heads.
    pub heads: usize,
    /// Size of a head.
    pub head_size: usize,
    /// Tokens of a chunk.
    pub chunk: usize,
    /// Chunks that a query sees, its own included.
    pub top: usize,
    /// Seconds without gradients.
    pub forward: f64,
    /// Seconds forward and backward together.
    pub both: f64,
    /// Operations of the two products over the keys that are seen, forward; with the backward pass 3.5 times as many.
    pub flops: f64,
    /// Seconds of each kernel in one pass forward and backward.
    pub kernels: Vec<(String, f64)>,
}

/// Chunk attention of one sequence of `tokens` tokens, which see `top` chunks of `size`.
pub fn attention(ctx: &Context, tokens: usize, heads: usize, n: usize, [size, top]: [usize; 2]) -> Attention {
    let (c, chunks) = (heads * n, Chunks::new(size, top));
    let mut s = 88172645463325252u64;
    let mut next = || {
        s ^= s << 13;
        s ^= s >> 7;
        s ^= s << 17;
        ((s >> 40) as f32 / (1 << 23) as f32 - 1.0) * 1.7
    };
    let apart = 12347;
    let values: Vec<f32> = (0..tokens * c + 4 * apart).map(|_| next()).collect();
    let [q, k, v, dy] = [0, 1, 2, 3].map(|i| ctx.copy_of(&values[i * apart..][..tokens * c]));
    drop(values);
    let [q, k, v] = [q, k, v].map(|x| Var::leaf(tokens, c, x));
    let params = ParamSet::default();
    let segments = batch(1, tokens, false).into();
    let time = |pass: &dyn Fn()| {
        pass();
        let round = |_| {
            ctx.synchronize();
            let start = Instant::now();
            let passes = if ctx.cuda().is_some() { 5 } else { 1 };
            (0..passes).for_each(|_| pass());
            ctx.synchronize();
            start.elapsed().as_secs_f64() / passes as f64
        };
        median((0..5).map(round).collect())
    };
    let forward = || {
        Tape::inference(ctx, &params).attention([&q, &k, &v], &segments, heads, chunks, &[]);
    };
    let both = || {
        let mut none = ctx.alloc_f32(0);
        let mut tape = Tape::recording(ctx, &params, &mut none);
        let (y, _) = tape.attention([&q, &k, &v], &segments, heads, chunks, &[]);
        y.add_grad(dy.duplicate());
        tape.backward();
        [&q, &k, &v].iter().for_each(|x| drop(x.take_grad()));
    };
    let seen = |t: usize| (t / chunks.size).min(chunks.top - 1) * chunks.size + t % chunks.size + 1;
    let flops = (4 * c) as f64 * (0..tokens).map(|t| seen(t) as f64).sum::<f64>();
    // The backward pass takes its gradient up, which here is a copy of one.
    let seconds = [time(&forward), time(&both) - time(&|| drop(dy.duplicate()))];
    let mut kernels: Vec<(String, f64)> = Vec::new();
    for span in ctx.cuda().map_or(Vec::new(), |gpu| gpu.profiled(both).1) {
        match kernels.iter_mut().find(|k| k.0 == span.name) {
            Some(kernel) => kernel.1 += span.duration / 1e6,
            None => kernels.push((span.name, span.duration / 1e6)),
        }
    }
    let [forward, both] = seconds;
    Attention { tokens, heads, head_size: n, chunk: size, top, forward, both, flops, kernels }
}
