//! Needle in a haystack ([`anser_data::needle`]): how often a model finds a secret again, by the length of the prompt and the depth at
//! which the secret stands.

use crate::Error;
use crate::experiment::Results;
use anser_data::needle::{Keys, Needles, Sample, Task};
use anser_infer::engine::{Engine, Event, Request, Start};
use anser_infer::{Sampling, SavedState};
use anser_model::Cache;
use anser_tokenizer::Tokenizer;
use anser_train::heat_map;
use serde::{Deserialize, Serialize};
use std::fmt::Write;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

/// What is tested: every length with every depth.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Test {
    /// The samples.
    pub task: Task,
    /// Needles of a sample, of which one is asked for.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub keys: usize,
    /// Lengths of prompts in tokens.
    pub lengths: Vec<usize>,
    /// Number of depths, evenly from 0 to 1; one alone is in the middle.
    pub depths: usize,
    /// Samples of a length and depth.
    pub count: usize,
    /// Seed of the samples.
    pub seed: u64,
    /// Which model is asked, to tell results apart: [`anser_model::Model::fingerprint`].
    pub model: String,
    /// The type that its weights are kept in.
    #[serde(default)]
    pub dtype: String,
    /// Name of the tokenizer.
    pub tokenizer: String,
    /// Where the haystack comes from, if it is a text.
    pub text: String,
    /// The bound on what attention keeps, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cache: Option<Cache>,
}

fn one() -> usize {
    1
}

fn is_one(n: &usize) -> bool {
    *n == 1
}

/// How samples of one length and depth were answered.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cell {
    /// Tokens of a prompt.
    pub length: usize,
    /// 0: the needle stands before the haystack; 1: after it.
    pub depth: f64,
    /// Samples asked so far.
    pub asked: usize,
    /// Samples answered right.
    pub right: usize,
}

impl Cell {
    /// Share of right answers.
    pub fn share(&self) -> f64 {
        self.right as f64 / self.asked.max(1) as f64
    }
}

impl Test {
    /// Checks that there are such samples.
    ///
    /// # Errors
    /// When nothing is asked for, or a length is too short.
    pub fn validate(&self, needles: &Needles) -> Result<(), Error> {
        let wrong = |why: String| Err(Error::Input(why));
        let least = needles.shortest();
        match () {
            _ if self.lengths.is_empty() => wrong("lengths: name at least one".into()),
            _ if self.depths == 0 => wrong("depths: there must be at least 1".into()),
            _ if self.count == 0 => wrong("count: there must be at least 1 sample of a length and depth".into()),
            // The bits that they have in the number of a sample.
            _ if self.depths > 1 << 10 || self.count > 1 << 20 => {
                wrong("at most 1024 depths and 1048576 samples of each are possible".into())
            }
            _ if self.lengths.iter().any(|l| *l > 1 << 27) => {
                wrong("lengths: a prompt may have 134217728 tokens at most".into())
            }
            _ => match self.lengths.iter().find(|&&l| l < least) {
                Some(l) => wrong(format!(
                    "lengths: a prompt of {} has at least {least} tokens of {}, not {l}: name a greater length",
                    self.name(),
                    self.tokenizer
                )),
                None => Ok(()),
            },
        }
    }

    fn name(&self) -> String {
        self.task.with_keys(self.keys)
    }

    /// The i-th depth.
    fn depth(&self, i: usize) -> f64 {
        if self.depths == 1 { 0.5 } else { i as f64 / (self.depths - 1) as f64 }
    }

    /// Gives every sample to `answer`, which says what is written after its prompt. `note` gets lines of progress. With `out`, results are
    /// written there after each length and depth, and the samples that are there already are not asked again. When `stop`
    /// becomes true, the answer then in work doesn't count and the results so far come back.
    ///
    /// # Errors
    /// As [`Test::validate`]; when `out` cannot be written or holds the results of another test; what `answer` gives.
    ///
    /// # Panics
    /// When `needles` is of another task or has other keys.
    pub fn run(
        &self, needles: &Needles, out: Option<&Path>, stop: &AtomicBool, note: &dyn Fn(String),
        answer: &mut dyn FnMut(&Sample) -> Result<String, Error>,
    ) -> Result<Vec<Cell>, Error> {
        assert!((needles.task(), needles.keys()) == (self.task, self.keys));
        self.validate(needles)?;
        let mut results = Results::<Cell>::open(self, out)?;
        for (place, (length, i)) in self.lengths.iter().flat_map(|&l| (0..self.depths).map(move |i| (l, i))).enumerate()
        {
            let (start, depth) = (Instant::now(), self.depth(i));
            if results.runs.len() == place {
                results.runs.push(Cell { length, depth, asked: 0, right: 0 });
            }
            let cell = &mut results.runs[place];
            if cell.asked >= self.count {
                continue;
            }
            while cell.asked < self.count {
                // Every sample has its own secret, name and place in the text.
                let stream = (length as u64) << 30 | (i as u64) << 20 | cell.asked as u64;
                let sample = needles.sample(Keys::Test, self.seed, stream, length, depth);
                let written = answer(&sample);
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                // Nothing comes after it.
                cell.right += usize::from(sample.judge(&(written? + "\n")) == Some(true));
                cell.asked += 1;
            }
            let (Cell { asked, right, .. }, seconds) = (*cell, start.elapsed().as_secs_f64());
            if asked == 0 {
                results.runs.pop();
            }
            results.save(out)?;
            if stop.load(Ordering::SeqCst) {
                break;
            }
            let percent = 100.0 * depth;
            note(format!(
                "{}: {length} tokens, depth {percent:.0}%: {right} of {asked} right, {seconds:.1} s",
                self.name()
            ));
        }
        Ok(results.runs)
    }

    fn cell<'a>(&self, cells: &'a [Cell], length: usize, depth: usize) -> Option<&'a Cell> {
        cells.iter().find(|c| c.length == length && c.depth == self.depth(depth))
    }

    fn depth_names(&self) -> impl Iterator<Item = String> {
        (0..self.depths).map(|i| format!("{:.0}%", 100.0 * self.depth(i)))
    }

    /// Percentages of right answers as a table in Markdown, a row for every depth and at the end their mean.
    pub fn table(&self, cells: &[Cell]) -> String {
        let mut text = String::from("| depth |");
        for l in &self.lengths {
            let _ = write!(text, " {l} |");
        }
        text += "\n|---|";
        text += &"---|".repeat(self.lengths.len());
        let percent = |share: Option<f64>| share.map_or("not run".into(), |s| format!("{:.1}", 100.0 * s));
        for (i, name) in self.depth_names().enumerate() {
            let _ = write!(text, "\n| {name} |");
            for &l in &self.lengths {
                let _ = write!(text, " {} |", percent(self.cell(cells, l, i).map(Cell::share)));
            }
        }
        text += "\n| all |";
        for &l in &self.lengths {
            let all: Vec<f64> = cells.iter().filter(|c| c.length == l).map(Cell::share).collect();
            let mean = (all.len() == self.depths).then(|| all.iter().sum::<f64>() / all.len() as f64);
            let _ = write!(text, " {} |", percent(mean));
        }
        text + "\n"
    }

    /// The same as a picture (SVG).
    pub fn picture(&self, cells: &[Cell]) -> String {
        let lengths: Vec<String> = self.lengths.iter().map(usize::to_string).collect();
        let depths: Vec<String> = self.depth_names().collect();
        let row = |i| self.lengths.iter().map(|&l| self.cell(cells, l, i).map(Cell::share)).collect();
        let shares: Vec<Vec<Option<f64>>> = (0..self.depths).map(row).collect();
        heat_map(&format!("{}: right answers, %", self.name()), "tokens", &lengths, "depth", &depths, &shares)
    }
}

/// What is written after the prompt of a sample that goes on from `start`, always the most probable token, until it is clear whether it is right. When `stop`
/// becomes true, the text so far.
///
/// # Errors
/// When a token is outside the model's vocabulary, the logits are not finite, or the device fails.
pub fn write(
    engine: &Engine, start: &SavedState, tokenizer: &Tokenizer, sample: &Sample, stop: &AtomicBool,
) -> Result<String, Error> {
    let request = Request {
        prompt: sample.prompt.clone(),
        start: Start::State(start.clone()),
        sampling: Sampling { temperature: 0.0, ..Sampling::default() },
        // White space before the answer, a token a byte, and one token after it.
        max_tokens: sample.answer.len() + 8,
        stop_tokens: vec![tokenizer.end_of_document()],
        ..Request::default()
    };
    let mut stream = engine.submit(request).map_err(anser_infer::Error::from)?;
    let (mut written, mut text) = (Vec::new(), String::new());
    while let Some(event) = stream.recv_unless(stop) {
        match event {
            Event::Token(token) => {
                // A vocabulary may have ids that stand for nothing.
                let Ok(bytes) = tokenizer.token(token.token) else { break };
                written.extend_from_slice(bytes);
                text = String::from_utf8_lossy(&written).into_owned();
                if sample.judge(&text).is_some() {
                    break;
                }
            }
            Event::End(end) => drop(end.checked()?),
            Event::Prompt { .. } | Event::State(_) => {}
        }
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use anser_infer::{EngineOptions, Session};
    use anser_model::{Config, Init, Model};
    use anser_tensor::Context;
    use std::sync::Arc;

    fn test(task: Task, depths: usize) -> (Needles, Test) {
        let tokenizer = Tokenizer::bytes();
        let needles =
            Needles::new(task, tokenizer, Some("Geese fly south. They come back, in time. Nobody knows why."));
        let (text, model) = (String::new(), "stub".into());
        let lengths = vec![needles.shortest(), 1000];
        (
            needles,
            Test {
                task,
                keys: 1,
                lengths,
                depths,
                count: 3,
                seed: 1,
                model,
                dtype: "f32".into(),
                tokenizer: "bytes".into(),
                text,
                cache: None,
            },
        )
    }

    /// Reads what stands in the prompt between two texts.
    fn look_up(sample: &Sample, from: &str, to: &str) -> Result<String, Error> {
        let prompt: Vec<u8> = sample.prompt.iter().map(|&t| t as u8).collect();
        let prompt = String::from_utf8(prompt).unwrap();
        let (_, rest) = prompt.split_once(from).unwrap();
        Ok(rest.split_once(to).unwrap().0.to_string())
    }

    #[test]
    fn who_finds_the_secret_has_all_and_who_is_silent_has_none() {
        let go = AtomicBool::new(false);
        for (task, from) in
            [(Task::Passkey, "The pass key is"), (Task::Niah1, " is:"), (Task::Niah2, " is:"), (Task::Niah3, " is:")]
        {
            let (needles, t) = test(task, 4);
            let share = |answer: &mut dyn FnMut(&Sample) -> Result<String, Error>| {
                let cells = t.run(&needles, None, &go, &|_| {}, answer).unwrap();
                assert!(cells.len() == 8 && cells.iter().all(|c| c.asked == 3));
                cells.iter().map(Cell::share).sum::<f64>() / 8.0
            };
            assert_eq!(share(&mut |s| look_up(s, from, ".")), 1.0, "{task}");
            assert_eq!(share(&mut |s| look_up(s, from, ".").map(|t| t + ". And so on")), 1.0, "{task}");
            assert_eq!(share(&mut |_| Ok(String::new())), 0.0, "{task}");
            assert_eq!(share(&mut |s| look_up(s, from, ".").map(|t| t + "0")), 0.0, "{task}: another secret");
            assert_eq!(share(&mut |s| look_up(s, from, ".").map(|t| t[..t.len() - 1].into())), 0.0, "{task}: cut");
            // Who remembers the last 500 tokens only finds what stands there.
            let forgetful = &mut |s: &Sample| match s.needle.start + 500 > s.prompt.len() {
                true => look_up(s, from, "."),
                false => Ok("no".into()),
            };
            let cells = t.run(&needles, None, &go, &|_| {}, forgetful).unwrap();
            let at = |depth| cells.iter().find(|c| c.length == 1000 && c.depth == depth).unwrap().share();
            assert_eq!((at(0.0), at(1.0)), (0.0, 1.0), "{task}");
        }
        // Of many needles the first is the right one at the start only.
        let (needles, t) = test(Task::Niah2, 2);
        let needles = needles.with_keys(4);
        let t = Test { keys: 4, lengths: vec![1500], ..t };
        let cells = t.run(&needles, None, &go, &|_| {}, &mut |s| look_up(s, " is:", ".")).unwrap();
        assert_eq!(cells.iter().map(|c| (c.asked, c.right)).collect::<Vec<_>>(), [(3, 3), (3, 0)]);
        assert!(t.picture(&cells).contains("niah2 with 4 keys"));
    }

    #[test]
    fn an_interrupted_test_goes_on_and_another_test_is_refused() {
        let (needles, t) = test(Task::Passkey, 2);
        let path = std::env::temp_dir().join(format!("anser-needle-{}.json", std::process::id()));
        let _ = std::fs::remove_file(&path);
        let (mut seen, stop) = (Vec::new(), AtomicBool::new(false));
        let cells = t.run(&needles, Some(&path), &stop, &|_| {}, &mut |s| {
            seen.push(s.clone());
            // While the fifth is in work, the second of the second cell.
            stop.store(seen.len() == 5, Ordering::SeqCst);
            look_up(s, "The pass key is", ".")
        });
        assert_eq!(cells.unwrap().iter().map(|c| (c.asked, c.right)).collect::<Vec<_>>(), [(3, 3), (1, 1)]);
        seen.pop();
        let go = AtomicBool::new(false);
        let mut finish = || {
            t.run(&needles, Some(&path), &go, &|_| {}, &mut |s| {
                seen.push(s.clone());
                Ok(String::new())
            })
        };
        let cells = finish().unwrap();
        let right: Vec<_> = cells.iter().map(|c| (c.asked, c.right)).collect();
        assert_eq!(right, [(3, 3), (3, 1), (3, 0), (3, 0)]);
        assert_eq!(finish().unwrap(), cells);
        let mut whole = Vec::new();
        let all = t.run(&needles, None, &go, &|_| {}, &mut |s| {
            whole.push(s.clone());
            Ok(String::new())
        });
        assert!(all.is_ok() && whole == seen, "each sample is asked once, in order");
        assert!((1..12).all(|i| whole[i].answer != whole[i - 1].answer));
        let other = Test { seed: 2, ..t };
        let e = other.run(&needles, Some(&path), &go, &|_| {}, &mut |_| Ok(String::new())).unwrap_err().to_string();
        assert!(e.contains("another experiment"), "{e}");
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn results_are_shown_by_depth_and_length() {
        let (_, t) = test(Task::Niah2, 3);
        let cell = |length, depth, right| Cell { length, depth, asked: 3, right };
        let cells = [
            cell(t.lengths[0], 0.0, 0),
            cell(t.lengths[0], 0.5, 1),
            cell(t.lengths[0], 1.0, 3),
            cell(t.lengths[1], 0.0, 2),
        ];
        let (table, l) = (t.table(&cells), t.lengths[0]);
        let rows = ["| 0% | 0.0 | 66.7 |", "| 50% | 33.3 | not run |", "| 100% | 100.0 | not run |"];
        let want = format!("| depth | {l} | 1000 |\n|---|---|---|\n{}\n| all | 44.4 | not run |\n", rows.join("\n"));
        assert_eq!(table, want);
        let picture = t.picture(&cells);
        assert!(picture.contains(">33.3<") && picture.contains(">50%<") && picture.contains(">1000<"));
    }

    #[test]
    fn what_cannot_be_asked_is_named() {
        let (needles, t) = test(Task::Passkey, 2);
        let e = |t: Test| t.validate(&needles).unwrap_err().to_string();
        let short = needles.shortest() - 1;
        let said = e(Test { lengths: vec![1000, short], ..t.clone() });
        assert!(said.contains(&format!("{} tokens of bytes, not {short}", short + 1)), "{said}");
        assert!(e(Test { depths: 0, ..t.clone() }).contains("depths"));
        assert!(e(Test { count: 0, ..t.clone() }).contains("count"));
        assert!(e(Test { lengths: vec![1000, 1 << 40], ..t.clone() }).contains("at most"));
        assert!(e(Test { lengths: vec![], ..t }).contains("lengths"));
        let needles = Needles::new(Task::Niah2, Tokenizer::bytes(), None).with_keys(50);
        let (_, t) = test(Task::Niah2, 2);
        let said = Test { keys: 50, ..t }.validate(&needles).unwrap_err().to_string();
        assert!(said.contains("a prompt of niah2 with 50 keys has at least"), "{said}");
    }

    #[test]
    fn a_model_is_asked_and_says_something() {
        let ctx = Context::cpu(1);
        let (needles, t) = test(Task::Passkey, 1);
        let mut model = Arc::new(Model::init(&ctx, &Config::new(1, 64, 256), Init::Noise, 3).unwrap());
        let (tokenizer, go) = (Tokenizer::bytes(), AtomicBool::new(false));
        let start = SavedState::beginning(&ctx, &model, None, None).unwrap();
        let run = |model: &Arc<Model>| {
            let options = EngineOptions { slots: 1, cache_bytes: 0, ..EngineOptions::default() };
            Engine::start(ctx.clone(), model.clone(), options).unwrap()
        };
        let engine = run(&model);
        let cells = t.run(&needles, None, &go, &|_| {}, &mut |s| write(&engine, &start, &tokenizer, s, &go)).unwrap();
        assert!(cells.len() == 2 && cells.iter().all(|c| c.right == 0));
        // It is the most probable text: a session's own choice, byte by byte.
        let s = needles.sample(Keys::Test, 1, 0, 500, 0.5);
        let text = write(&engine, &start, &tokenizer, &s, &go).unwrap();
        let mut session = Session::new(&ctx, &model);
        session.feed(&s.prompt).unwrap();
        let logits = session.logits().unwrap();
        let best = (0..256).max_by(|&a, &b| logits[a].total_cmp(&logits[b])).unwrap();
        assert!(
            best == 0 || String::from_utf8_lossy(&[best as u8]).starts_with(text.chars().next().unwrap()),
            "{text}"
        );
        let stopped = AtomicBool::new(true);
        assert_eq!(write(&engine, &start, &tokenizer, &s, &stopped).unwrap(), "");
        drop(engine);
        drop(session);
        Arc::get_mut(&mut model).unwrap().params_mut().values_mut().fill(f32::NAN);
        assert!(write(&run(&model), &start, &tokenizer, &s, &go).is_err());
    }
}
