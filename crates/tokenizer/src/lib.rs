//! Tokenizers: RWKV World (greedy longest match over bytes), a subset of it for small models, and bytes; a streaming decoder.

mod literal;
mod stream;
mod trie;

pub use stream::StreamDecoder;

use std::io::Read;
use std::sync::LazyLock;
use trie::Trie;

/// What can go wrong.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// An id that the tokenizer does not have.
    #[error("token {0} is not in the {1} vocabulary")]
    UnknownToken(u32, &'static str),
    /// A vocabulary file that is not one.
    #[error("vocabulary line {0}: {1}")]
    Vocabulary(usize, String),
    /// The name of no tokenizer.
    #[error("unknown tokenizer {0:?}: use world, world-4096 or bytes")]
    Name(String),
}

/// Text to token ids and back.
///
/// ```
/// let t = anser_tokenizer::Tokenizer::world();
/// let ids = t.encode(" Eiffel".as_bytes());
/// assert_eq!(ids, [304, 25740, 109]);
/// assert_eq!(t.decode(&ids).unwrap(), b" Eiffel");
/// ```
#[derive(Clone, Copy)]
pub struct Tokenizer(Kind);

#[derive(Clone, Copy)]
enum Kind {
    World(&'static World),
    Bytes,
}

struct World {
    name: &'static str,
    /// Tokens of a model.
    size: usize,
    /// Bytes of the longest token.
    longest: usize,
    trie: Trie,
    /// Bytes of every id; id 0 (end of document) has none.
    tokens: Vec<Vec<u8>>,
}

static WORLD: LazyLock<World> = LazyLock::new(|| {
    let packed = include_bytes!("../vocab/rwkv_vocab_v20230424.txt.xz");
    let mut text = String::new();
    let read = lzma_rust2::XzReader::new(&packed[..], false).read_to_string(&mut text);
    let world = read.map_err(|e| e.to_string()).and_then(|_| World::parse(&text).map_err(|e| e.to_string()));
    // The file is part of the program; a test reads it.
    world.unwrap_or_else(|e| unreachable!("bundled vocabulary: {e}"))
});

static WORLD_4096: LazyLock<World> = LazyLock::new(|| {
    let ids = include_str!("../vocab/world-4096.txt").lines().map(|l| l.parse().unwrap_or(usize::MAX));
    let chosen = (1..=256).chain(ids).filter_map(|id| WORLD.tokens.get(id).cloned());
    let tokens: Vec<Vec<u8>> = std::iter::once(Vec::new()).chain(chosen).collect();
    let world = World::new("world-4096", tokens.len(), tokens);
    // As above.
    world.unwrap_or_else(|e| unreachable!("bundled vocabulary: {e}"))
});

impl World {
    fn new(name: &'static str, size: usize, tokens: Vec<Vec<u8>>) -> Result<World, Error> {
        let trie = Trie::new(tokens.iter().enumerate().skip(1).map(|(i, t)| (&t[..], i as u32)));
        let trie = trie.ok_or_else(|| Error::Vocabulary(0, "a token occurs twice".into()))?;
        let longest = tokens.iter().map(Vec::len).max().unwrap_or(0);
        Ok(World { name, size, longest, trie, tokens })
    }

    /// Parses the official text format: lines of `ID LITERAL NBYTES`.
    fn parse(text: &str) -> Result<World, Error> {
        let mut tokens = vec![Vec::new()];
        for (i, line) in text.lines().enumerate() {
            let err = |m: &str| Error::Vocabulary(i + 1, m.into());
            let (id, rest) = line.split_once(' ').ok_or_else(|| err("expected ID LITERAL NBYTES"))?;
            let (text, len) = rest.rsplit_once(' ').ok_or_else(|| err("expected ID LITERAL NBYTES"))?;
            let bytes = literal::parse(text).ok_or_else(|| err("not a Python string literal"))?;
            if len.trim().parse() != Ok(bytes.len()) || bytes.is_empty() {
                return Err(err("the literal has another length than the line says"));
            }
            if id.parse() != Ok(tokens.len()) {
                return Err(err("ids must count up from 1"));
            }
            tokens.push(bytes);
        }
        World::new("world", 65536, tokens)
    }
}

impl Tokenizer {
    /// The RWKV World tokenizer: 65,529 tokens, id 0 for the end of a document, model vocabulary 65,536.
    pub fn world() -> Tokenizer {
        Tokenizer(Kind::World(&WORLD))
    }

    /// The 4,096 tokens of World that occur most in English books and Rust code, numbered in the same order: id 0 for the end of a document, then
    /// the single bytes, so that any text can be written. `examples/world_subset.rs` chose them.
    pub fn world_4096() -> Tokenizer {
        Tokenizer(Kind::World(&WORLD_4096))
    }

    /// One token a byte. Byte 0, which text doesn't contain, ends a document.
    pub fn bytes() -> Tokenizer {
        Tokenizer(Kind::Bytes)
    }

    /// By name: `world`, `world-4096` or `bytes`.
    ///
    /// # Errors
    /// For another name.
    pub fn from_name(name: &str) -> Result<Tokenizer, Error> {
        match name {
            "world" => Ok(Tokenizer::world()),
            "world-4096" => Ok(Tokenizer::world_4096()),
            "bytes" => Ok(Tokenizer::bytes()),
            _ => Err(Error::Name(name.into())),
        }
    }

    /// Its name.
    pub fn name(&self) -> &'static str {
        match self.0 {
            Kind::World(w) => w.name,
            Kind::Bytes => "bytes",
        }
    }

    /// The vocabulary size of models that use it.
    pub fn vocab_size(&self) -> usize {
        match self.0 {
            Kind::World(w) => w.size,
            Kind::Bytes => 256,
        }
    }

    /// Bytes of the longest token.
    pub fn max_token_len(&self) -> usize {
        match self.0 {
            Kind::World(w) => w.longest,
            Kind::Bytes => 1,
        }
    }

    /// The id that ends a document.
    pub fn end_of_document(&self) -> u32 {
        0
    }

    /// Token ids of `text`, which may be any bytes.
    pub fn encode(&self, text: &[u8]) -> Vec<u32> {
        match self.0 {
            Kind::World(w) => w.trie.encode(text),
            Kind::Bytes => text.iter().map(|&b| b.into()).collect(),
        }
    }

    /// The bytes of `ids`.
    ///
    /// # Errors
    /// At an id that the vocabulary doesn't have.
    pub fn decode(&self, ids: &[u32]) -> Result<Vec<u8>, Error> {
        let mut out = Vec::new();
        for &id in ids {
            out.extend_from_slice(self.token(id)?);
        }
        Ok(out)
    }

    /// The bytes of one token; none for the end of a document.
    ///
    /// # Errors
    /// When the vocabulary doesn't have it.
    pub fn token(&self, id: u32) -> Result<&'static [u8], Error> {
        static BYTES: [u8; 256] = {
            let mut b = [0; 256];
            let mut i = 0;
            while i < 256 {
                b[i] = i as u8;
                i += 1;
            }
            b
        };
        let i = id as usize;
        let token = match self.0 {
            Kind::World(w) => w.tokens.get(i).map(|t| &t[..]),
            Kind::Bytes if i == 0 => Some(&[][..]),
            Kind::Bytes => BYTES.get(i..i + 1),
        };
        token.ok_or(Error::UnknownToken(id, self.name()))
    }
}

#[cfg(test)]
mod tests;
