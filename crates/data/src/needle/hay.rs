//! What needles are hidden in: sentences that repeat, or a text's.

use super::Task;
use crate::bundled;
use anser_tokenizer::Tokenizer;

/// The sentences of passkey and S-NIAH-1.
const NOISE: [&str; 5] =
    ["The grass is green.", "The sky is blue.", "The sun is yellow.", "Here we go.", "There and back again."];

/// Words of a sentence of text at most: where a text has no full stops a needle must find a place too.
const WORDS: usize = 60;

/// Sentences, each with the white space before it: a space, in S-NIAH-1 a line break.
pub(super) struct Hay(Vec<String>);

impl Hay {
    /// That of a task; tasks in text take `text`, or the bundled one where it has no word.
    pub(super) fn new(task: Task, text: Option<&str>) -> Hay {
        Hay(match (task, text) {
            (Task::Passkey, _) => NOISE.iter().map(|s| format!(" {s}")).collect(),
            (Task::Niah1, _) => vec![format!("\n{}", NOISE.join(" "))],
            (_, Some(text)) if !text.trim().is_empty() => sentences(text),
            _ => sentences(&bundled::corpus()),
        })
    }

    /// The sentences.
    pub(super) fn sentences(&self) -> &[String] {
        &self.0
    }

    /// The white space before every sentence.
    pub(super) fn space(&self) -> &str {
        &self.0[0][..1]
    }

    /// Tokens of sentences from the `first` on, and from the start again after the last one: `room` in all, for which the last one is cut.
    pub(super) fn tokens(&self, tokenizer: &Tokenizer, first: usize, room: usize) -> Vec<Vec<u32>> {
        let (mut left, mut all) = (room, Vec::new());
        for sentence in self.0[first..].iter().chain(self.0.iter().cycle()) {
            if left == 0 {
                break;
            }
            let mut tokens = tokenizer.encode(sentence.as_bytes());
            tokens.truncate(left);
            left -= tokens.len();
            all.push(tokens);
        }
        all
    }
}

/// Sentences of a text, with one space before each and between their words: they end at full stops, question and exclamation
/// marks, or after [`WORDS`].
pub(super) fn sentences(text: &str) -> Vec<String> {
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
