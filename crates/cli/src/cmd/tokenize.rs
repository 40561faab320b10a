use crate::global::Global;
use anser_tokenizer::{StreamDecoder, Tokenizer};
use anyhow::Context as _;
use serde_json::json;
use std::io::Read;

/// Token ids of a text
#[derive(clap::Args)]
pub struct Tokenize {
    /// Text; - reads it from stdin
    text: String,
    /// world, world-4096 or bytes
    #[arg(long, default_value = "world")]
    tokenizer: String,
}

/// The text of token ids
#[derive(clap::Args)]
pub struct Detokenize {
    /// Token ids
    #[arg(required = true)]
    ids: Vec<u32>,
    /// world, world-4096 or bytes
    #[arg(long, default_value = "world")]
    tokenizer: String,
}

/// Runs `tokenize`: ids separated by spaces.
pub fn tokenize(args: &Tokenize, global: &Global) -> anyhow::Result<()> {
    let mut text = args.text.clone().into_bytes();
    if args.text == "-" {
        text.clear();
        std::io::stdin().read_to_end(&mut text).context("stdin")?;
    }
    let ids = Tokenizer::from_name(&args.tokenizer)?.encode(&text);
    global.result(json!({ "tokenizer": args.tokenizer, "ids": ids }), || {
        let words: Vec<String> = ids.iter().map(u32::to_string).collect();
        words.join(" ") + "\n"
    })
}

/// Runs `detokenize`: the text, with U+FFFD for what is not UTF-8.
pub fn detokenize(args: &Detokenize, global: &Global) -> anyhow::Result<()> {
    let bytes = Tokenizer::from_name(&args.tokenizer)?.decode(&args.ids)?;
    let mut decoder = StreamDecoder::default();
    let text = decoder.push(&bytes) + &decoder.finish();
    global.result(json!({ "tokenizer": args.tokenizer, "text": text }), || text.clone() + "\n")
}
