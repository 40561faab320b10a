use crate::{Bptt, Error, Hyper, LongCe, Recompute, Schedule, Settings};
use anser_data::{Order, needle};
use anser_model::Init;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use toml::{Table, Value};

/// A training run as its TOML file says it. The fields, what they mean and their defaults: [`RunConfig::DOCUMENTED`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // documented once, in config.toml, which users see
pub struct RunConfig {
    pub model: ModelConfig,
    pub data: DataConfig,
    pub train: TrainConfig,
    pub output: OutputConfig,
}

/// Section `[model]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // see RunConfig
pub struct ModelConfig {
    pub load: PathBuf,
    pub preset: String,
    pub n_layer: usize,
    pub n_embd: usize,
    pub head_size: usize,
    pub vocab_size: usize,
    pub double_rate: bool,
    pub attention: usize,
    pub chunk: usize,
    pub topk: usize,
    pub sink: usize,
    pub window: usize,
    pub gate: bool,
    pub key_heads: usize,
    pub init: Init,
    pub seed: u64,
    pub train_only: Vec<String>,
}

/// Section `[data]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // see RunConfig
pub struct DataConfig {
    pub path: PathBuf,
    pub tokenizer: String,
    pub order: Order,
    pub resets: bool,
    pub held_out: f64,
    pub seed: u64,
    pub needles: f64,
    pub needle_task: needle::Task,
    pub needle_keys: usize,
    pub needle_asked: usize,
    pub needle_text: PathBuf,
    pub needle_min: usize,
    pub needle_answer_only: bool,
}

/// Section `[train]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // see RunConfig
pub struct TrainConfig {
    pub ctx: usize,
    pub rows: usize,
    pub micro_rows: usize,
    pub steps: u64,
    pub minutes: f64,
    pub lr_init: f64,
    pub lr_final: f64,
    pub warmup: u64,
    pub weight_decay: f64,
    pub beta1: f64,
    pub beta2: f64,
    pub adam_eps: f64,
    pub grad_clip: f64,
    pub l2wrap: bool,
    pub checkpointing: bool,
    pub recompute: RecomputeMode,
    pub tune: bool,
    pub record: bool,
    pub bptt: usize,
    pub bptt_mode: BpttMode,
    pub long_ce_context: usize,
    pub long_ce_stride: usize,
    pub long_ce_from: usize,
    pub long_ce_gamma: f64,
    pub long_ce_normalise: bool,
}

/// See [`Recompute`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RecomputeMode {
    /// As little as fits into memory.
    Auto,
    /// Nothing.
    Nothing,
    /// The inputs that token shift mixes.
    Shifts,
    /// All that is cheap.
    All,
}

impl RecomputeMode {
    /// What is computed again at least.
    pub fn least(self) -> Recompute {
        match self {
            RecomputeMode::Auto | RecomputeMode::Nothing => Recompute::Nothing,
            RecomputeMode::Shifts => Recompute::Shifts,
            RecomputeMode::All => Recompute::All,
        }
    }
}

/// See [`Bptt`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BpttMode {
    /// All gradients.
    Exact,
    /// None between pieces.
    Truncated,
}

/// Section `[output]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
#[allow(missing_docs)] // see RunConfig
pub struct OutputConfig {
    pub folder: PathBuf,
    pub save_every: u64,
    pub keep: usize,
    pub eval_every: u64,
    pub eval_rows: usize,
    pub keep_best: bool,
    pub sample_every: u64,
    pub sample_prompt: String,
    pub sample_tokens: usize,
}

impl Default for RunConfig {
    fn default() -> RunConfig {
        // A test parses the file.
        toml::from_str(RunConfig::DOCUMENTED).unwrap_or_else(|e| unreachable!("config.toml: {e}"))
    }
}

fn error(reason: impl Into<String>) -> Error {
    Error::Config(reason.into())
}

impl RunConfig {
    /// A configuration file with every field, its meaning and its default.
    pub const DOCUMENTED: &str = include_str!("config.toml");

    /// Reads a configuration: defaults, then the fields of `text`, then each `section.key=value` of `set`.
    ///
    /// # Errors
    /// For text that is no TOML, an unknown field (naming the nearest), a value of the wrong type or outside its range.
    pub fn parse(text: &str, set: &[String]) -> Result<RunConfig, Error> {
        let mut table: Table = toml::from_str(RunConfig::DOCUMENTED).map_err(|e| error(e.to_string()))?;
        let given: Table = toml::from_str(text).map_err(|e| error(e.to_string().trim_end().to_string()))?;
        for (section, fields) in given {
            let Value::Table(fields) = fields else {
                return Err(error(format!("{section}: fields stand in sections such as [train]")));
            };
            for (key, value) in fields {
                assign(&mut table, &section, &key, value)?;
            }
        }
        for item in set {
            let (path, value) =
                item.split_once('=').ok_or_else(|| error(format!("{item}: write section.key=value")))?;
            let (section, key) = path.split_once('.').ok_or_else(|| unknown_path(&table, path))?;
            let parsed = toml::from_str::<Table>(&format!("v = {value}")).ok().and_then(|mut t| t.remove("v"));
            // What is no TOML value is text.
            assign(&mut table, section, key, parsed.unwrap_or_else(|| Value::String(value.into())))?;
        }
        let config: RunConfig =
            Value::Table(table).try_into().map_err(|e| error(e.to_string().trim_end().to_string()))?;
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), Error> {
        let (t, d) = (&self.train, &self.data);
        let wrong = |field: &str, why: &str| Err(error(format!("{field}: {why}")));
        if t.ctx == 0 {
            return wrong("train.ctx", "it must be at least 1");
        }
        if t.rows == 0 {
            return wrong("train.rows", "it must be at least 1");
        }
        // Positions of a batch are numbered in 32 bits.
        if t.rows.checked_mul(t.ctx).is_none_or(|tokens| tokens > i32::MAX as usize) {
            return wrong("train.rows", "so many rows of ctx tokens are too many for a step; take fewer");
        }
        if t.steps == 0 && !(t.minutes > 0.0 && t.minutes <= 1e6) {
            return wrong("train.steps", "give steps, or minutes above 0 and up to a million");
        }
        for (name, v) in [("lr_init", t.lr_init), ("lr_final", t.lr_final), ("weight_decay", t.weight_decay)] {
            if !(v.is_finite() && v >= 0.0) {
                return wrong(&format!("train.{name}"), "it must be a number of at least 0");
            }
        }
        if !(t.adam_eps.is_finite() && t.adam_eps > 0.0) {
            return wrong("train.adam_eps", "it must be above 0");
        }
        if t.grad_clip.is_nan() || t.grad_clip < 0.0 {
            return wrong("train.grad_clip", "it must be at least 0 (0: no limit)");
        }
        for (name, v) in [("beta1", t.beta1), ("beta2", t.beta2)] {
            if !(0.0..1.0).contains(&v) {
                return wrong(&format!("train.{name}"), "it must be at least 0 and below 1");
            }
        }
        if let Some(l) = t.long_ce() {
            if l.stride == 0 {
                return wrong("train.long_ce_stride", "it must be at least 1");
            }
            if l.from < l.context {
                return wrong("train.long_ce_from", "it must be at least train.long_ce_context, the tokens before it");
            }
            if !(l.gamma.is_finite() && l.gamma > 0.0) {
                return wrong("train.long_ce_gamma", "it must be above 0");
            }
            if !l.reaches(t.ctx) {
                let why = format!("no target of a row of train.ctx = {} tokens would be weighted", t.ctx);
                return wrong("train.long_ce_from", &why);
            }
        }
        if !(0.0..1.0).contains(&d.held_out) {
            return wrong("data.held_out", "it must be at least 0 and below 1");
        }
        if !(0.0..=1.0).contains(&d.needles) {
            return wrong("data.needles", "it must be at least 0 and at most 1");
        }
        let most = d.needle_task.most_keys();
        if !(1..=most).contains(&d.needle_keys) {
            return wrong(
                "data.needle_keys",
                &format!("it must be at least 1 and at most {most} of {}", d.needle_task),
            );
        }
        if !(1..=d.needle_keys).contains(&d.needle_asked) {
            return wrong("data.needle_asked", "it must be at least 1 and at most data.needle_keys");
        }
        Ok(())
    }

    /// What the trainer does at each step of a run of `total` steps.
    pub fn settings(&self, total: u64) -> Settings {
        let t = &self.train;
        Settings {
            ctx: t.ctx,
            schedule: Schedule { init: t.lr_init, last: t.lr_final, warmup: t.warmup, total },
            hyper: Hyper { beta1: t.beta1, beta2: t.beta2, eps: t.adam_eps, weight_decay: t.weight_decay },
            grad_clip: t.grad_clip,
            l2wrap: t.l2wrap,
            checkpointing: t.checkpointing,
            recompute: t.recompute.least(),
            bptt: match (t.bptt, t.bptt_mode) {
                (0, _) => Bptt::Whole,
                (n, BpttMode::Exact) => Bptt::Exact(n),
                (n, BpttMode::Truncated) => Bptt::Truncated(n),
            },
            long_ce: t.long_ce(),
        }
    }
}

impl TrainConfig {
    /// Rows of a micro-batch.
    pub(crate) fn micro(&self) -> usize {
        match self.micro_rows {
            0 => self.rows,
            n => n.min(self.rows),
        }
    }

    /// Weights of targets, if they are wanted.
    pub(crate) fn long_ce(&self) -> Option<LongCe> {
        let (context, stride, from) = (self.long_ce_context, self.long_ce_stride, self.long_ce_from);
        let (gamma, normalise) = (self.long_ce_gamma, self.long_ce_normalise);
        (context > 0).then_some(LongCe { context, stride, from, gamma, normalise })
    }
}

/// Sets a field that exists.
fn assign(table: &mut Table, section: &str, key: &str, value: Value) -> Result<(), Error> {
    let sections: Vec<String> = table.keys().cloned().collect();
    let Some(Value::Table(fields)) = table.get_mut(section) else {
        let near = nearest(section, sections.iter().map(String::as_str));
        return Err(error(format!("[{section}]: no such section; did you mean [{near}]?")));
    };
    let Some(old) = fields.get(key) else {
        return Err(unknown_path(table, &format!("{section}.{key}")));
    };
    // 1 is a fine way to write 1.0.
    let value = match (old, value) {
        (Value::Float(_), Value::Integer(i)) => Value::Float(i as f64),
        (_, value) => value,
    };
    if old.type_str() != value.type_str() {
        let wanted = old.type_str();
        return Err(error(format!("{section}.{key} = {value}: it must be of type {wanted}")));
    }
    fields.insert(key.into(), value);
    Ok(())
}

fn unknown_path(table: &Table, path: &str) -> Error {
    let all: Vec<String> = table
        .iter()
        .flat_map(|(s, fields)| {
            fields.as_table().into_iter().flat_map(move |f| f.keys().map(move |k| format!("{s}.{k}")))
        })
        .collect();
    let near = nearest(path, all.iter().map(String::as_str));
    error(format!("{path}: no such field; did you mean {near}? (`anser train --defaults` lists them all)"))
}

fn nearest<'a>(word: &str, names: impl Iterator<Item = &'a str>) -> &'a str {
    // The same field in another section is nearer than another field of this one.
    let last = |s: &str| s.rsplit('.').next().unwrap_or_default().to_string();
    let distance = |n: &str| (strsim::damerau_levenshtein(&last(n), &last(word)), strsim::damerau_levenshtein(n, word));
    names.min_by_key(|n| distance(n)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str, set: &[&str]) -> Result<RunConfig, String> {
        RunConfig::parse(text, &set.iter().map(|s| s.to_string()).collect::<Vec<_>>()).map_err(|e| e.to_string())
    }

    #[test]
    fn defaults_files_and_overrides() {
        assert_eq!(parse("", &[]).unwrap(), RunConfig::default());
        assert_eq!(parse(RunConfig::DOCUMENTED, &[]).unwrap(), RunConfig::default());
        let c = parse("[train]\nlr_init = 1\nctx = 64\n", &["train.ctx=32", "model.preset=tiny", "data.order=packed"]);
        let c = c.unwrap();
        assert_eq!((c.train.lr_init, c.train.ctx, c.model.preset.as_str()), (1.0, 32, "tiny"));
        assert_eq!(c.data.order, Order::Packed);
        assert!(parse("", &["model.train_only=[\"head*\"]"]).unwrap().model.train_only == ["head*"]);
    }

    #[test]
    fn every_field_is_documented() {
        let lines: Vec<&str> = RunConfig::DOCUMENTED.lines().collect();
        let mut fields = 0;
        for pair in lines.windows(2).filter(|p| p[1].contains(" = ") && !p[1].starts_with('#')) {
            assert!(pair[0].starts_with("# "), "{} stands without a word", pair[1]);
            fields += 1;
        }
        assert_eq!(
            fields,
            toml::to_string(&RunConfig::default()).unwrap().lines().filter(|l| l.contains(" = ")).count()
        );
    }

    #[test]
    fn mistakes_are_named_with_the_nearest_field() {
        let e = |text: &str, set: &[&str]| parse(text, set).unwrap_err();
        assert!(e("[train]\nlr_innit = 1.0", &[]).contains("did you mean train.lr_init?"));
        assert!(e("[data]\nctx = 12", &[]).contains("did you mean train.ctx?"));
        assert!(e("[trian]\nctx = 12", &[]).contains("did you mean [train]?"));
        assert!(e("ctx = 12", &[]).contains("sections"));
        assert!(e("", &["stesp=3"]).contains("train.steps"));
        assert!(e("", &["train.steps"]).contains("section.key=value"));
        assert!(e("[train]\nctx = \"long\"", &[]).contains("train.ctx = \"long\": it must be of type integer"));
        assert!(e("[train]\nctx = -5", &[]).contains("-5"), "{}", e("[train]\nctx = -5", &[]));
        assert!(e("", &["data.order=random"]).contains("official"));
        assert!(e("", &["data.needle_task=niah4"]).contains("niah3"));
        assert!(e("[train\n", &[]).contains("line 1"), "{}", e("[train\n", &[]));
        for bad in [
            "train.ctx=0",
            "train.rows=0",
            "train.steps=0",
            "train.beta1=1.0",
            "data.held_out=1.0",
            "data.needles=1.5",
            "data.needles=nan",
            "data.needle_keys=0",
            "data.needle_keys=2",
            "data.needle_asked=0",
            "data.needle_asked=2",
            "train.lr_init=nan",
            "train.adam_eps=0.0",
            "train.grad_clip=-1.0",
        ] {
            assert!(e("", &[bad]).starts_with(bad.split_once('=').unwrap().0), "{bad}: {}", e("", &[bad]));
        }
        let long = ["train.ctx=64", "train.long_ce_context=16", "train.long_ce_stride=8", "train.long_ce_from=32"];
        assert!(parse("", &long).is_ok());
        assert!(e("", &["train.steps=0", "train.minutes=inf"]).contains("up to a million"));
        for (bad, says) in [
            ("train.long_ce_stride=0", "at least 1"),
            ("train.rows=1000000000000", "too many for a step"),
            ("train.long_ce_from=15", "at least train.long_ce_context"),
            ("train.long_ce_from=64", "no target of a row of train.ctx = 64"),
            ("train.long_ce_gamma=0", "above 0"),
            ("train.long_ce_gamma=inf", "above 0"),
        ] {
            let e = e("", &[&long[..], &[bad]].concat());
            assert!(e.starts_with(bad.split_once('=').unwrap().0) && e.contains(says), "{bad}: {e}");
        }
    }
}
