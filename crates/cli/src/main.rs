//! The `anser` command: one file per subcommand in `cmd`, no logic of its own.

mod cmd;
mod global;
mod report;
mod source;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use global::{Global, Interrupted};
use std::process::ExitCode;

/// Trains and runs RWKV-7 and RWKV-X language models.
#[derive(Parser)]
#[command(name = "anser", version, propagate_version = true)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Quickstart(cmd::quickstart::Args),
    Generate(cmd::generate::Args),
    Chat(cmd::chat::Args),
    Serve(cmd::serve::Args),
    Eval(cmd::eval::Args),
    Train(cmd::train::Args),
    Data(cmd::data::Args),
    Inspect(cmd::inspect::Args),
    Tokenize(cmd::tokenize::Tokenize),
    Detokenize(cmd::tokenize::Detokenize),
    Convert(cmd::convert::Args),
    Expand(cmd::expand::Args),
    Bench(cmd::bench::Args),
    Debug(cmd::debug::Args),
}

/// Lets values be negative numbers everywhere, so that it is the option's own error that says what is allowed.
fn numbers(command: clap::Command) -> clap::Command {
    command.allow_negative_numbers(true).mut_subcommands(numbers)
}

fn main() -> ExitCode {
    let Cli { global, command } = match Cli::from_arg_matches(&numbers(Cli::command()).get_matches()) {
        Ok(cli) => cli,
        Err(e) => e.exit(),
    };
    global::catch_ctrl_c();
    let result = match command {
        Command::Quickstart(args) => cmd::quickstart::run(&args, &global),
        Command::Generate(args) => cmd::generate::run(&args, &global),
        Command::Chat(args) => cmd::chat::run(&args, &global),
        Command::Serve(args) => cmd::serve::run(&args, &global),
        Command::Eval(args) => cmd::eval::run(&args, &global),
        Command::Train(args) => cmd::train::execute(&args, &global),
        Command::Data(args) => cmd::data::run(&args, &global),
        Command::Inspect(args) => cmd::inspect::run(&args, &global),
        Command::Tokenize(args) => cmd::tokenize::tokenize(&args, &global),
        Command::Detokenize(args) => cmd::tokenize::detokenize(&args, &global),
        Command::Convert(args) => cmd::convert::run(&args, &global),
        Command::Expand(args) => cmd::expand::run(&args, &global),
        Command::Bench(args) => cmd::bench::run(&args, &global),
        Command::Debug(args) => cmd::debug::run(&args, &global),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) if e.is::<Interrupted>() => ExitCode::from(130),
        // The reader of our output has seen enough.
        Err(e) if e.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe) => {
            ExitCode::SUCCESS
        }
        Err(e) => {
            // One line, whatever the causes contain.
            global::say(format!("error: {}", format!("{e:#}").replace('\n', " ")));
            ExitCode::FAILURE
        }
    }
}
