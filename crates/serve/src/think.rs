//! Tells a model's thoughts from its answer: what stands between `<think>` and `</think>`.

use anser_infer::chat::Think;

const OPEN: &str = "<think>";
const CLOSE: &str = "</think>";

/// Text of an answer, told apart.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Told {
    /// Thoughts.
    pub reasoning: String,
    /// The answer.
    pub content: String,
}

/// Takes text as it comes, in pieces cut anywhere.
pub struct Splitter {
    held: String,
    place: Place,
}

enum Place {
    /// This must come before anything else; what the prompt has begun and the model completes.
    Rest(&'static str),
    /// Thoughts or an answer begin after space.
    Begin,
    Reasoning {
        begun: bool,
    },
    Content {
        begun: bool,
    },
}

impl Splitter {
    /// For an answer to a prompt that ends as [`anser_infer::chat::user`] has it.
    pub fn new(think: Think) -> Splitter {
        let place = match think {
            Think::Off => Place::Begin,
            Think::Fast => Place::Rest(CLOSE),
            Think::On | Think::Short | Think::Long => Place::Rest(OPEN),
        };
        Splitter { held: String::new(), place }
    }

    /// Whether thoughts are being written.
    pub fn thinking(&self) -> bool {
        matches!(self.place, Place::Reasoning { .. } | Place::Rest(OPEN))
    }

    /// Takes a piece; `end` when none will follow.
    pub fn push(&mut self, piece: &str, end: bool) -> Told {
        self.held += piece;
        let mut told = Told::default();
        while self.step(&mut told, end) {}
        told
    }

    /// Whether there may be more to tell.
    fn step(&mut self, told: &mut Told, end: bool) -> bool {
        match &mut self.place {
            Place::Rest(tag) => {
                if self.held.is_empty() {
                    return false;
                }
                // The prompt has all of the tag but its last character.
                let rest = self.held.strip_prefix('>').unwrap_or(&self.held).to_string();
                self.place =
                    if *tag == OPEN { Place::Reasoning { begun: false } } else { Place::Content { begun: false } };
                self.held = rest;
                true
            }
            Place::Begin => {
                let text = self.held.trim_start();
                if let Some(thoughts) = text.strip_prefix(OPEN) {
                    (self.held, self.place) = (thoughts.into(), Place::Reasoning { begun: false });
                    return true;
                }
                if OPEN.starts_with(text) && !end {
                    return false;
                }
                self.place = Place::Content { begun: false };
                true
            }
            Place::Reasoning { begun } => {
                if let Some((thoughts, rest)) = self.held.split_once(CLOSE) {
                    told.reasoning += visible(thoughts.trim_end(), begun);
                    (self.held, self.place) = (rest.into(), Place::Content { begun: false });
                    return true;
                }
                // What may yet become the end of thoughts, and the space before it, is no part of them.
                let may_close = |n: &usize| CLOSE.starts_with(self.held[*n..].trim_end());
                let close = self.held.char_indices().map(|(n, _)| n).find(may_close).unwrap_or(self.held.len());
                let sure = if end { self.held.len() } else { self.held[..close].trim_end().len() };
                let sure: String = self.held.drain(..sure).collect();
                told.reasoning += visible(&sure, begun);
                false
            }
            Place::Content { begun } => {
                told.content += visible(&std::mem::take(&mut self.held), begun);
                false
            }
        }
    }
}

/// The text without space before its first word.
fn visible<'a>(text: &'a str, begun: &mut bool) -> &'a str {
    let text = if *begun { text } else { text.trim_start() };
    *begun |= !text.is_empty();
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Told whole, and character by character: both must be the same.
    fn told(think: Think, text: &str) -> (String, String) {
        let whole = Splitter::new(think).push(text, true);
        let mut splitter = Splitter::new(think);
        let mut sum = Told::default();
        for c in text.chars() {
            let t = splitter.push(&c.to_string(), false);
            (sum.reasoning, sum.content) = (sum.reasoning + &t.reasoning, sum.content + &t.content);
        }
        let t = splitter.push("", true);
        (sum.reasoning, sum.content) = (sum.reasoning + &t.reasoning, sum.content + &t.content);
        assert_eq!(whole, sum);
        (whole.reasoning, whole.content)
    }

    #[test]
    fn thoughts_and_answers() {
        let pair = |a: &str, b: &str| (a.to_string(), b.to_string());
        assert_eq!(told(Think::Off, " Hello  you"), pair("", "Hello  you"));
        assert_eq!(told(Think::Off, " <think> a < b \n</think>\nSo."), pair("a < b", "So."));
        assert_eq!(told(Think::Off, " <thin"), pair("", "<thin"));
        assert_eq!(told(Think::On, ">\nhm </thin no\n\n</think>\n\nYes."), pair("hm </thin no", "Yes."));
        assert_eq!(told(Think::On, ">endless </thi"), pair("endless </thi", ""));
        assert_eq!(told(Think::Fast, ">\nYes > no"), pair("", "Yes > no"));
    }
}
