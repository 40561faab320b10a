use crate::global::{Global, Interrupted, stop};
use anser_data::{Dataset, Options, Order, Tokens, bundled};
use anser_infer::{Sampler, Sampling, Session};
use anser_model::{Config, Init, Model};
use anser_tensor::{Context, DType};
use anser_tokenizer::{StreamDecoder, Tokenizer};
use anser_train::{Bptt, Hyper, Schedule, Settings, Trainer, loss_curve};
use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Trains a small RWKV-7 on the bundled text on this machine, draws its loss curve and writes with it
#[derive(clap::Args)]
pub struct Args {
    /// Time for training
    #[arg(long, default_value_t = 2.3)]
    minutes: f64,
    /// Steps, instead of as many as fit the time
    #[arg(long)]
    steps: Option<u64>,
    /// Seed of the initial weights and of the text it writes
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

const FOLDER: &str = "anser-quickstart";
const CTX: usize = 128;
const ROWS: usize = 8;
const PROMPT: &str = "Fellow-Citizens of the Senate and House of Representatives: ";

/// Runs the subcommand.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let folder = Path::new(FOLDER);
    let _lock = Trainer::lock(folder)?;
    let ctx = global.context()?;
    let tokenizer = Tokenizer::bytes();
    let options = Options { ctx: CTX, held_out: 0.02, order: Order::Official, resets: false, seed: 0 };
    let data = Dataset::new(Tokens::Memory(tokenizer.encode(bundled::corpus().as_bytes())), options)?;
    let held_out = data.held_out(64);

    let config = Config { head_size: 32, ..Config::new(4, 128, tokenizer.vocab_size()) };
    let schedule = Schedule { init: 4e-3, last: 4e-4, warmup: 10, total: 100 };
    let hyper = Hyper { weight_decay: 0.01, ..Hyper::default() };
    let settings =
        Settings { ctx: CTX, schedule, hyper, grad_clip: 1.0, l2wrap: true, checkpointing: false, bptt: Bptt::Whole };
    let mut trainer = Trainer::new(&ctx, Model::init(&ctx, &config, Init::Current, args.seed)?, settings);
    let peak = anser_tensor::bench::gemm_peak(&ctx);

    global.note(format!(
        "RWKV-7: {} layers, width {}, {} parameters, one token a byte; {} threads",
        config.n_layer,
        config.n_embd,
        config.parameters(),
        ctx.threads().len()
    ));
    let first_loss = trainer.evaluate(&held_out)?;
    let memory = trainer.forecast(ROWS)? as f64 / 1e6;

    let start = Instant::now();
    let mut metrics = std::fs::File::create(folder.join("metrics.jsonl")).context("metrics.jsonl")?;
    let (mut curve, mut held) = (Vec::new(), vec![(0, first_loss)]);
    // The first steps tell how many fit the time; they are still in the warm-up, which does not depend on the total.
    const MEASURED: u64 = 8;
    let mut total = args.steps.unwrap_or(MEASURED + 1).max(1);
    trainer.settings_mut().schedule.total = total.max(100);
    let bar = if global.quiet { ProgressBar::hidden() } else { ProgressBar::new(total) };
    bar.set_style(ProgressStyle::with_template("{bar:30} {pos}/{len} {msg}, {eta} left")?);
    let mut interrupted = false;
    while trainer.steps() < total {
        let step = trainer.steps();
        let info = trainer.step(&[data.train(step, ROWS)])?;
        let seconds = start.elapsed().as_secs_f64();
        if args.steps.is_none() && info.step + 1 == MEASURED {
            let each = seconds / MEASURED as f64;
            total = ((args.minutes * 60.0 / each) as u64).max(MEASURED + 1);
            trainer.settings_mut().schedule.total = total;
            bar.set_length(total);
            global.note(format!("{total} steps of {} tokens, {memory:.0} MB of memory", ROWS * CTX));
        }
        let speed = ((info.step + 1) as usize * ROWS * CTX) as f64 / seconds;
        let mfu = config.train_flops_per_token() * speed / peak;
        curve.push((info.step, info.loss));
        let line = json!({ "step": info.step, "loss": info.loss, "lr": info.lr, "grad_norm": info.grad_norm, "tokens_per_second": speed, "mfu": mfu });
        writeln!(metrics, "{line}")?;
        bar.set_position(info.step + 1);
        bar.set_message(format!("loss {:.3}, {speed:.0} tokens/s, MFU {:.0}%", info.loss, mfu * 100.0));
        interrupted = stop().load(Ordering::SeqCst);
        let last = info.step + 1 == total || interrupted;
        if (info.step + 1).is_multiple_of((total / 6).max(20)) || last {
            let loss = trainer.evaluate(&held_out)?;
            held.push((info.step + 1, loss));
            writeln!(metrics, "{}", json!({ "step": info.step + 1, "held_out_loss": loss }))?;
            if !last {
                let text = write(&ctx, trainer.model(), &tokenizer, args.seed, 120)?;
                let line = format!("step {}: held-out loss {loss:.3}: {:?}", info.step + 1, text);
                if bar.is_hidden() { global.note(line) } else { bar.println(line) }
            }
        }
        if interrupted {
            break;
        }
    }
    bar.finish_and_clear();
    let seconds = start.elapsed().as_secs_f64();
    let model = folder.join("model.safetensors");
    trainer.save_model(&model, &[("anser.tokenizer", tokenizer.name())])?;
    let picture = folder.join("loss.svg");
    let title = "anser quickstart: cross entropy, nats per byte";
    anser_formats::write_atomic(&picture, |f| f.write_all(loss_curve(title, &curve, &held).as_bytes()))?;
    if interrupted {
        global.note(format!("stopped at step {}; the model is in {}", trainer.steps(), model.display()));
        return Err(Interrupted.into());
    }
    let last_loss = held.last().map_or(f64::NAN, |h| h.1);
    let text = write(&ctx, trainer.model(), &tokenizer, args.seed, 600)?;
    let json = json!({
        "steps": trainer.steps(),
        "tokens": trainer.steps() as usize * ROWS * CTX,
        "seconds": seconds,
        "held_out_loss_before": first_loss,
        "held_out_loss": last_loss,
        "model": model,
        "loss_curve": picture,
        "sample": text,
    });
    global.result(json, || {
        format!(
            "Held-out loss {first_loss:.3} -> {last_loss:.3} nats per byte in {seconds:.0} s. Loss curve: {}\n\n{PROMPT}{text}\n\nGo on with: anser generate --prompt \"...\"\n",
            picture.display()
        )
    })
}

/// What the model writes after [`PROMPT`].
fn write(ctx: &Context, model: &Model, tokenizer: &Tokenizer, seed: u64, tokens: usize) -> anyhow::Result<String> {
    let model = model.packed(ctx, DType::F32);
    let mut session = Session::new(ctx, &model);
    session.feed(&tokenizer.encode(PROMPT.as_bytes()))?;
    let mut sampler = Sampler::new(Sampling { top_p: 0.7, seed, ..Sampling::default() })?;
    let (mut decoder, mut text) = (StreamDecoder::default(), String::new());
    for _ in 0..tokens {
        let token = sampler.sample(session.logits()?)?;
        if token == tokenizer.end_of_document() {
            break;
        }
        text += &decoder.push(tokenizer.token(token)?);
        session.feed(&[token])?;
    }
    Ok(text + &decoder.finish())
}
