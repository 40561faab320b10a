//! The trainer that a run goes on with: the newest checkpoint's, or a new one.

use super::{Event, model};
use crate::{Error, RunConfig, Trainer};
use anser_model::Config;
use anser_tensor::Context;
use anser_tokenizer::Tokenizer;

/// Metadata of the files of a run: its configuration, and the tokenizer that its tokens are of.
const RECIPE: &str = "anser.recipe";
const TOKENIZER: &str = "anser.tokenizer";

/// The trainer, and the number of steps done before, if it goes on.
///
/// # Errors
/// When the configuration is wrong, or doesn't fit the checkpoint or the tokenizer; when the model's file cannot be read.
pub(super) fn start(
    ctx: &Context, config: &RunConfig, tokenizer: Option<&Tokenizer>, on: &mut dyn FnMut(Event),
) -> Result<(Trainer, Option<u64>), Error> {
    let (folder, settings) = (&config.output.folder, config.settings(config.train.steps));
    let resumed = Trainer::resume(ctx, folder, settings, |w| on(Event::Warning(w)))?;
    let went_on = resumed.as_ref().map(Trainer::steps);
    let mut trainer = match resumed {
        Some(t) => t,
        None => Trainer::new(ctx, model::first(ctx, config, tokenizer)?, settings),
    };
    check(config, trainer.model().config(), tokenizer)?;
    train_only(&mut trainer, &config.model.train_only)?;
    let recipe = toml::to_string(config).map_err(|e| Error::Config(e.to_string()))?;
    if let Some(before) = trainer.description(RECIPE).filter(|before| *before != recipe) {
        on(Event::Warning(format!("going on with other settings than before: {}", changed(before, &recipe))));
    }
    trainer.describe(RECIPE, recipe);
    if let Some(t) = tokenizer {
        trainer.describe(TOKENIZER, t.name());
    }
    trainer.record_steps(config.train.record);
    Ok((trainer, went_on))
}

/// Whether a model, which may be a checkpoint's, is the one that is configured, and has all tokens of the tokenizer.
fn check(config: &RunConfig, found: &Config, tokenizer: Option<&Tokenizer>) -> Result<(), Error> {
    if let Some(names) = model::differences(config, found) {
        let folder = config.output.folder.display();
        let reason = format!("{folder}: its checkpoints are of a model with other {names}; name another folder");
        return Err(Error::Config(reason));
    }
    if let Some(t) = tokenizer.filter(|t| found.vocab_size < t.vocab_size()) {
        let (model, name, all) = (found.vocab_size, t.name(), t.vocab_size());
        let reason =
            format!("the model has {model} tokens, the tokenizer {name} has {all}: name the model's tokenizer");
        return Err(Error::Config(reason));
    }
    Ok(())
}

/// Lets only the parameters train that match a pattern.
fn train_only(trainer: &mut Trainer, patterns: &[String]) -> Result<(), Error> {
    if patterns.is_empty() {
        return Ok(());
    }
    let specs = trainer.model().params().specs();
    if let Some(p) = patterns.iter().find(|p| !specs.iter().any(|s| matches(p, &s.name))) {
        return Err(Error::Config(format!("model.train_only: no parameter is named {p:?} (see `anser inspect`)")));
    }
    trainer.set_trainable(|name| patterns.iter().any(|p| matches(p, name)));
    Ok(())
}

/// Whether `name` is `pattern`, in which * stands for any text.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, rest)) => name
            .strip_prefix(head)
            .is_some_and(|tail| (0..=tail.len()).any(|i| tail.is_char_boundary(i) && matches(rest, &tail[i..]))),
    }
}

/// The fields of a recipe that are others than before.
fn changed(before: &str, now: &str) -> String {
    let flat = |text: &str| -> Vec<(String, String)> {
        let table: toml::Table = toml::from_str(text).unwrap_or_default();
        let fields = |(s, f): (String, toml::Value)| match f {
            toml::Value::Table(f) => f.into_iter().map(|(k, v)| (format!("{s}.{k}"), v.to_string())).collect(),
            other => vec![(s, other.to_string())],
        };
        table.into_iter().flat_map(fields).collect()
    };
    let before = flat(before);
    let now: Vec<String> =
        flat(now).into_iter().filter(|f| !before.contains(f)).map(|(k, v)| format!("{k} = {v}")).collect();
    now.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns() {
        for (pattern, name, is) in [
            ("*", "head.weight", true),
            ("head.weight", "head.weight", true),
            ("blocks.*.att.w*", "blocks.12.att.w0", true),
            ("blocks.*.att.w*", "blocks.12.ffn.key.weight", false),
            ("*.weight", "ln_out.bias", false),
            ("", "x", false),
        ] {
            assert_eq!(matches(pattern, name), is, "{pattern} {name}");
        }
    }
}
