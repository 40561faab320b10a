use crate::Error;

/// The official trainer's sample order: sample i starts at ((floor(p (sqrt 5 - 1) / 2) i^3) mod p) ctx, with p the "magic prime",
/// the largest prime that is 2 modulo 3 and below tokens / ctx - 1. Cubing is a permutation modulo such a prime, so that
/// every slot is visited once in p samples, in an order that needs no memory: the step number says it all.
///
/// ```
/// // MiniPile, 1,498,226,207 tokens, context 512.
/// let o = anser_data::Official::new(1_498_226_207, 512).unwrap();
/// assert_eq!(o.prime(), 2926181);
/// assert_eq!([1, 2, 3].map(|i| o.offset(i)), [925941248, 1414711296, 1029138944]);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Official {
    prime: u64,
    factor: u64,
    ctx: u64,
}

fn is_prime(n: u64) -> bool {
    n >= 2 && (2..).take_while(|d| d * d <= n).all(|d| !n.is_multiple_of(d))
}

impl Official {
    /// The order for `tokens` tokens in samples of `ctx` (+ 1 for the last target).
    ///
    /// # Errors
    /// When there is no such prime: fewer than about four samples.
    pub fn new(tokens: usize, ctx: usize) -> Result<Official, Error> {
        let below = (tokens / ctx.max(1)).saturating_sub(1) as u64;
        let prime = (0..below).rev().find(|&n| n % 3 == 2 && is_prime(n)).ok_or(Error::TooShort { tokens, ctx })?;
        let factor = (prime as f64 * ((5f64).sqrt() - 1.0) / 2.0) as u64;
        Ok(Official { prime, factor, ctx: ctx as u64 })
    }

    /// The magic prime: the number of different samples.
    pub fn prime(&self) -> u64 {
        self.prime
    }

    /// First token of sample `i`; the official trainer counts from 1.
    pub fn offset(&self, i: u64) -> usize {
        let p = self.prime as u128;
        let i = i as u128 % p;
        let cube = i * i % p * i % p;
        (self.factor as u128 * cube % p) as usize * self.ctx as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn is_a_permutation_within_bounds() {
        for (tokens, ctx) in [(1000, 10), (5000, 7), (40, 4)] {
            let o = Official::new(tokens, ctx).unwrap();
            let mut seen: Vec<usize> = (1..=o.prime()).map(|i| o.offset(i)).collect();
            assert!(seen.iter().all(|&s| s % ctx == 0 && s + ctx < tokens));
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen.len() as u64, o.prime());
        }
        assert!(Official::new(20, 10).is_err() && Official::new(0, 0).is_err());
        let more = Official::new(1_498_226_207, 512).unwrap();
        assert_eq!([4, 5].map(|i| more.offset(i)), [830257664, 380896256]);
    }
}
