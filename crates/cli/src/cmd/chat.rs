use crate::cmd::generate::Common;
use crate::global::{Global, Interrupted, stop};
use anser_infer::chat::{self, Think};
use anser_infer::{Sampler, Session, TextStream};
use anser_tokenizer::Tokenizer;
use serde_json::json;
use std::io::{BufRead, IsTerminal};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

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

/// Runs the subcommand.
pub fn run(args: &Args, global: &Global) -> anyhow::Result<()> {
    let mut sampler = Sampler::new(args.common.sampling())?;
    let ctx = global.context()?;
    let (model, tokenizer) = args.common.source.load(&ctx, global)?;
    let fresh = || -> anyhow::Result<Session<'_>> {
        let mut session = args.common.session(&ctx, &model, None)?;
        if let Some(text) = &args.system {
            session.feed(&tokenizer.encode(chat::system(text).as_bytes()))?;
        }
        Ok(session)
    };
    let mut session = match &args.load_state {
        Some(path) => args.common.session(&ctx, &model, Some(path))?,
        None => fresh()?,
    };
    // A file that cannot be written is found before the first word.
    save(args, &session)?;
    let mut think = args.think;
    let mut turns = Vec::new();
    // Before the last turn, for /retry: the session and what the user said.
    let mut last: Option<(Session<'_>, String)> = None;
    let stdin = std::io::stdin();
    let terminal = stdin.is_terminal();
    if terminal {
        global.note("Type a message; /help lists the commands, Ctrl-D ends.");
    }
    loop {
        if terminal && !global.quiet {
            eprint!("> ");
        }
        let mut line = String::new();
        if stdin.lock().read_line(&mut line)? == 0 {
            break;
        }
        let line = line.trim();
        let (command, rest) = line.split_once(' ').unwrap_or((line, ""));
        let mut said = line.to_string();
        let outcome = match command {
            "" => continue,
            "/exit" | "/quit" => break,
            "/help" => {
                global.note(HELP);
                continue;
            }
            "/new" => fresh().map(|s| session = s),
            "/save" => session.save(Path::new(rest.trim())).map_err(Into::into),
            "/load" => args.common.source.session(&ctx, &model, Some(Path::new(rest.trim()))).map(|s| session = s),
            "/think" => rest.trim().parse().map(|t| think = t).map_err(anyhow::Error::msg),
            "/retry" => match last.take() {
                Some((before, text)) => {
                    (session, said) = (before, text);
                    turns.pop();
                    answer(
                        &mut session,
                        &mut sampler,
                        &tokenizer,
                        &mut said,
                        think,
                        args,
                        global,
                        &mut turns,
                        &mut last,
                    )
                }
                None => Err(anyhow::anyhow!("there is no answer yet")),
            },
            c if c.starts_with('/') => Err(anyhow::anyhow!("no command {c}; /help lists them")),
            _ => answer(&mut session, &mut sampler, &tokenizer, &mut said, think, args, global, &mut turns, &mut last),
        };
        // Saved after every turn: nothing is lost however the conversation ends.
        save(args, &session)?;
        match outcome {
            Ok(()) => {}
            // A slip of the keyboard doesn't end a conversation; a script wants to know.
            Err(e) if terminal && !e.is::<Interrupted>() => global.note(format!("{e:#}")),
            Err(e) => return Err(e),
        }
    }
    global.result(json!({ "turns": turns }), String::new)
}

fn save(args: &Args, session: &Session<'_>) -> anyhow::Result<()> {
    Ok(args.save_state.as_ref().map_or(Ok(()), |path| session.save(path))?)
}

/// One turn: feeds what the user said, streams the answer, and leaves the session ready for the next turn.
fn answer<'m>(
    session: &mut Session<'m>, sampler: &mut Sampler, tokenizer: &Tokenizer, said: &mut String, think: Think,
    args: &Args, global: &Global, turns: &mut Vec<serde_json::Value>, last: &mut Option<(Session<'m>, String)>,
) -> anyhow::Result<()> {
    *last = Some((session.fork(), said.clone()));
    let prompt = chat::user(said, think);
    session.feed(&tokenizer.encode(prompt.as_bytes()))?;
    let mut stream = TextStream::new(&chat::STOPS.map(String::from));
    let mut text = String::new();
    // The session when all text so far was out: a stop text is never part of what the model remembers.
    let mut clear = (session.fork(), 0);
    let (mut stopped, mut interrupted) = (false, false);
    for _ in 0..args.max_tokens {
        interrupted = stop().load(Ordering::SeqCst);
        let token = sampler.sample(session.logits()?)?;
        if interrupted || token == tokenizer.end_of_document() {
            break;
        }
        session.feed(&[token])?;
        let (piece, end) = stream.push(tokenizer.token(token)?);
        global.stream(&piece)?;
        text += &piece;
        if end {
            stopped = true;
            break;
        }
        if stream.is_clear() {
            clear = (session.fork(), text.len());
        }
    }
    if !stopped {
        let rest = stream.finish();
        global.stream(&rest)?;
        text += &rest;
    }
    global.stream("\n")?;
    *session = clear.0;
    let end = format!("{}{}", &text[clear.1..], chat::TURN_END);
    session.feed(&tokenizer.encode(end.as_bytes()))?;
    turns.push(json!({ "user": said, "assistant": text.trim() }));
    if interrupted { Err(Interrupted.into()) } else { Ok(()) }
}
