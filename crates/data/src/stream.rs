use crate::{Error, Official};

/// Rows of a batch, one after the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Inputs [rows x ctx].
    pub tokens: Vec<u32>,
    /// The token after each input.
    pub targets: Vec<i32>,
}

/// One long run of tokens, of which the end is held out.
pub struct TokenStream {
    tokens: Vec<u32>,
    train: usize,
    ctx: usize,
    order: Official,
}

impl TokenStream {
    /// Samples of `ctx` tokens; the last `held_out` share (0 to 1) is never trained on.
    ///
    /// # Errors
    /// When the tokens are too few.
    pub fn new(tokens: Vec<u32>, ctx: usize, held_out: f64) -> Result<TokenStream, Error> {
        let train = tokens.len() - (tokens.len() as f64 * held_out.clamp(0.0, 1.0)) as usize;
        let order = Official::new(train, ctx)?;
        Ok(TokenStream { tokens, train, ctx, order })
    }

    fn batch(&self, starts: impl Iterator<Item = usize>) -> Batch {
        let (mut tokens, mut targets) = (Vec::new(), Vec::new());
        for s in starts {
            tokens.extend_from_slice(&self.tokens[s..s + self.ctx]);
            targets.extend(self.tokens[s + 1..=s + self.ctx].iter().map(|&t| t as i32));
        }
        Batch { tokens, targets }
    }

    /// The batch of a step, in the official order: a function of the step number alone.
    pub fn train(&self, step: u64, rows: usize) -> Batch {
        let first = 1 + step * rows as u64;
        self.batch((first..first + rows as u64).map(|i| self.order.offset(i)))
    }

    /// At most `rows` held-out samples, evenly spread.
    pub fn held_out(&self, rows: usize) -> Batch {
        let room = (self.tokens.len() - self.train).saturating_sub(1) / self.ctx;
        let rows = rows.min(room);
        self.batch((0..rows).map(|i| self.train + i * room / rows * self.ctx))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn held_out_tokens_are_never_trained_on() {
        let s = TokenStream::new((0..1000).collect(), 8, 0.2).unwrap();
        for step in 0..100 {
            let b = s.train(step, 3);
            assert_eq!(b.tokens.len(), 24);
            assert!(b.tokens.iter().zip(&b.targets).all(|(&x, &y)| x as i32 + 1 == y && y < 800));
        }
        assert_eq!(s.train(5, 3), s.train(5, 3));
        let h = s.held_out(7);
        assert!(h.tokens.len() == 56 && h.tokens.iter().all(|&t| t >= 800));
        assert_eq!(s.held_out(1000).tokens.len(), 24 * 8);
        assert!(TokenStream::new(vec![0; 10], 8, 0.1).is_err());
    }
}
