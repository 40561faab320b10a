//! Chooses a subset of the World vocabulary for a small model: the single bytes and the tokens that occur most in the given texts.
//!
//! ```sh
//! cargo run --release -p anser-tokenizer --example world_subset -- 4096 TEXT.. > ids.txt
//! ```
//!
//! The most frequent tokens under the whole vocabulary are not the best ones: a token that goes leaves its bytes to shorter ones. So the vocabulary
//! is halved again and again, counting anew each time. Prints the World ids of what is kept beside the bytes.

use anser_tokenizer::Tokenizer;
use std::cmp::Reverse;
use std::collections::HashMap;
use std::error::Error;

/// How often each token occurs in `text` by greedy longest match; `tokens` holds all single bytes.
fn count(text: &[u8], tokens: &HashMap<&'static [u8], u32>, counts: &mut [u64]) {
    // The longest token that begins with two bytes.
    let mut longest = vec![1u8; 1 << 16];
    let pair = |t: &[u8]| t.get(1).map_or(0, |&b| usize::from(t[0]) << 8 | usize::from(b));
    for t in tokens.keys().filter(|t| t.len() > 1) {
        longest[pair(t)] = longest[pair(t)].max(t.len() as u8);
    }
    let mut rest = text;
    while !rest.is_empty() {
        let most = if rest.len() > 1 { usize::from(longest[pair(rest)]).min(rest.len()) } else { 1 };
        let Some((len, id)) = (1..=most).rev().find_map(|l| Some((l, *tokens.get(&rest[..l])?))) else { return };
        counts[id as usize] += 1;
        rest = &rest[len..];
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let size: usize = args.next().ok_or("usage: world_subset SIZE TEXT..")?.parse()?;
    // The end of a document, the bytes, and the rest.
    let most = size.checked_sub(257).ok_or("a subset has at least 257 tokens")?;
    let texts = args.map(std::fs::read).collect::<Result<Vec<_>, _>>()?;
    let bytes: usize = texts.iter().map(Vec::len).sum();
    let world = Tokenizer::world();
    let mut kept: Vec<u32> = (257..=65529).collect();
    loop {
        let all = (1..=256).chain(kept.iter().copied());
        let tokens = all.map(|id| Ok((world.token(id)?, id))).collect::<Result<HashMap<_, _>, Box<dyn Error>>>()?;
        let mut counts = vec![0; 65530];
        texts.iter().for_each(|text| count(text, &tokens, &mut counts));
        eprintln!("{} tokens: {:.3} bytes a token", kept.len() + 257, bytes as f64 / counts.iter().sum::<u64>() as f64);
        if kept.len() <= most {
            break;
        }
        kept.sort_by_key(|&id| (Reverse(counts[id as usize]), id));
        kept.truncate((kept.len() / 2).max(most));
        kept.sort_unstable();
    }
    kept.iter().for_each(|id| println!("{id}"));
    Ok(())
}
