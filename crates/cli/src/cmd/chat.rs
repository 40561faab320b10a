use crate::cmd::answer::Ends;
use crate::cmd::generate::Common;
use crate::global::{Global, Interrupted, idle, stop};
use anser_infer::chat::{self, Think};
use anser_infer::engine::{End, Engine, Event, Request, Start};
use anser_infer::{Sampler, SavedState, TextStream};
use anser_model::Model;
use anser_tensor::Context;
use anser_tokenizer::Tokenizer;
use anyhow::Context as _;
use serde_json::json;
use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Talks with a model: a line is a turn; /help lists the commands
#[derive(clap::Args)]
pub struct Args {
    #[command(flatten)]
    common: Common,
    /// Stands before the first turn
    #[arg(long)]
    system: Option<String>,
    /// How the model thinks before it answers: off, fast, on, short or long
    #[arg(long, default_value = "off")]
    think: Think,
    /// Tokens of an answer at most
    #[arg(long, default_value_t = 1024)]
    max_tokens: usize,
    /// Go on with a saved conversation
    #[arg(long)]
    load_state: Option<PathBuf>,
    /// Save the conversation after every turn
    #[arg(long)]
    save_state: Option<PathBuf>,
}

const HELP: &str = "/new  start over\n/retry  another answer\n/think off|fast|on|short|long\n/save FILE  /load FILE  the conversation's state\n/exit";

/// A conversation.
struct Talk<'a> {
    args: &'a Args,
    global: &'a Global,
    ctx: Context,
    model: Arc<Model>,
    tokenizer: Tokenizer,
    engine: Engine,
    /// After the last turn.
    state: SavedState,
    /// As after all tokens that it has chosen.
    sampler: Sampler,
    think: Think,
    turns: Vec<serde_json::Value>,
    /// Before the last turn, for /retry: the state and what the user said.
    last: Option<(SavedState, String)>,
}

/// Runs the subcommand.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let sampler = Sampler::new(args.common.sampling())?;
    let ctx = global.context()?;
    let (model, tokenizer) = args.common.source.load(&ctx, global)?;
    let model = Arc::new(model);
    let state = args.common.begin(&ctx, &model, args.load_state.as_deref())?;
    let engine = args.common.source.engine(&ctx, &model, state.bound())?;
    let (turns, last, think) = (Vec::new(), None, args.think);
    let mut talk = Talk { args, global, ctx, model, tokenizer, engine, state, sampler, think, turns, last };
    if args.load_state.is_none() {
        talk.system()?;
    }
    // A file that cannot be written is found before the first word.
    talk.save()?;
    let stdin = std::io::stdin();
    let terminal = stdin.is_terminal();
    if terminal {
        global.note("Type a message; /help lists the commands, Ctrl-D ends.");
    }
    loop {
        if terminal && !global.quiet {
            let _ = write!(std::io::stderr(), "> ");
        }
        let mut line = String::new();
        if idle(|| stdin.lock().read_line(&mut line))? == 0 {
            break;
        }
        let line = line.trim();
        let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
        let outcome = match command {
            "" => continue,
            "/exit" | "/quit" => break,
            "/help" => {
                global.note(HELP);
                continue;
            }
            "/new" => {
                args.common.begin(&talk.ctx, &talk.model, None).and_then(|s| talk.go_on(s)).and_then(|()| talk.system())
            }
            "/save" | "/load" if rest.trim().is_empty() => Err(anyhow::anyhow!("name the file: {command} FILE")),
            "/save" => talk.state.save(&talk.ctx, &talk.model, Path::new(rest.trim())).map_err(Into::into),
            "/load" => {
                // It says itself what attention keeps.
                let saved = SavedState::open(&talk.ctx, &talk.model, Path::new(rest.trim()));
                saved.map_err(Into::into).and_then(|s| talk.go_on(s))
            }
            "/think" => rest.trim().parse().map(|t| talk.think = t).map_err(anyhow::Error::msg),
            "/retry" => match talk.last.take() {
                Some((before, said)) => {
                    talk.turns.pop();
                    talk.go_on(before).and_then(|()| talk.turn(&said))
                }
                None => Err(anyhow::anyhow!("there is no answer yet")),
            },
            c if c.starts_with('/') => Err(anyhow::anyhow!("no command {c}; /help lists them")),
            _ => talk.turn(line),
        };
        // Saved after every turn: nothing is lost however the conversation ends.
        talk.save()?;
        match outcome {
            Ok(()) => {}
            // A slip of the keyboard doesn't end a conversation; a script wants to know.
            Err(e) if terminal && !e.is::<Interrupted>() => global.note(format!("{e:#}")),
            Err(e) => return Err(e),
        }
    }
    global.result(json!({ "turns": talk.turns }), String::new)
}

impl Talk<'_> {
    fn save(&self) -> anyhow::Result<()> {
        let Some(path) = &self.args.save_state else { return Ok(()) };
        Ok(self.state.save(&self.ctx, &self.model, path)?)
    }

    /// Goes on from another state, which may have another bound on what attention keeps.
    fn go_on(&mut self, from: SavedState) -> anyhow::Result<()> {
        if from.bound() != self.state.bound() {
            self.engine = self.args.common.source.engine(&self.ctx, &self.model, from.bound())?;
        }
        self.state = from;
        Ok(())
    }

    /// Reads what stands before the first turn.
    fn system(&mut self) -> anyhow::Result<()> {
        if let Some(text) = &self.args.system {
            self.state = self.read(&self.state, self.tokenizer.encode(chat::system(text).as_bytes()), stop())?;
        }
        Ok(())
    }

    /// The state after some more tokens, unless `stop` becomes true before.
    fn read(&self, from: &SavedState, prompt: Vec<u32>, stop: &AtomicBool) -> anyhow::Result<SavedState> {
        let start = Start::State(from.clone());
        let request = Request { prompt, start, max_tokens: 0, keep_state: true, ..Request::default() };
        let (mut stream, mut kept) = (self.engine.submit(request)?, None);
        while let Some(event) = stream.recv_unless(stop) {
            match event {
                Event::State(state) => kept = Some(state),
                Event::End(end) => drop(end.checked()?),
                Event::Prompt { .. } | Event::Token(_) => {}
            }
        }
        match kept {
            Some(state) => Ok(state),
            None if stop.load(Ordering::SeqCst) => Err(Interrupted.into()),
            None => anyhow::bail!("the engine has kept no state"),
        }
    }

    /// One turn: reads what the user said, streams the answer, and leaves the state ready for the next turn.
    fn turn(&mut self, said: &str) -> anyhow::Result<()> {
        let (before, global, tokenizer) = (self.state.clone(), self.global, self.tokenizer);
        self.last = Some((before.clone(), said.into()));
        let prompt = tokenizer.encode(chat::user(said, self.think).as_bytes());
        let stops = chat::STOPS.map(String::from);
        let mut stream = self.engine.submit(Request {
            prompt,
            start: Start::State(before),
            sampler: Some(self.sampler.clone()),
            max_tokens: self.args.max_tokens,
            stop_tokens: vec![tokenizer.end_of_document()],
            constraint: Some(Box::new(Ends::new(tokenizer, &stops))),
            keep_state: true,
            ..Request::default()
        })?;
        let (mut out, mut text, mut cut, mut after) = (TextStream::new(&stops), String::new(), None, None);
        let mut reading = true;
        let end = loop {
            let event = if reading { stream.recv_unless(stop()) } else { stream.recv() };
            match event {
                Some(Event::Prompt { .. }) => reading = false,
                Some(Event::Token(token)) => {
                    let (piece, end) = out.push(tokenizer.token(token.token)?);
                    self.sampler.follow(token.token);
                    global.stream(&piece)?;
                    text += &piece;
                    cut = end;
                }
                Some(Event::State(state)) => after = Some(state),
                Some(Event::End(end)) => break end.checked()?,
                None if reading => return Err(Interrupted.into()),
                None => anyhow::bail!("the engine has ended"),
            }
        };
        if end == End::Stop {
            self.sampler.follow(tokenizer.end_of_document());
        }
        // A stop text is never part of what the model remembers.
        let rest = match &cut {
            Some(cut) => cut.rest.clone(),
            None => {
                let rest = out.finish();
                global.stream(&rest)?;
                text += &rest;
                Vec::new()
            }
        };
        global.stream("\n")?;
        let after = after.context("the engine has kept no state")?;
        let rest = tokenizer.encode(&[&rest, chat::TURN_END.as_bytes()].concat());
        // Also after Ctrl-C: what was said is not lost.
        self.state = self.read(&after, rest, &AtomicBool::new(false))?;
        self.turns.push(json!({ "user": said, "assistant": text.trim() }));
        if end == End::Constraint && cut.is_none() { Err(Interrupted.into()) } else { Ok(()) }
    }
}
