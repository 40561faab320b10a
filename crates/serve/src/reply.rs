//! An answer of the engine told apart: thoughts, text, calls of tools.

use crate::App;
use crate::answer::{Answer, Finish, Part, Text};
use crate::api::Usage;
use crate::api::conversation::Turn;
use crate::calls::{CallPart, Reader};
use crate::errors::ApiError;
use crate::think::Splitter;
use anser_infer::chat::Think;
use anser_infer::engine::{Request, TokenLogprob};

/// Tells the text of an answer apart as it comes.
pub struct Parser {
    splitter: Splitter,
    /// Where there are tools.
    reader: Option<Reader>,
}

impl Parser {
    /// For an answer to a prompt that ends as `think` has it; with `tools` it may call some.
    pub fn new(think: Think, tools: bool) -> Parser {
        Parser { splitter: Splitter::new(think), reader: tools.then(Reader::new) }
    }

    /// Takes a piece, `end` when none will follow: thoughts, text and calls.
    pub fn push(&mut self, text: &str, end: bool) -> (String, String, Vec<CallPart>) {
        let told = self.splitter.push(text, end);
        let (content, calls) = match &mut self.reader {
            Some(reader) => reader.push(&told.content, end),
            None => (told.content, Vec::new()),
        };
        (told.reasoning, content, calls)
    }

    /// Whether it calls a tool: a call is whole, whatever its arguments have in them.
    pub fn called(&self) -> bool {
        self.reader.as_ref().is_some_and(Reader::called)
    }
}

/// An answer on its way.
pub struct Reply {
    answer: Answer,
    parser: Parser,
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
    /// Submits a request of a turn.
    ///
    /// # Errors
    /// When the engine refuses it.
    pub async fn start(app: &App, request: Request, turn: &Turn) -> Result<Reply, ApiError> {
        let parser = || Parser::new(turn.think, turn.tools);
        let close = app.options.template.turn_end();
        let answer = Answer::start(app, request, &turn.options.stops, turn.tools.then(parser), close).await?;
        Ok(Reply { answer, parser: parser(), reasoning: 0, cached: 0 })
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
            if self.parser.splitter.thinking() {
                self.reasoning += tokens.len();
            }
            let (reasoning, content, calls) = self.parser.push(&text, finish.is_some());
            if self.called() {
                self.answer.lift_stops();
            }
            return Ok(Some(Piece { reasoning, content, calls, tokens, finish }));
        }
    }

    /// Whether it calls a tool.
    pub fn called(&self) -> bool {
        self.parser.called()
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
