//! A needle in a haystack: a sentence with a secret stands somewhere in a long text, and at the end the secret is asked for.
//!
//! The wording is that of the tests that others report: the pass key of Mohtashami and Jaggi ("Landmark Attention", arXiv 2305.16300),
//! which RWKV-X is tested with too, and the three single needles of RULER (Hsieh et al., arXiv 2404.06654). Lengths are exact, in
//! tokens of the model's own tokenizer. With several needles under different names, of which one is asked for ([`Needles::with_keys`]), they are
//! RULER's multi-key needles: S-NIAH-2 with 4 keys is its MK-NIAH-1.
//!
//! ```
//! use anser_data::needle::{Keys, Needles, Task};
//! use anser_tokenizer::Tokenizer;
//!
//! let tokenizer = Tokenizer::world_4096();
//! let needles = Needles::new(Task::Passkey, tokenizer, None);
//! let sample = needles.sample(Keys::Test, 1, 0, 500, 0.5);
//! assert_eq!(sample.prompt.len(), 500);
//! let text = String::from_utf8(tokenizer.decode(&sample.prompt).unwrap()).unwrap();
//! assert!(text.ends_with("The pass key is") && text.contains(&format!("The pass key is {}.", sample.answer)));
//! assert_eq!(sample.judge(&format!(" {}.", sample.answer)), Some(true));
//! ```

mod hay;
mod mix;
mod names;
mod task;
#[cfg(test)]
mod tests;

pub use mix::Mix;
pub use task::{Keys, Task};

use crate::random::Random;
use anser_tokenizer::Tokenizer;
use hay::Hay;
use std::ops::Range;

/// Makes samples of a task for a tokenizer.
pub struct Needles {
    task: Task,
    tokenizer: Tokenizer,
    hay: Hay,
    /// Needles of a sample.
    keys: usize,
}

/// A prompt and what belongs after it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sample {
    /// An end of document, as before every document; instruction, haystack with the needle, question.
    pub prompt: Vec<u32>,
    /// Where in the prompt the needle is that is asked for.
    pub needle: Range<usize>,
    /// The secret.
    pub answer: String,
}

impl Sample {
    /// Whether text written after the prompt is right: the answer, after any white space, and no letter or digit directly after it.
    /// `None` while that depends on what comes next.
    pub fn judge(&self, written: &str) -> Option<bool> {
        let written = written.trim_start();
        match written.strip_prefix(&self.answer) {
            Some(rest) => rest.chars().next().map(|c| !c.is_alphanumeric()),
            None if self.answer.starts_with(written) => None,
            None => Some(false),
        }
    }
}

impl Needles {
    /// Samples of `task`. The haystack of S-NIAH-2 and 3 is `text`, by default the bundled one, cut into sentences; a sample reads it
    /// from a random sentence on, and from the start again after its end. A text without a word is as none.
    pub fn new(task: Task, tokenizer: Tokenizer, text: Option<&str>) -> Needles {
        Needles { task, tokenizer, hay: Hay::new(task, text), keys: 1 }
    }

    /// With so many needles in a sample, 1 by default: all have different names and secrets and one is asked for. The others stand at random
    /// places, as sentences of the haystack.
    ///
    /// # Panics
    /// When that is 0, or more than [`Task::most_keys`].
    pub fn with_keys(self, keys: usize) -> Needles {
        assert!((1..=self.task.most_keys()).contains(&keys), "{} needles of {}", keys, self.task);
        Needles { keys, ..self }
    }

    /// The task.
    pub fn task(&self) -> Task {
        self.task
    }

    /// Needles of a sample.
    pub fn keys(&self) -> usize {
        self.keys
    }

    /// Tokens that a prompt has at least, so that the longest secrets fit.
    pub fn shortest(&self) -> usize {
        self.shortest_with(1)
    }

    /// The same where so many needles are asked for, one after the other.
    fn shortest_with(&self, asked: usize) -> usize {
        // No tokenizer makes more tokens than there are bytes; a space comes before each word.
        let key = vec![0; 1 + names::longest()];
        let value = vec![0; 1 + self.task.longest_secret()];
        let [instruction, needle, question] = self.frame(&key, &value).map(|part| part.len());
        let answer = value.len() + self.full_stop().len();
        1 + instruction + self.keys * needle + asked * (question + answer) - answer
    }

    /// A prompt of `len` tokens, its needle at `depth` (0: before the haystack, 1: after it) as near as the ends of sentences allow, and
    /// the secret it asks for. The haystack's last sentence is cut to give the length. The same seed and stream give the same
    /// sample.
    ///
    /// # Panics
    /// When `len` is below [`Needles::shortest`].
    pub fn sample(&self, keys: Keys, seed: u64, stream: u64, len: usize, depth: f64) -> Sample {
        let mut random = Random::new(seed, stream);
        let answer = self.secret(keys, &mut random);
        self.hide(answer, &mut random, len, depth, 1).0
    }

    /// A random secret of a half.
    fn secret(&self, keys: Keys, random: &mut Random) -> String {
        loop {
            let secret = self.task.secret(random);
            if Keys::of(&secret) == keys {
                return secret;
            }
        }
    }

    /// Tokens of a key or value: with the space before it, and the same wherever it stands.
    fn word(&self, word: &str) -> Vec<u32> {
        self.tokenizer.encode(format!(" {word}").as_bytes())
    }

    fn full_stop(&self) -> Vec<u32> {
        self.tokenizer.encode(b".")
    }

    /// Tokens of an answer in a text: the secret and a full stop.
    fn answer(&self, secret: &str) -> Vec<u32> {
        [self.word(secret), self.full_stop()].concat()
    }

    /// Instruction, needle and question, as tokens.
    fn frame(&self, key: &[u32], value: &[u32]) -> [Vec<u32>; 3] {
        let fill = |sentence: &str| {
            let mut tokens = Vec::new();
            for part in sentence.split('|') {
                match part {
                    "key" => tokens.extend(key),
                    "value" => tokens.extend(value),
                    text => tokens.extend(self.tokenizer.encode(text.as_bytes())),
                }
            }
            tokens
        };
        let [instruction, needle, question] = self.task.wording();
        [fill(&instruction), fill(&format!("{}{needle}", self.hay.space())), fill(&question)]
    }

    /// A sample whose prompt asks for `asked` needles, one after the other: the one with `answer` last, and before it others with their answers.
    /// Where in the prompt those answers are, each with its full stop.
    fn hide(
        &self, answer: String, random: &mut Random, len: usize, depth: f64, asked: usize,
    ) -> (Sample, Vec<Range<usize>>) {
        let mut hidden = vec![(names::name(random), answer.clone())];
        let first = if self.task.takes_text() { random.below(self.hay.sentences().len()) } else { 0 };
        while hidden.len() < self.keys {
            let (name, secret) = (names::name(random), self.secret(Keys::of(&answer), random));
            if hidden.iter().all(|(n, s)| *n != name && *s != secret) {
                hidden.push((name, secret));
            }
        }
        let parts = |(name, secret): &(String, String)| self.frame(&self.word(name), &self.word(secret));
        let [instruction, needle, question] = parts(&hidden[0]);
        let mut others: Vec<[Vec<u32>; 3]> = hidden[1..].iter().map(parts).collect();

        // Questions before the last one, each with its answer.
        let (mut before, mut answers) = (Vec::new(), Vec::new());
        for ([_, _, question], (_, secret)) in others.iter().zip(&hidden[1..]).take(asked - 1) {
            before.extend(question);
            let start = before.len();
            before.extend(self.answer(secret));
            answers.push(start..before.len());
        }
        let questions = before.len() + question.len();
        let needles = needle.len() + others.iter().map(|[_, needle, _]| needle.len()).sum::<usize>();
        let frame = 1 + instruction.len() + needles + questions;
        assert!(len >= frame, "a prompt of {len} tokens has no room for {frame}");
        let mut hay = self.hay.tokens(&self.tokenizer, first, len - frame);
        for [_, other, _] in &mut others {
            hay.insert(random.below(hay.len() + 1), std::mem::take(other));
        }

        // Ends of sentences; the needle goes to the one that is nearest to its depth.
        let mut ends = vec![0];
        hay.iter().for_each(|s| ends.push(ends[ends.len() - 1] + s.len()));
        let wanted = (depth.clamp(0.0, 1.0) * ends[hay.len()] as f64).round() as usize;
        let place = (0..ends.len()).min_by_key(|&i| ends[i].abs_diff(wanted)).unwrap_or(0);
        let start = 1 + instruction.len() + ends[place];
        let end = start + needle.len();
        let mut prompt = vec![self.tokenizer.end_of_document()];
        prompt.extend(instruction);
        prompt.extend(hay[..place].iter().flatten());
        prompt.extend(needle);
        prompt.extend(hay[place..].iter().flatten());
        let asking = prompt.len();
        prompt.extend(before);
        prompt.extend(question);
        let answers = answers.into_iter().map(|a| asking + a.start..asking + a.end).collect();
        (Sample { prompt, needle: start..end, answer }, answers)
    }
}
