//! What a run reads: rows of a data set, with rows of needles among them if wanted.

use crate::{Error, RunConfig};
use anser_data::needle::{Mix, Needles};
use anser_data::{Batch, Binidx, Built, Dataset, Options, Tokens, bundled, documents};
use anser_tokenizer::Tokenizer;

/// The data of a run.
pub(super) struct Data {
    dataset: Dataset,
    needles: Option<Mix>,
    /// What made the tokens; `None`: nothing is said of it, and no text can be written.
    pub(super) tokenizer: Option<Tokenizer>,
    /// Rows of a step, and of a micro-batch.
    rows: usize,
    micro: usize,
}

impl Data {
    /// Opens the data that the configuration names.
    ///
    /// # Errors
    /// When it cannot be read, is too little, or doesn't go with the tokenizer or with needles.
    pub(super) fn open(config: &RunConfig) -> Result<Data, Error> {
        let (tokens, tokenizer) = tokens(config)?;
        let options = Options {
            ctx: config.train.ctx,
            held_out: config.data.held_out,
            order: config.data.order,
            resets: config.data.resets,
            seed: config.data.seed,
        };
        let dataset = Dataset::new(tokens, options)?;
        let needles = needles(config, tokenizer.as_ref())?;
        Ok(Data { dataset, needles, tokenizer, rows: config.train.rows, micro: config.train.micro() })
    }

    /// Tokens to train on.
    pub(super) fn train_tokens(&self) -> usize {
        self.dataset.train_tokens()
    }

    /// At most `rows` rows that are never trained on.
    pub(super) fn held_out(&self, rows: usize) -> Batch {
        self.dataset.held_out(rows)
    }

    /// The micro-batches of a step.
    pub(super) fn train(&self, step: u64) -> Vec<Batch> {
        let batch = match &self.needles {
            Some(mix) => mix.train(&self.dataset, step, self.rows),
            None => self.dataset.train(step, self.rows),
        };
        if self.micro == self.rows {
            return vec![batch];
        }
        let part = |from| batch.slice(self.dataset.ctx(), from, from + self.micro);
        (0..self.rows).step_by(self.micro).map(part).collect()
    }
}

/// The tokens and what made them.
fn tokens(config: &RunConfig) -> Result<(Tokens, Option<Tokenizer>), Error> {
    let (path, said) = (&config.data.path, config.data.tokenizer.as_str());
    let named = |name: &str| match name {
        "none" => Ok(None),
        name => Tokenizer::from_name(name).map(Some),
    };
    if path.as_os_str().is_empty() {
        let tokenizer = Tokenizer::from_name(if said.is_empty() { "bytes" } else { said })?;
        return Ok((Tokens::Memory(tokenizer.encode(bundled::corpus().as_bytes())), Some(tokenizer)));
    }
    if path.is_file() && path.extension().is_none_or(|e| e != "bin" && e != "idx") {
        let (path, hint) = (path.display(), "anser data build");
        return Err(Error::Config(format!(
            "data.path: {path} is not a data set; make one with `{hint} {path} --out PREFIX`"
        )));
    }
    let tokens = Tokens::Binidx(Binidx::open(path)?);
    let built = Built::read(path).map(|b| b.tokenizer);
    let name = match (said, built) {
        ("", Some(built)) => built,
        ("", None) => {
            let reason = "data.tokenizer: the data set doesn't say what made it; name \"world\", \"bytes\" or \"none\"";
            return Err(Error::Config(reason.into()));
        }
        (said, Some(built)) if said != built => {
            return Err(Error::Config(format!("data.tokenizer = {said:?}, but the data set was built with {built:?}")));
        }
        (said, _) => said.to_string(),
    };
    Ok((tokens, named(&name)?))
}

/// The rows of needles among those of the data set, if any are wanted.
fn needles(config: &RunConfig, tokenizer: Option<&Tokenizer>) -> Result<Option<Mix>, Error> {
    let (d, ctx) = (&config.data, config.train.ctx);
    if d.needles == 0.0 {
        return Ok(None);
    }
    let unknown = || Error::Config("data.needles: samples are text, and data.tokenizer is \"none\": name one".into());
    let tokenizer = *tokenizer.ok_or_else(unknown)?;
    let text = match (d.needle_task.takes_text(), d.needle_text.as_os_str().is_empty()) {
        (false, _) => None,
        (true, false) => Some(documents(&d.needle_text)?.join("\n")),
        (true, true) => {
            let mut text = bundled::corpus();
            let mut end = (text.len() as f64 * (1.0 - d.held_out)) as usize;
            while !text.is_char_boundary(end) {
                end -= 1;
            }
            text.truncate(end);
            Some(text)
        }
    };
    let (share, shortest, answer_only, seed) = (d.needles, d.needle_min, d.needle_answer_only, d.seed);
    let needles = Needles::new(d.needle_task, tokenizer, text.as_deref()).with_keys(d.needle_keys);
    let mix = Mix { needles, share, shortest, asked: d.needle_asked, answer_only, seed };
    let (task, name, least) = (d.needle_task.with_keys(d.needle_keys), tokenizer.name(), mix.least());
    if shortest > 0 && shortest < least {
        return Err(Error::Config(format!(
            "data.needle_min: a sample of {task} has at least {least} tokens of {name}"
        )));
    }
    if ctx < least.max(shortest) {
        let least = least.max(shortest);
        return Err(Error::Config(format!("train.ctx: a sample of {task} has at least {least} tokens of {name}")));
    }
    Ok(Some(mix))
}
