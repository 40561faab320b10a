//! Multi-query associative recall (Arora et al., "Zoology", arXiv 2312.04927): a row begins with pairs of a key and its value;
//! later each key comes once more, and its value is to be named there.

use crate::Batch;
use crate::random::Random;

/// The shape of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Recall {
    /// Tokens of a row.
    pub len: usize,
    /// Pairs of a key and its value.
    pub pairs: usize,
    /// Tokens there are: keys are 1 to half of it, values the upper half.
    pub vocab: usize,
}

impl Recall {
    /// Checks that such rows exist.
    ///
    /// # Errors
    /// When the pairs and their queries don't fit a row, or there are fewer keys than pairs.
    pub fn validate(&self) -> Result<(), String> {
        let Recall { len, pairs, vocab } = *self;
        match () {
            _ if pairs == 0 => Err("a row needs at least one pair".into()),
            // Every query has two places, as in the original.
            _ if len / 4 < pairs => Err(format!("{pairs} pairs need rows of {} tokens, not {len}", 4 * pairs)),
            _ if vocab / 2 < pairs + 1 => {
                Err(format!("{pairs} pairs need a vocabulary of {}, not {vocab}", 2 * pairs + 2))
            }
            _ => Ok(()),
        }
    }

    /// Rows of pairs, then queries and random tokens; only queries are targets. After the pairs a query stands at an even distance
    /// 2 g, where different g of 0.. are drawn with probabilities like (g + 1)^-0.99, so that most come soon and some late. The same
    /// seed and stream give the same batch.
    ///
    /// # Panics
    /// When [`Recall::validate`] fails.
    pub fn batch(&self, seed: u64, stream: u64, rows: usize) -> Batch {
        assert!(self.validate().is_ok());
        let Recall { len, pairs, vocab } = *self;
        let mut random = Random::new(seed, stream);
        let (mut tokens, mut targets) = (Vec::new(), Vec::new());
        let half = vocab / 2;
        for _ in 0..rows {
            let keys = random.distinct(half - 1, pairs);
            let values = random.distinct(vocab - half, pairs);
            let row = tokens.len();
            for (k, v) in keys.iter().zip(&values) {
                tokens.extend([1 + *k as u32, (half + v) as u32]);
            }
            tokens.extend((2 * pairs..len).map(|_| random.below(vocab) as u32));
            targets.resize(tokens.len(), -1);
            // Drawing without replacement is taking the first arrivals of independent exponential clocks.
            let mut clocks: Vec<(f64, usize)> =
                (0..(len - 2 * pairs) / 2).map(|g| (-random.unit().ln() * ((g + 1) as f64).powf(0.99), g)).collect();
            clocks.sort_unstable_by(|a, b| a.0.total_cmp(&b.0));
            for ((k, v), (_, g)) in keys.iter().zip(&values).zip(clocks) {
                let at = row + 2 * pairs + 2 * g;
                tokens[at] = 1 + *k as u32;
                targets[at] = (half + v) as i32;
            }
        }
        Batch::rows(tokens, targets, len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::{HashMap, HashSet};

    #[test]
    fn every_query_has_one_answer_before_it() {
        for (len, pairs, vocab) in [(64, 4, 8192), (128, 8, 64), (256, 64, 8192), (16, 4, 11)] {
            let task = Recall { len, pairs, vocab };
            let b = task.batch(1, 2, 20);
            assert_eq!((b.tokens.len(), b.targets.len(), b.starts.len()), (20 * len, 20 * len, 20));
            assert_eq!(b, task.batch(1, 2, 20));
            assert_ne!(b, task.batch(1, 3, 20));
            for (x, y) in b.tokens.chunks(len).zip(b.targets.chunks(len)) {
                let half = (vocab / 2) as u32;
                let pairs_of: HashMap<u32, u32> = x[..2 * pairs].chunks(2).map(|p| (p[0], p[1])).collect();
                assert_eq!(pairs_of.len(), pairs, "keys differ");
                assert_eq!(pairs_of.values().collect::<HashSet<_>>().len(), pairs, "values differ");
                assert!(pairs_of.iter().all(|(&k, &v)| (1..half).contains(&k) && (half..vocab as u32).contains(&v)));
                let queries: Vec<usize> = (0..len).filter(|&i| y[i] >= 0).collect();
                assert_eq!(queries.len(), pairs);
                assert_eq!(
                    queries.iter().map(|&i| x[i]).collect::<HashSet<_>>().len(),
                    pairs,
                    "each key is asked once"
                );
                assert!(queries.iter().all(|&i| i >= 2 * pairs && i % 2 == 0 && pairs_of[&x[i]] == y[i] as u32));
                assert!(x.iter().all(|&t| (t as usize) < vocab));
            }
        }
    }

    #[test]
    fn queries_come_soon_and_late() {
        // With p(g) like (g + 1)^-0.99 the first of many places is taken 2^0.99 times as often as the second.
        let task = Recall { len: 404, pairs: 1, vocab: 16 };
        let b = task.batch(7, 0, 40_000);
        let mut counts = [0usize; 201];
        b.targets.chunks(404).for_each(|y| counts[(y.iter().position(|&t| t >= 0).unwrap() - 2) / 2] += 1);
        let ratio = counts[0] as f64 / counts[1] as f64;
        assert!((ratio - 2f64.powf(0.99)).abs() < 0.15, "{ratio}");
        assert!(counts[100..].iter().sum::<usize>() > 3000);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let e = |len, pairs, vocab| Recall { len, pairs, vocab }.validate().unwrap_err();
        assert!(e(15, 4, 64).contains("16 tokens") && e(64, 4, 9).contains("10") && e(64, 0, 9).contains("one pair"));
    }
}
