//! An answer of the engine told apart: thoughts, text, calls of tools.

use crate::answer::{Answer, Finish, Part, Text};
use crate::api::Usage;
use crate::calls::{CallPart, Reader};
use crate::errors::ApiError;
use crate::think::Splitter;
use anser_infer::chat::Think;
use anser_infer::engine::TokenLogprob;

/// An answer on its way.
pub struct Reply {
    answer: Answer,
    splitter: Splitter,
    /// Where there are tools.
    reader: Option<Reader>,
    /// Tokens of the thoughts.
    reasoning: usize,
    /// Tokens of the prompt that were cached.
    cached: usize,
}

/// What a part adds to a reply.
#[derive(Default)]
pub struct Piece {
    /// Thoughts.
    pub reasoning: String,
    /// Text.
    pub content: String,
    /// Calls of tools, after the text.
    pub calls: Vec<CallPart>,
    /// The tokens.
    pub tokens: Vec<TokenLogprob>,
    /// Why it ended, with the last one.
    pub finish: Option<Finish>,
}

impl Reply {
    /// Of an answer to a prompt that ends as `think` has it; with `tools` it may call some.
    pub fn new(answer: Answer, think: Think, tools: bool) -> Reply {
        Reply { answer, splitter: Splitter::new(think), reader: tools.then(Reader::new), reasoning: 0, cached: 0 }
    }

    /// The next piece, `None` after the end.
    ///
    /// # Errors
    /// As [`Answer::next`].
    pub async fn next(&mut self) -> Result<Option<Piece>, ApiError> {
        loop {
            let (Text { text, tokens }, finish) = match self.answer.next().await? {
                Some(Part::Prompt { cached, .. }) => {
                    self.cached = cached;
                    continue;
                }
                Some(Part::Text(text)) => (text, None),
                Some(Part::End(text, finish)) => (text, Some(finish)),
                None => return Ok(None),
            };
            if self.splitter.thinking() {
                self.reasoning += tokens.len();
            }
            let told = self.splitter.push(&text, finish.is_some());
            let (content, calls) = match &mut self.reader {
                Some(reader) => reader.push(&told.content, finish.is_some()),
                None => (told.content, Vec::new()),
            };
            if self.called() {
                // A call is whole, whatever its arguments have in them.
                self.answer.lift_stops();
            }
            return Ok(Some(Piece { reasoning: told.reasoning, content, calls, tokens, finish }));
        }
    }

    /// Whether it calls a tool.
    pub fn called(&self) -> bool {
        self.reader.as_ref().is_some_and(Reader::called)
    }

    /// The tokens of the answer, after the end with those that close its turn.
    pub fn tokens(&self) -> &[u32] {
        self.answer.tokens()
    }

    /// How many tokens there were.
    pub fn usage(&self, prompt: usize) -> Usage {
        Usage { prompt, cached: self.cached, written: self.answer.written, reasoning: self.reasoning }
    }
}
