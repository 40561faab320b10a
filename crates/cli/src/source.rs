//! Models that commands read with: their files, and how attention and reading ahead are bounded.

use crate::global::{Bound, Chunks, Global};
use anser_formats::Checkpoint;
use anser_infer::SavedState;
use anser_infer::engine::{Engine, EngineOptions};
use anser_model::{Cache, Config, Load, Model};
use anser_tensor::{Context, WeightType};
use anser_tokenizer::Tokenizer;
use anyhow::{Context as _, bail, ensure};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The model that needs no file: 12 million parameters, English and Rust.
static OWN_MODEL: &[u8] = include_bytes!("../../../models/anser-12m.safetensors");

/// A model's file, and what it doesn't say.
#[derive(clap::Args)]
pub struct ModelFile {
    /// Checkpoint or Hugging Face folder [default: the small model that is part of this program, see models/README.md]
    #[arg(long)]
    model: Option<PathBuf>,
    /// Tokenizer: world, world-4096 or bytes [default: what the model file says, else world]
    #[arg(long)]
    tokenizer: Option<String>,
    #[command(flatten)]
    chunks: Chunks,
}

/// A model to be read from and written with.
#[derive(clap::Args)]
pub struct Source {
    #[command(flatten)]
    file: ModelFile,
    #[command(flatten)]
    bound: Bound,
    /// On a CPU, for one text at a time: tokens read ahead at most, guessed where it repeats itself, as quotations and edited code do; the output stays the
    /// same [default: 4 at temperature 0, else none]
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u8).range(0..=64))]
    speculate: Option<u8>,
}

impl ModelFile {
    /// Loads the model, with weights of that type, and its tokenizer.
    pub fn load(&self, ctx: &Context, global: &Global, weights: WeightType) -> anyhow::Result<(Model, Tokenizer)> {
        let ckpt = match &self.model {
            Some(path) => Checkpoint::open(path)?,
            None => Checkpoint::from_static("anser-12m.safetensors", OWN_MODEL)?,
        };
        let path = ckpt.path().display();
        let name = self.tokenizer.as_deref().or(ckpt.metadata().get("anser.tokenizer").map(String::as_str));
        let tokenizer = Tokenizer::from_name(name.unwrap_or("world"))?;
        let config = self.chunks.apply(Config::from_checkpoint(&ckpt)?).with_context(|| path.to_string())?;
        global.remarks(&config);
        let model = Model::load_as(ctx, &ckpt, config, Load::Inference(weights)).with_context(|| path.to_string())?;
        let (vocab, all) = (model.config().vocab_size, tokenizer.vocab_size());
        ensure!(
            vocab >= all,
            "{path}: the model has {vocab} tokens, the tokenizer {} has {all}: name the model's tokenizer with --tokenizer",
            tokenizer.name()
        );
        Ok((model, tokenizer))
    }

    /// The model's name: that of its file.
    pub fn name(&self) -> String {
        let of_file = self.model.as_deref().and_then(Path::file_stem).map(|s| s.to_string_lossy().into_owned());
        of_file.unwrap_or_else(|| "anser-12m".into())
    }
}

impl Source {
    /// Loads the model, its weights as `--dtype` says, and its tokenizer.
    pub fn load(&self, ctx: &Context, global: &Global) -> anyhow::Result<(Model, Tokenizer)> {
        self.file.load(ctx, global, global.weights(ctx)?)
    }

    /// The model's name.
    pub fn name(&self) -> String {
        self.file.name()
    }

    /// The bound on what attention keeps, if one was asked for.
    pub fn bound(&self) -> Option<Cache> {
        self.bound.cache()
    }

    /// The beginning of a sequence, or what a state file goes on from, which says its own bound.
    pub fn begin(&self, ctx: &Context, model: &Model, state: Option<&Path>) -> anyhow::Result<SavedState> {
        match (state, self.bound()) {
            (Some(path), None) => Ok(SavedState::open(ctx, model, path)?),
            (Some(_), Some(_)) => bail!("--cache: a state file says what it keeps; leave --cache out"),
            (None, bound) => Ok(SavedState::beginning(ctx, model, bound, None)?),
        }
    }

    /// An engine for one sequence, of states with such a bound. It keeps none of its own accord.
    pub fn engine(&self, ctx: &Context, model: &Arc<Model>, bound: Option<Cache>) -> anyhow::Result<Engine> {
        let guesses = self.guesses();
        // Whoever reads the output may take as long as they like.
        let unread = usize::MAX;
        let options = EngineOptions { slots: 1, cache_bytes: 0, unread, guesses, bound, ..EngineOptions::default() };
        Ok(Engine::start(ctx.clone(), model.clone(), options)?)
    }

    /// Tokens read ahead at most.
    pub fn guesses(&self) -> Option<usize> {
        self.speculate.map(usize::from)
    }
}
