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

use crate::random::Random;
use crate::{Batch, Dataset, bundled};
use anser_tokenizer::Tokenizer;
use std::fmt;
use std::ops::Range;

/// What is hidden, and in what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// A pass key from 1 to 50000, said twice, in five sentences that repeat.
    Passkey,
    /// RULER's S-NIAH-1: a number of seven digits under a name, in the same sentences.
    Niah1,
    /// S-NIAH-2: such a number in a text.
    Niah2,
    /// S-NIAH-3: a UUID in a text.
    Niah3,
}

impl Task {
    /// All of them.
    pub const ALL: [Task; 4] = [Task::Passkey, Task::Niah1, Task::Niah2, Task::Niah3];

    /// Whether the haystack is a text, not sentences that repeat.
    pub fn takes_text(self) -> bool {
        matches!(self, Task::Niah2 | Task::Niah3)
    }

    /// Needles that a sample can have: as many as there are names. A pass key has none.
    pub fn most_keys(self) -> usize {
        if self == Task::Passkey { 1 } else { ADJECTIVES.len() * NOUNS.len() }
    }

    /// What it is called with so many needles in a sample.
    pub fn with_keys(self, keys: usize) -> String {
        if keys == 1 { self.to_string() } else { format!("{self} with {keys} keys") }
    }

    /// Instruction, needle and question. Between bars stand the key, by which the secret is asked for, and the value, which is the
    /// secret; the needle is without the white space before it.
    fn wording(self) -> [String; 3] {
        if self == Task::Passkey {
            return [
                "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you about \
                 the important information there.",
                "The pass key is|value|. Remember it.|value| is the pass key.",
                "\nWhat is the pass key? The pass key is",
            ]
            .map(String::from);
        }
        let what = if self == Task::Niah3 { "uuid" } else { "number" };
        [
            format!(
                "A special magic {what} is hidden within the following text. Make sure to memorize it. I will quiz you about the \
                 {what} afterwards."
            ),
            format!("One of the special magic {what}s for|key| is:|value|."),
            format!(
                "\nWhat is the special magic {what} for|key| mentioned in the provided text? The special magic {what} for|key| \
                 mentioned in the provided text is"
            ),
        ]
    }

    fn secret(self, random: &mut Random) -> String {
        match self {
            Task::Passkey => (1 + random.below(50_000)).to_string(),
            Task::Niah1 | Task::Niah2 => (1_000_000 + random.below(9_000_000)).to_string(),
            Task::Niah3 => {
                // Version 4: all bits are random but those that say so.
                let digits: String = (0..32)
                    .map(|i| match i {
                        12 => '4',
                        16 => char::from(b"89ab"[random.below(4)]),
                        _ => char::from(b"0123456789abcdef"[random.below(16)]),
                    })
                    .collect();
                [&digits[..8], &digits[8..12], &digits[12..16], &digits[16..20], &digits[20..]].join("-")
            }
        }
    }

    /// Bytes of the longest secret.
    fn longest_secret(self) -> usize {
        match self {
            Task::Passkey => 5,
            Task::Niah1 | Task::Niah2 => 7,
            Task::Niah3 => 36,
        }
    }
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Task::Passkey => "passkey",
            Task::Niah1 => "niah1",
            Task::Niah2 => "niah2",
            Task::Niah3 => "niah3",
        })
    }
}

/// The secrets are in two halves with none in common: what a model is asked in a test it has never seen in training. A hash of the
/// secret's text decides, so that neither half has digits of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keys {
    /// Those with an even hash.
    Train,
    /// Those with an odd hash.
    Test,
}

impl Keys {
    /// The half that a secret is in.
    pub fn of(secret: &str) -> Keys {
        // FNV-1a, then a step of mixing, as its lowest bit knows the lowest bits of the text only.
        let fnv = |hash: u64, byte: u8| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        let hash = secret.bytes().fold(0xcbf2_9ce4_8422_2325, fnv);
        let mixed = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
        if (mixed ^ (mixed >> 33)) & 1 == 0 { Keys::Train } else { Keys::Test }
    }
}

/// The sentences of passkey and S-NIAH-1.
const NOISE: [&str; 5] =
    ["The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."];

/// Words of a sentence of text at most: where a text has no full stops a needle must find a place too.
const WORDS: usize = 60;

/// A name that a secret goes by is one of these and one of [`NOUNS`].
const ADJECTIVES: [&str; 40] = [
    "able", "amber", "bitter", "brisk", "calm", "careful", "clever", "cold", "curious", "distant", "eager", "early",
    "fancy", "gentle", "golden", "happy", "hollow", "honest", "idle", "jolly", "keen", "lively", "lonely", "loud",
    "mellow", "narrow", "noble", "odd", "patient", "plain", "proud", "quick", "quiet", "rough", "silent", "slow",
    "steady", "tender", "warm", "young",
];
const NOUNS: [&str; 40] = [
    "anchor", "apple", "barrel", "basket", "bridge", "candle", "castle", "clock", "cloud", "copper", "desert",
    "engine", "feather", "field", "forest", "garden", "hammer", "harbor", "island", "kettle", "ladder", "lantern",
    "market", "meadow", "mirror", "mountain", "needle", "ocean", "orchard", "paper", "pencil", "river", "saddle",
    "shadow", "stone", "table", "tunnel", "valley", "window", "winter",
];

/// Makes samples of a task for a tokenizer.
pub struct Needles {
    task: Task,
    tokenizer: Tokenizer,
    /// Sentences of the haystack, each with the white space before it: a space, in S-NIAH-1 a line break.
    hay: Vec<String>,
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
        let hay = match (task, text) {
            (Task::Passkey, _) => NOISE.iter().map(|s| format!(" {s}")).collect(),
            (Task::Niah1, _) => vec![format!("\n{}", NOISE.join(" "))],
            (_, Some(text)) if !text.trim().is_empty() => sentences(text),
            _ => sentences(&bundled::corpus()),
        };
        Needles { task, tokenizer, hay, keys: 1 }
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
        let most = |words: &[&str]| words.iter().map(|w| w.len()).max().unwrap_or(0);
        let key = vec![0; 2 + most(&ADJECTIVES) + most(&NOUNS)];
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
        let space = &self.hay[0][..1];
        [fill(&instruction), fill(&format!("{space}{needle}")), fill(&question)]
    }

    /// A sample whose prompt asks for `asked` needles, one after the other: the one with `answer` last, and before it others with their answers.
    /// Where in the prompt those answers are, each with its full stop.
    fn hide(
        &self, answer: String, random: &mut Random, len: usize, depth: f64, asked: usize,
    ) -> (Sample, Vec<Range<usize>>) {
        let name = |random: &mut Random| [ADJECTIVES[random.below(ADJECTIVES.len())], NOUNS[random.below(NOUNS.len())]];
        let mut hidden = vec![(name(random), answer.clone())];
        let first = if self.task.takes_text() { random.below(self.hay.len()) } else { 0 };
        while hidden.len() < self.keys {
            let (name, secret) = (name(random), self.secret(Keys::of(&answer), random));
            if hidden.iter().all(|(n, s)| *n != name && *s != secret) {
                hidden.push((name, secret));
            }
        }
        let parts = |(name, secret): &([&str; 2], String)| self.frame(&self.word(&name.join("-")), &self.word(secret));
        let [instruction, needle, question] = parts(&hidden[0]);
        let mut others: Vec<[Vec<u32>; 3]> = hidden[1..].iter().map(parts).collect();

        // Questions before the last one, each with its answer.
        let (mut before, mut answers) = (Vec::new(), Vec::new());
        for ([_, _, question], (_, secret)) in others.iter().zip(&hidden[1..]).take(asked - 1) {
            before.extend(question);
            let start = before.len();
            before.extend([self.word(secret), self.full_stop()].concat());
            answers.push(start..before.len());
        }
        let questions = before.len() + question.len();
        let needles = needle.len() + others.iter().map(|[_, needle, _]| needle.len()).sum::<usize>();
        let frame = 1 + instruction.len() + needles + questions;
        assert!(len >= frame, "a prompt of {len} tokens has no room for {frame}");
        let mut hay = self.filler(first, len - frame);
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

    /// Sentences from the `first` on, `room` tokens in all; the last one is cut.
    fn filler(&self, first: usize, room: usize) -> Vec<Vec<u32>> {
        let (mut left, mut all) = (room, Vec::new());
        for sentence in self.hay[first..].iter().chain(self.hay.iter().cycle()) {
            if left == 0 {
                break;
            }
            let mut tokens = self.tokenizer.encode(sentence.as_bytes());
            tokens.truncate(left);
            left -= tokens.len();
            all.push(tokens);
        }
        all
    }
}

/// Sentences of a text, with one space before each and between their words: they end at full stops, question and exclamation
/// marks, or after [`WORDS`].
fn sentences(text: &str) -> Vec<String> {
    let (mut all, mut sentence, mut words) = (Vec::new(), String::new(), 0);
    for word in text.split_whitespace() {
        sentence.push(' ');
        sentence += word;
        words += 1;
        let ends = word.trim_end_matches(['"', '\'', '”', '’', ')']).ends_with(['.', '?', '!']);
        if ends || words == WORDS {
            all.push(std::mem::take(&mut sentence));
            words = 0;
        }
    }
    if words > 0 {
        all.push(sentence);
    }
    all
}

/// Rows of needle samples among rows of text, for training. A sample is its prompt, the answer, a full stop and the end of the
/// document; where several needles are asked for, questions and answers before the last ones are part of the prompt.
pub struct Mix {
    /// The samples.
    pub needles: Needles,
    /// Share of rows that hold them, 0 to 1; they are evenly spread.
    pub share: f64,
    /// Tokens of a sample at least: a row holds samples of random lengths side by side, as packed documents, while another one fits.
    /// 0: a row is one sample.
    pub shortest: usize,
    /// Needles of a sample that are asked for, one after the other, 1 to all of its keys: as many answers to learn from.
    pub asked: usize,
    /// Whether only answers are targets, or prompts too.
    pub answer_only: bool,
    /// Seed of the samples.
    pub seed: u64,
}

impl Mix {
    /// Tokens that a sample has at least in training: the shortest prompt and the longest answer.
    pub fn least(&self) -> usize {
        // A space, the secret, a full stop and the end of the document, which is a target only.
        self.needles.shortest_with(self.asked) + self.needles.task.longest_secret() + 2
    }

    /// Of the first n rows of a run so many are needles.
    fn before(&self, rows: u64) -> u64 {
        (rows as f64 * self.share) as u64
    }

    /// The batch of a step: a function of the step, like [`Dataset::train`]; rows of text come in the order that they have without
    /// needles, and none is left out.
    ///
    /// # Panics
    /// When `shortest` or the rows of the data set are shorter than [`Mix::least`].
    pub fn train(&self, data: &Dataset, step: u64, rows: usize) -> Batch {
        let first = step * rows as u64;
        let all = first..first + rows as u64;
        let is_needle = |row: u64| self.before(row + 1) > self.before(row);
        let texts = all.clone().filter(|&row| !is_needle(row)).count();
        let text = data.rows(first - self.before(first), texts);
        let (ctx, mut taken) = (data.ctx(), 0);
        let mut batch = Batch::default();
        for row in all {
            if is_needle(row) {
                batch.append(self.row(self.before(row), ctx));
            } else {
                batch.append(text.slice(ctx, taken, taken + 1));
                taken += 1;
            }
        }
        batch
    }

    /// The `stream`-th row of samples.
    fn row(&self, stream: u64, ctx: usize) -> Batch {
        let mut random = Random::new(self.seed, stream);
        let mut row = Batch::default();
        let least = if self.shortest == 0 { ctx } else { self.shortest };
        while ctx - row.tokens.len() >= least {
            let len = least + random.below(ctx - row.tokens.len() - least + 1);
            row.append(self.document(&mut random, len));
        }
        row.tokens.resize(ctx, self.needles.tokenizer.end_of_document());
        row.targets.resize(ctx, -1);
        row
    }

    /// A sample of `len` inputs.
    fn document(&self, random: &mut Random, len: usize) -> Batch {
        let Needles { tokenizer, .. } = &self.needles;
        let secret = self.needles.secret(Keys::Train, random);
        let mut answer = [self.needles.word(&secret), self.needles.full_stop()].concat();
        answer.push(tokenizer.end_of_document());
        let (prompt_len, depth) = (len + 1 - answer.len(), random.unit());
        let (sample, mut answers) = self.needles.hide(secret, random, prompt_len, depth, self.asked);
        answers.push(prompt_len..len + 1);
        let mut tokens = sample.prompt;
        tokens.extend(&answer);
        let mut targets: Vec<i32> = tokens[1..].iter().map(|&t| t as i32).collect();
        if self.answer_only {
            let mut last = 0;
            for Range { start, end } in answers {
                targets[last..start - 1].fill(-1);
                last = end - 1;
            }
        }
        tokens.pop();
        Batch::rows(tokens, targets, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Options, Order, Tokens};
    use std::collections::HashSet;

    const TEXT: &str = "It was cold. Nobody came! The geese (all \"forty\") had gone south, said the miller. Why? He did not say.\n\n\
        In spring they came back, one after the other, and sat on the pond as if nothing had been.";

    fn all(tokenizer: Tokenizer) -> Vec<Needles> {
        Task::ALL.map(|task| Needles::new(task, tokenizer, Some(TEXT))).into()
    }

    #[test]
    fn prompts_have_the_length_and_the_needle_the_depth() {
        for tokenizer in [Tokenizer::bytes(), Tokenizer::world_4096(), Tokenizer::world()] {
            for n in all(tokenizer) {
                let longest = n.hay.iter().map(|s| tokenizer.encode(s.as_bytes()).len()).max().unwrap();
                for (i, len) in [n.shortest(), n.shortest() + 1, 700, 1500].into_iter().enumerate() {
                    for depth in [0.0, 0.3, 0.5, 1.0] {
                        let s = n.sample(Keys::Test, 1, i as u64, len, depth);
                        assert_eq!(s.prompt.len(), len, "{} {}", n.task, tokenizer.name());
                        assert_eq!(s, n.sample(Keys::Test, 1, i as u64, len, depth));
                        let text = |ids: &[u32]| String::from_utf8(tokenizer.decode(ids).unwrap()).unwrap();
                        let (before, after) = (&s.prompt[..s.needle.start], &s.prompt[s.needle.end..]);
                        let (needle, whole) = (text(&s.prompt[s.needle.clone()]), text(&s.prompt));
                        // The needle is whole, and the answer is nowhere else.
                        let times = if n.task == Task::Passkey { 2 } else { 1 };
                        assert_eq!(whole.matches(&format!(" {}", s.answer)).count(), times, "{whole}");
                        assert_eq!(needle.matches(&format!(" {}", s.answer)).count(), times, "{needle}");
                        assert!(needle.ends_with('.') && whole.ends_with(" is"), "{whole}");
                        // Its depth is right within half a sentence.
                        let a = before.len() - 1 - n.frame(&[], &[])[0].len();
                        let asks = |&i: &usize| after[i..].len() < 200 && text(&after[i..]).starts_with("\nWhat is");
                        let room = a + (0..after.len()).rfind(asks).unwrap();
                        if len >= 700 {
                            let off = (a as f64 - depth * room as f64).abs();
                            assert!(off <= longest as f64 / 2.0 + 1.0, "{} {depth}: off by {off}", n.task);
                            assert!((depth > 0.0 || a == 0) && (depth < 1.0 || a == room));
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn the_wording_is_the_benchmarks() {
        let tokenizer = Tokenizer::world();
        let text = |task, len| {
            let s = Needles::new(task, tokenizer, Some(TEXT)).sample(Keys::Test, 3, 0, len, 0.5);
            (String::from_utf8(tokenizer.decode(&s.prompt).unwrap()).unwrap(), s.answer)
        };
        let (t, answer) = text(Task::Passkey, 150);
        assert!(t.starts_with("There is an important info hidden inside a lot of irrelevant text."), "{t}");
        let needle = format!(
            " Here we go. The pass key is {answer}. Remember it. {answer} is the pass key. There and back again."
        );
        assert!(t.contains(&needle), "{t}");
        assert!(t.ends_with("\nWhat is the pass key? The pass key is"));
        for (task, what) in [(Task::Niah1, "number"), (Task::Niah2, "number"), (Task::Niah3, "uuid")] {
            let (t, answer) = text(task, 300);
            assert!(
                t.starts_with(&format!("A special magic {what} is hidden within the following text. Make sure to")),
                "{t}"
            );
            let needle = t.split(&format!("One of the special magic {what}s for ")).nth(1).unwrap();
            let (key, _) = needle.split_once(&format!(" is: {answer}.")).unwrap();
            let asked = format!("special magic {what} for {key} mentioned in the provided text");
            assert!(t.ends_with(&format!("\nWhat is the {asked}? The {asked} is")), "{t}");
            assert_eq!(t.contains("forty"), task.takes_text());
            assert_eq!(t.contains("The grass is green. The sky is blue."), !task.takes_text());
        }
        let (_, uuid) = text(Task::Niah3, 300);
        let parts: Vec<usize> = uuid.split('-').map(str::len).collect();
        assert!(parts == [8, 4, 4, 4, 12] && uuid.as_bytes()[14] == b'4', "{uuid}");
    }

    /// Names and secrets of the needles in a text, in order.
    fn hidden(text: &str) -> Vec<(&str, &str)> {
        let needles = text.split("One of the special magic numbers for ").skip(1);
        needles.map(|n| n.split_once('.').unwrap().0.split_once(" is: ").unwrap()).collect()
    }

    #[test]
    fn of_many_needles_one_is_asked_for() {
        for tokenizer in [Tokenizer::bytes(), Tokenizer::world_4096()] {
            let text = |ids: &[u32]| String::from_utf8(tokenizer.decode(ids).unwrap()).unwrap();
            for keys in [2, 20] {
                let n = Needles::new(Task::Niah2, tokenizer, Some(TEXT)).with_keys(keys);
                let mut places = HashSet::new();
                for (i, len) in [n.shortest(), n.shortest() + 1, n.shortest() + 2000].into_iter().enumerate() {
                    for depth in [0.0, 0.3, 0.5, 1.0] {
                        let s = n.sample(Keys::Test, 1, i as u64, len, depth);
                        assert_eq!(s.prompt.len(), len);
                        assert_eq!(s, n.sample(Keys::Test, 1, i as u64, len, depth));
                        let whole = text(&s.prompt);
                        let all = hidden(&whole);
                        let distinct = |words: Vec<&str>| words.into_iter().collect::<HashSet<_>>().len();
                        assert_eq!(all.len(), keys, "{whole}");
                        assert_eq!(distinct(all.iter().map(|(name, _)| *name).collect()), keys);
                        assert_eq!(distinct(all.iter().map(|(_, secret)| *secret).collect()), keys);
                        assert!(all.iter().all(|(_, secret)| Keys::of(secret) == Keys::Test));
                        // The question is that of the needle at the depth.
                        let needle = text(&s.prompt[s.needle.clone()]);
                        let [(name, secret)] = hidden(&needle)[..] else { panic!("{needle}") };
                        assert_eq!(secret, s.answer);
                        let asked = format!(" {name} mentioned in the provided text is");
                        assert!(whole.ends_with(&asked), "{whole}");
                        assert_eq!(s.judge(&format!(" {secret}.")), Some(true));
                        let wrong = all.iter().find(|(_, other)| *other != secret).unwrap().1;
                        assert_eq!(s.judge(&format!(" {wrong}.")), Some(false));
                        let place = all.iter().position(|(_, s)| *s == secret).unwrap();
                        places.insert(place);
                        assert!((depth > 0.0 || place == 0) && (depth < 1.0 || place == keys - 1), "{depth}: {place}");
                        let off = (s.needle.start as f64 / len as f64 - depth).abs();
                        assert!(depth == 0.0 || depth == 1.0 || len < 2000 || off < 0.1, "{depth}: off by {off}");
                    }
                }
                assert!(keys == 2 || places.len() > 3, "{places:?}");
            }
        }
        assert_eq!((Task::Passkey.most_keys(), Task::Niah2.most_keys()), (1, 1600));
        let all = Needles::new(Task::Niah2, Tokenizer::bytes(), Some(TEXT)).with_keys(1600);
        let s = all.sample(Keys::Test, 1, 1, all.shortest(), 0.5);
        let text: Vec<u8> = s.prompt.iter().map(|&t| t as u8).collect();
        assert_eq!(hidden(&String::from_utf8(text).unwrap()).len(), 1600);
    }

    #[test]
    #[should_panic(expected = "has no room for")]
    fn a_prompt_too_short_for_its_needles_is_refused() {
        let n = Needles::new(Task::Niah2, Tokenizer::bytes(), Some(TEXT)).with_keys(20);
        n.sample(Keys::Test, 1, 0, n.shortest() - 200, 0.5);
    }

    #[test]
    fn several_questions_are_several_answers_to_learn() {
        let (ctx, data, tokenizer) = (4000, text(4000), Tokenizer::bytes());
        let mix = |asked, answer_only| {
            let needles = Needles::new(Task::Niah2, tokenizer, Some(TEXT)).with_keys(8);
            let mut m = Mix { needles, share: 1.0, shortest: 0, asked, answer_only, seed: 5 };
            m.shortest = m.least();
            m
        };
        for asked in [1, 3, 8] {
            let m = mix(asked, true);
            let b = m.train(&data, 1, 6);
            assert_eq!((b.tokens.len(), b.targets.len()), (6 * ctx, 6 * ctx));
            for (i, &start) in b.starts.iter().enumerate() {
                let end = b.starts.get(i + 1).copied().unwrap_or(b.tokens.len()).min((start / ctx + 1) * ctx);
                let text: Vec<u8> = b.tokens[start..end].iter().map(|&t| t as u8).collect();
                let text = String::from_utf8(text).unwrap();
                let all = hidden(&text);
                assert_eq!(all.len(), 8);
                // What is learnt is each answer, and the document's end after the last.
                let learnt: Vec<u8> = b.targets[start..end].iter().filter(|&&t| t >= 0).map(|&t| t as u8).collect();
                let learnt = String::from_utf8(learnt).unwrap();
                let learnt: Vec<&str> = learnt.strip_suffix(".\0").unwrap().split('.').collect();
                let questions = text.split("\nWhat is the special magic number for ").skip(1);
                let names: Vec<&str> = questions.map(|q| q.split_once(' ').unwrap().0).collect();
                assert_eq!((learnt.len(), names.len()), (asked, asked));
                assert_eq!(names.iter().collect::<HashSet<_>>().len(), asked);
                for (name, said) in names.iter().zip(learnt) {
                    assert!(all.contains(&(name, said.strip_prefix(' ').unwrap())), "{name} {said}");
                    assert_eq!(Keys::of(said.trim_start()), Keys::Train);
                }
                // Each is predicted where it is asked for.
                let asks: Vec<usize> =
                    (start + 1..end).filter(|&p| b.targets[p] >= 0 && b.targets[p - 1] < 0).map(|p| p + 1).collect();
                assert_eq!(asks.len(), asked);
                let before = |p: usize| b.tokens[start..p].iter().map(|&t| t as u8 as char).collect::<String>();
                assert!(asks.iter().all(|&p| before(p).ends_with("mentioned in the provided text is")));
            }
            let whole = mix(asked, false).train(&data, 1, 6);
            assert_eq!(whole.tokens, b.tokens);
        }
    }

    #[test]
    fn sentences_of_text() {
        let s = sentences(TEXT);
        assert_eq!(s.len(), 6, "{s:?}");
        assert_eq!(s.concat().split_whitespace().collect::<Vec<_>>(), TEXT.split_whitespace().collect::<Vec<_>>());
        assert!(s.iter().all(|s| s.starts_with(' ')) && s[2].ends_with("the miller."));
        assert_eq!(sentences(&"word ".repeat(150)).len(), 3);
        let empty = Needles::new(Task::Niah2, Tokenizer::bytes(), Some(" \n"));
        assert!(empty.hay.len() > 50_000, "the bundled text instead");
    }

    #[test]
    fn training_and_test_have_no_secret_in_common() {
        for task in Task::ALL {
            let n = Needles::new(task, Tokenizer::bytes(), Some(TEXT));
            let secrets =
                |keys| -> HashSet<String> { (0..3000).map(|i| n.secret(keys, &mut Random::new(7, i))).collect() };
            let (train, test) = (secrets(Keys::Train), secrets(Keys::Test));
            assert!(train.is_disjoint(&test) && train.len() > 2800 && test.len() > 2800, "{task}");
        }
        // Neither half has digits of its own, the last and the first included.
        let train: Vec<String> =
            (1..=50_000).map(|i: u32| i.to_string()).filter(|s| Keys::of(s) == Keys::Train).collect();
        assert!((24_500..25_500).contains(&train.len()), "{}", train.len());
        for digit in '0'..='9' {
            let last = train.iter().filter(|s| s.ends_with(digit)).count();
            assert!((2300..2700).contains(&last), "{digit}: {last}");
        }
    }

    #[test]
    fn answers_are_judged() {
        let s = Sample { prompt: vec![], needle: 0..0, answer: "123".into() };
        for (written, right) in [
            ("", None),
            (" 1", None),
            ("\n123", None),
            (" 123.", Some(true)),
            ("123 and", Some(true)),
            ("1234", Some(false)),
            (" 124", Some(false)),
            ("the 123", Some(false)),
        ] {
            assert_eq!(s.judge(written), right, "{written}");
        }
    }

    fn text(ctx: usize) -> Dataset {
        // Text has tokens from 1000 on, which bytes have not.
        let options = Options { ctx, held_out: 0.1, order: Order::Shuffled, resets: false, seed: 3 };
        Dataset::new(Tokens::Memory((1000..30_000).collect()), options).unwrap()
    }

    #[test]
    fn rows_of_samples_stand_among_rows_of_text() {
        let (ctx, data) = (500, text(500));
        let mix = |share, shortest, answer_only| {
            let needles = Needles::new(Task::Passkey, Tokenizer::bytes(), None);
            Mix { needles, share, shortest, asked: 1, answer_only, seed: 5 }
        };
        let none = mix(0.0, 0, true);
        assert_eq!(none.train(&data, 3, 4), data.train(3, 4));
        for share in [0.25, 0.3, 0.5, 1.0] {
            let m = mix(share, 0, true);
            let one = m.train(&data, 0, 40);
            let parts: Vec<Batch> = (0..10).map(|step| m.train(&data, step, 4)).collect();
            let mut joined = Batch::default();
            parts.into_iter().for_each(|b| joined.append(b));
            assert_eq!(one, joined, "a row is a function of its number");
            let rows: Vec<&[u32]> = one.tokens.chunks(ctx).collect();
            let needles = rows.iter().filter(|r| r[0] == 0).count();
            assert_eq!(needles, (40.0 * share) as usize);
            let texts: Vec<u32> = rows.iter().filter(|r| r[0] >= 1000).map(|r| r[0]).collect();
            let alone = data.train(0, 40 - needles);
            assert!(texts.iter().eq(alone.tokens.chunks(ctx).map(|r| &r[0])), "no text is left out");
        }
        // Whole prompts are targets, or answers alone: the secret, a full stop, the end.
        let (prompts, answers) = (mix(1.0, 0, false).train(&data, 0, 8), mix(1.0, 0, true).train(&data, 0, 8));
        assert_eq!((&prompts.tokens, prompts.starts.len()), (&answers.tokens, 8));
        assert!(prompts.targets.iter().all(|&t| t >= 0));
        for (x, y) in answers.tokens.chunks(ctx).zip(answers.targets.chunks(ctx)) {
            let from = y.iter().position(|&t| t >= 0).unwrap();
            let answer: Vec<u8> = y[from..].iter().map(|&t| t as u8).collect();
            let said = String::from_utf8(answer).unwrap();
            let secret = said.strip_prefix(' ').and_then(|s| s.strip_suffix(".\0")).unwrap();
            assert_eq!(Keys::of(secret), Keys::Train);
            let prompt: Vec<u8> = x[..=from].iter().map(|&t| t as u8).collect();
            assert!(String::from_utf8(prompt).unwrap().contains(&format!("The pass key is {secret}.")));
        }
    }

    #[test]
    fn samples_of_several_lengths_share_a_row() {
        let (ctx, data) = (2000, text(2000));
        let needles = Needles::new(Task::Passkey, Tokenizer::bytes(), None);
        let mut m = Mix { needles, share: 1.0, shortest: 0, asked: 1, answer_only: true, seed: 5 };
        m.shortest = m.least();
        let b = m.train(&data, 1, 30);
        assert_eq!((b.tokens.len(), b.targets.len(), b.len(ctx)), (30 * ctx, 30 * ctx, 30));
        let mut lengths = Vec::new();
        for (i, &start) in b.starts.iter().enumerate() {
            let end = b.starts.get(i + 1).copied().unwrap_or(b.tokens.len()).min((start / ctx + 1) * ctx);
            let last = (start..end).rfind(|&i| b.targets[i] >= 0).unwrap();
            assert_eq!((b.tokens[start], b.targets[last]), (0, 0), "from one end of a document to the next");
            lengths.push(last + 1 - start);
        }
        assert!(b.starts.is_sorted() && (0..30).all(|row| b.starts.contains(&(row * ctx))));
        assert!(lengths.iter().all(|&l| (m.shortest..=ctx).contains(&l)), "{lengths:?}");
        assert!(lengths.iter().any(|&l| l < ctx / 2) && lengths.iter().any(|&l| l > ctx / 2));
    }
}
