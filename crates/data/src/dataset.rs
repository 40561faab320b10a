use crate::{Binidx, Error, Official};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

/// Rows of a batch, one after the other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Inputs [rows x ctx].
    pub tokens: Vec<u32>,
    /// The token after each input; negative: ignored.
    pub targets: Vec<i32>,
    /// Positions where a new sequence begins and the state restarts: sorted, the first is 0. At least one a row.
    pub starts: Vec<usize>,
}

impl Batch {
    /// Rows of `ctx` tokens, each one sequence.
    pub fn rows(tokens: Vec<u32>, targets: Vec<i32>, ctx: usize) -> Batch {
        let starts = (0..tokens.len()).step_by(ctx.max(1)).collect();
        Batch { tokens, targets, starts }
    }

    /// Number of rows of `ctx` tokens.
    pub fn len(&self, ctx: usize) -> usize {
        self.tokens.len() / ctx
    }

    /// Targets that are not ignored.
    pub fn counted(&self) -> usize {
        self.targets.iter().filter(|t| **t >= 0).count()
    }

    /// Adds the rows of another batch.
    pub fn append(&mut self, other: Batch) {
        let at = self.tokens.len();
        self.tokens.extend(other.tokens);
        self.targets.extend(other.targets);
        self.starts.extend(other.starts.iter().map(|s| at + s));
    }

    /// Rows `from..to` of `ctx` tokens as a batch.
    pub fn slice(&self, ctx: usize, from: usize, to: usize) -> Batch {
        let (a, b) = (from * ctx, (to * ctx).min(self.tokens.len()));
        Batch {
            tokens: self.tokens[a..b].to_vec(),
            targets: self.targets[a..b].to_vec(),
            starts: self.starts.iter().filter(|s| (a..b).contains(s)).map(|s| s - a).collect(),
        }
    }
}

/// Where tokens are.
pub enum Tokens {
    /// In memory.
    Memory(Vec<u32>),
    /// In a memory-mapped binidx file.
    Binidx(Binidx),
}

impl Tokens {
    /// Number of tokens.
    pub fn len(&self) -> usize {
        match self {
            Tokens::Memory(t) => t.len(),
            Tokens::Binidx(b) => b.len(),
        }
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Reads `out.len()` tokens from the `start`-th on.
    ///
    /// # Panics
    /// When there are not that many.
    pub fn read(&self, start: usize, out: &mut [u32]) {
        match self {
            Tokens::Memory(t) => out.copy_from_slice(&t[start..start + out.len()]),
            Tokens::Binidx(b) => b.read(start, out),
        }
    }

    /// First token of each document, and at the end the number of tokens. In memory a document ends after a token 0.
    fn documents(&self) -> Vec<usize> {
        match self {
            Tokens::Binidx(b) => b.starts().to_vec(),
            Tokens::Memory(t) => {
                let mut starts = vec![0];
                starts.extend(t.iter().enumerate().filter(|(_, t)| **t == END).map(|(i, _)| i + 1));
                if starts.last() != Some(&t.len()) {
                    starts.push(t.len());
                }
                starts
            }
        }
    }
}

/// The token that ends a document.
const END: u32 = 0;

/// Which tokens make a sample, and which sample comes when.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Order {
    /// The official trainer's ([`Official`]): pieces of the running text.
    Official,
    /// The same pieces in a random order, another one in each epoch.
    Shuffled,
    /// Whole documents, as many as fit a row; longer ones are cut. The state restarts at each. What stays free is ignored.
    Packed,
}

/// How samples are made.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Options {
    /// Tokens of a sample.
    pub ctx: usize,
    /// Share at the end of the data that is never trained on, 0 to 1.
    pub held_out: f64,
    /// Order of the samples.
    pub order: Order,
    /// Whether the state restarts at document ends inside a sample (always with [`Order::Packed`]).
    pub resets: bool,
    /// Seed of the random orders.
    pub seed: u64,
}

/// Tokens and the samples made from them: a batch is a function of the step number alone, so that nothing has to be
/// remembered to go on.
pub struct Dataset {
    tokens: Tokens,
    train: usize,
    options: Options,
    plan: Plan,
    shuffle: Mutex<Shuffle>,
}

enum Plan {
    Official(Official),
    /// Samples of the running text.
    Shuffled(usize),
    /// Rows, each a list of (first token, tokens to predict).
    Packed(Vec<Vec<(usize, usize)>>),
}

impl Dataset {
    /// Plans the samples.
    ///
    /// # Errors
    /// When the tokens are too few.
    pub fn new(tokens: Tokens, options: Options) -> Result<Dataset, Error> {
        let ctx = options.ctx.max(1);
        let options = Options { ctx, ..options };
        let train = tokens.len() - (tokens.len() as f64 * options.held_out.clamp(0.0, 1.0)) as usize;
        let short = Error::TooShort { tokens: train, ctx };
        let plan = match options.order {
            Order::Official => Plan::Official(Official::new(train, ctx)?),
            Order::Shuffled => match train.saturating_sub(1) / ctx {
                0 => return Err(short),
                n => Plan::Shuffled(n),
            },
            Order::Packed => match pack(&tokens, train, ctx) {
                rows if rows.is_empty() => return Err(short),
                rows => Plan::Packed(rows),
            },
        };
        Ok(Dataset { tokens, train, options, plan, shuffle: Mutex::default() })
    }

    /// Tokens to train on.
    pub fn train_tokens(&self) -> usize {
        self.train
    }

    /// Number of different samples: one epoch.
    pub fn samples(&self) -> u64 {
        match &self.plan {
            Plan::Official(o) => o.prime(),
            Plan::Shuffled(n) => *n as u64,
            Plan::Packed(rows) => rows.len() as u64,
        }
    }

    /// Tokens of a sample.
    pub fn ctx(&self) -> usize {
        self.options.ctx
    }

    /// The batch of a step.
    pub fn train(&self, step: u64, rows: usize) -> Batch {
        self.rows(step * rows as u64, rows)
    }

    /// Rows from the `first`-th of the run on.
    pub fn rows(&self, first: u64, rows: usize) -> Batch {
        let mut batch = Batch::default();
        let mut shuffle = self.shuffle.lock().unwrap_or_else(PoisonError::into_inner);
        for i in first..first + rows as u64 {
            match &self.plan {
                // The official trainer counts from 1.
                Plan::Official(o) => self.add(&mut batch, o.offset(i + 1)),
                Plan::Shuffled(n) => self.add(&mut batch, shuffle.at(i, *n, self.options.seed) * self.options.ctx),
                Plan::Packed(all) => {
                    let start = batch.tokens.len();
                    for &(first, len) in &all[shuffle.at(i, all.len(), self.options.seed)] {
                        batch.starts.push(batch.tokens.len());
                        self.add_piece(&mut batch, first, len);
                    }
                    let free = start + self.options.ctx - batch.tokens.len();
                    batch.tokens.extend(std::iter::repeat_n(END, free));
                    batch.targets.extend(std::iter::repeat_n(-1, free));
                }
            }
        }
        batch
    }

    /// At most `rows` held-out samples, evenly spread.
    pub fn held_out(&self, rows: usize) -> Batch {
        let room = (self.tokens.len() - self.train).saturating_sub(1) / self.options.ctx;
        let rows = rows.min(room);
        let mut batch = Batch::default();
        (0..rows).for_each(|i| self.add(&mut batch, self.train + i * room / rows * self.options.ctx));
        batch
    }

    fn add_piece(&self, batch: &mut Batch, start: usize, len: usize) {
        let mut piece = vec![0; len + 1];
        self.tokens.read(start, &mut piece);
        batch.targets.extend(piece[1..].iter().map(|&t| t as i32));
        batch.tokens.extend_from_slice(&piece[..len]);
    }

    /// A row of running text. With resets a sequence begins at each end-of-document token, which stands before the text
    /// that it lets the model begin.
    fn add(&self, batch: &mut Batch, start: usize) {
        let at = batch.tokens.len();
        batch.starts.push(at);
        self.add_piece(batch, start, self.options.ctx);
        if self.options.resets || self.options.order == Order::Packed {
            let ends = (at + 1..batch.tokens.len()).filter(|&i| batch.tokens[i] == END);
            batch.starts.extend(ends);
        }
    }
}

/// Rows of `ctx` predictions from the documents before `train`, where the one in which that lies is cut. A document begins with the end mark of the one before
/// it, where there is one, as it does when the model writes; one of more than `ctx` predictions is cut. The longest pieces are
/// placed first, each in the fullest row that has room.
fn pack(tokens: &Tokens, train: usize, ctx: usize) -> Vec<Vec<(usize, usize)>> {
    let mut pieces = Vec::new();
    for d in tokens.documents().windows(2).filter(|d| d[0] < train) {
        let mut before = [!END];
        if d[0] > 0 && d[1] - d[0] > 1 {
            tokens.read(d[0] - 1, &mut before);
        }
        let first = if before == [END] { d[0] - 1 } else { d[0] };
        let predictions = (d[1].min(train) - first).saturating_sub(1);
        pieces.extend((0..predictions).step_by(ctx).map(|at| (first + at, ctx.min(predictions - at))));
    }
    pieces.sort_by_key(|p| (std::cmp::Reverse(p.1), p.0));
    let mut rows: Vec<Vec<(usize, usize)>> = Vec::new();
    // (free tokens, row), the fullest first.
    let mut free = BTreeSet::new();
    for piece in pieces {
        let (left, row) = match free.range((piece.1, 0)..).next().copied() {
            Some(found) => {
                free.remove(&found);
                found
            }
            None => {
                rows.push(Vec::new());
                (ctx, rows.len() - 1)
            }
        };
        rows[row].push(piece);
        if left > piece.1 {
            free.insert((left - piece.1, row));
        }
    }
    rows
}

/// Random permutations, one an epoch: the last one that was asked for, whose making takes as long as all of its samples are many.
#[derive(Default)]
struct Shuffle {
    epoch: Option<u64>,
    order: Vec<u32>,
}

impl Shuffle {
    /// The `i`-th sample of the endless sequence of epochs over `n` samples.
    fn at(&mut self, i: u64, n: usize, seed: u64) -> usize {
        let epoch = i / n as u64;
        if self.epoch != Some(epoch) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(epoch);
            self.order = (0..n as u32).collect();
            for k in (1..n).rev() {
                // A 64-bit number times k + 1: the bias is below k / 2^64.
                let j = ((rng.next_u64() as u128 * (k as u128 + 1)) >> 64) as usize;
                self.order.swap(k, j);
            }
            self.epoch = Some(epoch);
        }
        self.order[(i % n as u64) as usize] as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(order: Order) -> Options {
        Options { ctx: 8, held_out: 0.2, order, resets: false, seed: 3 }
    }

    #[test]
    fn held_out_tokens_are_never_trained_on() {
        for order in [Order::Official, Order::Shuffled] {
            let s = Dataset::new(Tokens::Memory((1..1001).collect()), options(order)).unwrap();
            for step in 0..100 {
                let b = s.train(step, 3);
                assert_eq!((b.tokens.len(), b.starts.clone()), (24, vec![0, 8, 16]));
                assert!(b.tokens.iter().zip(&b.targets).all(|(&x, &y)| x as i32 + 1 == y && y <= 800));
            }
            assert_eq!(s.train(5, 3), s.train(5, 3));
            let h = s.held_out(7);
            assert!(h.tokens.len() == 56 && h.tokens.iter().all(|&t| t >= 800));
            assert_eq!(s.held_out(1000).tokens.len(), 24 * 8);
            assert!(Dataset::new(Tokens::Memory(vec![0; 8]), options(order)).is_err());
        }
    }

    #[test]
    fn a_shuffled_epoch_visits_every_sample_once() {
        let s = Dataset::new(Tokens::Memory((1..1001).collect()), options(Order::Shuffled)).unwrap();
        let n = s.samples();
        assert_eq!(n, 99);
        let epoch = |e: u64| (e * n..(e + 1) * n).map(|i| s.train(i, 1).tokens[0]).collect::<Vec<_>>();
        let sorted = |mut v: Vec<u32>| {
            v.sort_unstable();
            v
        };
        assert_ne!(epoch(0), epoch(1));
        assert_eq!(sorted(epoch(0)), sorted(epoch(1)));
        assert_eq!(sorted(epoch(0)), (0..99).map(|i| 8 * i + 1).collect::<Vec<_>>());
        // A batch may span two epochs.
        let seam = s.train(24, 4);
        assert_eq!(seam.tokens[8 * 3], epoch(1)[0]);
    }

    #[test]
    fn packing_keeps_documents_whole_and_restarts_at_each() {
        // Documents of 1 to 20 tokens, each ending in 0, and numbered so that a token says where it belongs.
        let mut tokens = Vec::new();
        for d in 0..50u32 {
            let n = d * 7 % 20 + 1;
            tokens.extend((1..n).map(|i| 100 * (d + 1) + i));
            tokens.push(0);
        }
        let s =
            Dataset::new(Tokens::Memory(tokens.clone()), Options { held_out: 0.0, ..options(Order::Packed) }).unwrap();
        let mut seen = Vec::new();
        for step in 0..s.samples() {
            let b = s.train(step, 1);
            assert_eq!((b.tokens.len(), b.targets.len(), b.starts[0]), (8, 8, 0));
            let mut used = 0;
            for (k, &start) in b.starts.iter().enumerate() {
                let end = b.starts.get(k + 1).copied().unwrap_or(8);
                let real = (start..end).filter(|&i| b.targets[i] >= 0).count();
                used += real;
                for i in start..start + real {
                    // Targets stay in the document: its first number after an end mark, the next number, or its end.
                    let (x, y) = (b.tokens[i], b.targets[i] as u32);
                    assert!(y == 0 || y == x + 1 || (x == 0 && i == start && y % 100 == 1), "{x} {y}");
                    seen.push(y);
                }
            }
            assert!(used > 0);
        }
        // Of the first document nothing foretells the first token; empty documents are left out.
        let mut want = tokens.clone();
        want.sort_unstable();
        seen.sort_unstable();
        let ends = tokens.windows(2).filter(|w| w[1] == 0 && w[0] != 0).count();
        let texts: Vec<u32> = want.into_iter().filter(|&t| t != 0 && t != tokens[0]).collect();
        assert_eq!((seen.iter().filter(|&&t| t == 0).count(), &seen[ends..]), (ends, &texts[..]));
        let rows = seen.len().div_ceil(8);
        assert!(s.samples() as usize <= rows + 2, "{} rows for {rows} full ones", s.samples());
    }

    #[test]
    fn the_document_at_the_border_is_cut_there() {
        // One document, and two of which the second is longer than what is held out.
        for tokens in [(1..1001).collect(), [(1..300).collect::<Vec<u32>>(), vec![0], (300..1000).collect()].concat()] {
            let s = Dataset::new(Tokens::Memory(tokens), options(Order::Packed)).unwrap();
            let mut seen = Vec::new();
            for step in 0..s.samples() {
                seen.extend(s.train(step, 1).targets.into_iter().filter(|&y| y > 0));
            }
            seen.sort_unstable();
            assert!(seen.len() >= 798 && seen.iter().all(|&y| y <= 800), "{} {:?}", seen.len(), seen.last());
        }
    }

    #[test]
    fn resets_are_at_document_ends() {
        let tokens: Vec<u32> = (0..500).map(|i| i % 5).collect();
        let s = Dataset::new(Tokens::Memory(tokens), Options { resets: true, ..options(Order::Official) }).unwrap();
        for step in 0..20 {
            let b = s.train(step, 2);
            for i in 0..16 {
                assert_eq!(b.starts.contains(&i), i % 8 == 0 || b.tokens[i] == 0, "{b:?}");
            }
            assert!(b.starts.is_sorted());
            let second = b.slice(8, 1, 2);
            assert!(second.tokens == b.tokens[8..] && second.starts[0] == 0 && second.len(8) == 1);
        }
    }
}
