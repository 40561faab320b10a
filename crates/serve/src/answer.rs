//! One answer of the engine as text: characters whole, ended before stop texts, each token's log probability with its text.

use crate::App;
use crate::errors::{ApiError, blocking};
use crate::reply::Parser;
use anser_infer::engine::{Constraint, End, Event, Next, Request, Start, Stream, TokenLogprob};
use anser_infer::{Cut, TextStream};
use anser_tokenizer::Tokenizer;
use axum::http::StatusCode;
use std::time::Instant;

/// What comes of an answer: one `Prompt`, texts, one `End`.
pub enum Part {
    /// The prompt was read.
    Prompt {
        /// Tokens that were not read, as a state after them was cached.
        cached: usize,
        /// Of all tokens but the first, where asked for.
        logprobs: Vec<TokenLogprob>,
        /// The last hidden vector, where asked for.
        hidden: Option<Vec<f32>>,
    },
    /// Text was written.
    Text(Text),
    /// Nothing more will come.
    End(Text, Finish),
}

/// A piece of text and the tokens that it ends.
#[derive(Default)]
pub struct Text {
    /// The text.
    pub text: String,
    /// The tokens. A token whose characters are not whole comes with the text that completes them.
    pub tokens: Vec<TokenLogprob>,
}

/// Why an answer ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finish {
    /// It has as many tokens as were asked for.
    Length,
    /// The model ended it, or the constraint is satisfied.
    Stop,
    /// Before this stop text.
    StopText(String),
}

impl Finish {
    /// OpenAI's word for it.
    pub fn word(&self) -> &'static str {
        if *self == Finish::Length { "length" } else { "stop" }
    }
}

/// An answer on its way.
pub struct Answer {
    app: App,
    stream: Stream,
    text: TextStream,
    /// Tokens since all text was out.
    held: Vec<TokenLogprob>,
    /// The tokens of the answer.
    tokens: Vec<u32>,
    /// Text that follows the answer where a conversation goes on from it.
    close: &'static str,
    /// Tokens written so far.
    pub written: usize,
    started: Instant,
    deadline: tokio::time::Instant,
    last: Option<Instant>,
    ended: bool,
    keep: Option<Keep>,
}

/// A state that is kept at the end.
struct Keep {
    owner: String,
    name: String,
}

/// Ends an answer before a stop text, in the engine, whose state is then that before it, or where a grammar does.
struct Ends {
    text: TextStream,
    reader: Option<Parser>,
    grammar: Option<Box<dyn Constraint>>,
    tokenizer: Tokenizer,
}

impl Constraint for Ends {
    fn mask(&mut self, logits: &mut [f32]) -> Result<(), String> {
        self.grammar.as_mut().map_or(Ok(()), |g| g.mask(logits))
    }

    fn accept(&mut self, token: u32) -> Result<Next, String> {
        let next = self.grammar.as_mut().map_or(Ok(Next::More), |g| g.accept(token))?;
        let (text, cut) = self.text.push(bytes(&self.tokenizer, token));
        if let Some(cut) = cut {
            return Ok(Next::Cut(cut.whole));
        }
        if let Some(reader) = &mut self.reader {
            reader.push(&text, false);
            if reader.called() {
                self.text.lift_stops();
                self.reader = None;
            }
        }
        Ok(next)
    }

    fn masks(&self) -> bool {
        self.grammar.as_ref().is_some_and(|g| g.masks())
    }
}

impl Answer {
    /// Submits a request. Stop texts end it until `reader`, if there is one, has read a call of a tool. Where a conversation goes on from it,
    /// `close` follows the answer.
    ///
    /// # Errors
    /// When the engine refuses it.
    pub async fn start(
        app: &App, mut request: Request, stops: &[String], reader: Option<Parser>, close: &'static str,
    ) -> Result<Answer, ApiError> {
        // Without a state to keep an answer ends when nobody reads it any more.
        if request.save_as.is_some() && !stops.is_empty() {
            let (text, grammar) = (TextStream::new(stops), request.constraint.take());
            request.constraint = Some(Box::new(Ends { text, reader, grammar, tokenizer: app.tokenizer }));
        }
        let keep = request.save_as.clone().map(|name| Keep { owner: request.owner.clone(), name });
        let stream = submit(app, request).await?;
        Ok(Answer {
            app: app.clone(),
            stream,
            text: TextStream::new(stops),
            held: Vec::new(),
            tokens: Vec::new(),
            close,
            written: 0,
            started: Instant::now(),
            deadline: tokio::time::Instant::now() + app.options.timeout,
            last: None,
            ended: false,
            keep,
        })
    }

    /// The next part, `None` after the end.
    ///
    /// # Errors
    /// When the engine fails or ends, or the time is over.
    pub async fn next(&mut self) -> Result<Option<Part>, ApiError> {
        if self.ended {
            return Ok(None);
        }
        loop {
            let event = tokio::time::timeout_at(self.deadline, self.stream.next()).await.map_err(|_| {
                ApiError::new(StatusCode::GATEWAY_TIMEOUT, "the answer took longer than this server allows (--timeout)")
            })?;
            match event {
                Some(Event::Prompt { cached, logprobs, hidden, .. }) => {
                    return Ok(Some(Part::Prompt { cached, logprobs, hidden }));
                }
                Some(Event::Token(token)) => {
                    if let Some(part) = self.token(token).await? {
                        return Ok(Some(part));
                    }
                }
                // Not asked for.
                Some(Event::State(_)) => {}
                Some(Event::End(end)) => return self.end(end).await.map(Some),
                None => return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the engine ended")),
            }
        }
    }

    /// No stop text ends what comes from now on.
    pub fn lift_stops(&mut self) {
        self.text.lift_stops();
    }

    async fn token(&mut self, token: TokenLogprob) -> Result<Option<Part>, ApiError> {
        let now = Instant::now();
        match self.last.replace(now) {
            Some(last) => self.app.metrics.between.observe((now - last).as_secs_f64()),
            None => self.app.metrics.first.observe((now - self.started).as_secs_f64()),
        }
        self.written += 1;
        let bytes = bytes(&self.app.tokenizer, token.token);
        self.tokens.push(token.token);
        self.held.push(token);
        let (text, cut) = self.text.push(bytes);
        if let Some(cut) = cut {
            return self.stopped(text, cut).await.map(Some);
        }
        let tokens = if self.text.is_clear() { std::mem::take(&mut self.held) } else { Vec::new() };
        Ok((!text.is_empty() || !tokens.is_empty()).then_some(Part::Text(Text { text, tokens })))
    }

    /// Ends before a stop text: tokens that begin in it are no part of the answer.
    async fn stopped(&mut self, text: String, cut: Cut) -> Result<Part, ApiError> {
        self.ended = true;
        let mut tokens = std::mem::take(&mut self.held);
        tokens.truncate(cut.begun.saturating_sub(self.written - tokens.len()));
        self.tokens.truncate(cut.whole);
        if self.keep.is_some() {
            kept(&mut self.stream).await?;
        }
        self.close(&cut.rest).await?;
        Ok(Part::End(Text { text, tokens }, Finish::StopText(cut.stop)))
    }

    /// The conversation goes on over what the answer has beyond its last whole token, and over the end of a turn, unless the model has
    /// written it; a kept state does.
    async fn close(&mut self, rest: &[u8]) -> Result<(), ApiError> {
        let last: Vec<u8> =
            self.tokens.iter().rev().take(2).rev().flat_map(|t| bytes(&self.app.tokenizer, *t)).copied().collect();
        let written = rest.is_empty() && last.ends_with(self.close.as_bytes());
        let close = if written { "" } else { self.close };
        let prompt = self.app.tokenizer.encode(&[rest, close.as_bytes()].concat());
        self.tokens.extend(&prompt);
        let Some(keep) = self.keep.take().filter(|_| !prompt.is_empty()) else { return Ok(()) };
        let start = Start::Named(keep.name.clone());
        let request =
            Request { prompt, start, owner: keep.owner, save_as: Some(keep.name), max_tokens: 0, ..Request::default() };
        kept(&mut submit(&self.app, request).await?).await
    }

    /// The tokens of the answer, after the end with those that close its turn.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    async fn end(&mut self, end: End) -> Result<Part, ApiError> {
        self.ended = true;
        let finish = match end {
            End::Length => Finish::Length,
            End::Stop | End::Constraint => Finish::Stop,
            End::Cancelled => {
                return Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the server is shutting down"));
            }
            End::Unreachable(why) => return Err(ApiError::unreachable(why)),
            End::Failed(why) => return Err(ApiError::internal(why)),
        };
        self.close(b"").await?;
        let text = std::mem::take(&mut self.text).finish();
        Ok(Part::End(Text { text, tokens: std::mem::take(&mut self.held) }, finish))
    }
}

/// Gives the engine a request. What a name stands for may be far away.
async fn submit(app: &App, request: Request) -> Result<Stream, ApiError> {
    let engine = app.engine.clone();
    Ok(match request.start {
        Start::Empty | Start::State(_) => engine.submit(request)?,
        Start::Named(_) => blocking(move || engine.submit(request)).await??,
    })
}

/// Waits for the end of a request whose state is kept.
async fn kept(stream: &mut Stream) -> Result<(), ApiError> {
    while let Some(event) = stream.next().await {
        match event {
            Event::End(End::Failed(why)) => return Err(ApiError::internal(why)),
            Event::End(End::Unreachable(why)) => return Err(ApiError::unreachable(why)),
            _ => {}
        }
    }
    Ok(())
}

/// The bytes of a token; none for ids that only the model has.
pub fn bytes(tokenizer: &Tokenizer, token: u32) -> &'static [u8] {
    tokenizer.token(token).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use anser_infer::chat::Think;

    /// Where answers end that would be these texts, a token at a time.
    fn ends(text: &str, tools: bool) -> Option<Next> {
        let tokenizer = Tokenizer::world_4096();
        let reader = tools.then(|| Parser::new(Think::Off, true));
        let stream = TextStream::new(&["STOP".into()]);
        let mut ends = Ends { text: stream, reader, grammar: None, tokenizer };
        assert!(!ends.masks());
        let tokens = tokenizer.encode(text.as_bytes());
        tokens.into_iter().map(|t| ends.accept(t).unwrap()).find(|next| *next != Next::More)
    }

    #[test]
    fn stop_texts_end_what_is_kept_unless_a_tool_is_called() {
        let call = "Sure.\n\n**Tool Call:**\n```json\n{\"name\": \"a\", \"arguments\": {\"x\": \"STOP\"}}\n```";
        assert_eq!(ends(call, true), None);
        assert!(matches!(ends(call, false), Some(Next::Cut(_))));
        assert_eq!(ends("STOP", true), Some(Next::Cut(0)));
        // Before the marker it ends a text that has tools, too.
        let before = ends(&format!("Sure. STOP {call}"), true);
        let whole = Tokenizer::world_4096().encode(b"Sure. ").len();
        assert!(matches!(before, Some(Next::Cut(n)) if (1..=whole).contains(&n)), "{before:?}");
        assert_eq!(ends("Sure.", true), None);
    }
}
