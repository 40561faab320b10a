use crate::Error;
use anser_ops::choose::Cuts;
use anser_tensor::{math, simd::vectorize};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use std::borrow::Cow;
use std::collections::BTreeMap;

/// Where the temperature stands among the cuts (top-k, top-p, min-p), which follow the penalties.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SamplerOrder {
    /// RWKV's: the cuts are made on the probabilities at temperature 1, which are then raised to 1/T.
    #[default]
    Rwkv,
    /// OpenAI's: the cuts are made on the probabilities at temperature T.
    OpenAi,
}

/// How the next token is chosen: bias, penalties, then top-k, top-p, min-p and temperature in the [`SamplerOrder`].
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// 0: always the most probable token.
    pub temperature: f32,
    /// Keeps the most probable tokens that together reach this probability; tokens as probable as the last one stay.
    pub top_p: f32,
    /// Keeps this many tokens; 0: all.
    pub top_k: usize,
    /// Drops tokens below this share of the highest probability.
    pub min_p: f32,
    /// Subtracted from the logits of tokens that occurred.
    pub presence_penalty: f32,
    /// Subtracted times the decayed count of the token.
    pub frequency_penalty: f32,
    /// Factor on all counts at each step.
    pub penalty_decay: f32,
    /// Seed of the random numbers.
    pub seed: u64,
    /// Place of the temperature.
    pub order: SamplerOrder,
    /// Added to the logits of these tokens; minus infinity bans one.
    pub logit_bias: BTreeMap<u32, f32>,
}

impl Default for Sampling {
    fn default() -> Sampling {
        Sampling {
            temperature: 1.0,
            top_p: 0.7,
            top_k: 0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            penalty_decay: 0.996,
            seed: 0,
            order: SamplerOrder::Rwkv,
            logit_bias: BTreeMap::new(),
        }
    }
}

/// Chooses tokens from logits and remembers what it chose.
#[derive(Clone)]
pub struct Sampler {
    options: Sampling,
    counts: BTreeMap<u32, f32>,
    rng: ChaCha8Rng,
}

impl Sampler {
    /// A sampler.
    ///
    /// # Errors
    /// When an option is outside its range.
    pub fn new(options: Sampling) -> Result<Sampler, Error> {
        let check = |name: &str, v: f32, low: f32, high: f32| match (low..=high).contains(&v) {
            true => Ok(()),
            false => Err(Error::Sampling(format!("{name} = {v}: it must be between {low} and {high}"))),
        };
        check("temperature", options.temperature, 0.0, 100.0)?;
        check("top-p", options.top_p, 0.0, 1.0)?;
        check("min-p", options.min_p, 0.0, 1.0)?;
        check("presence penalty", options.presence_penalty, -100.0, 100.0)?;
        check("frequency penalty", options.frequency_penalty, -100.0, 100.0)?;
        check("penalty decay", options.penalty_decay, 0.0, 1.0)?;
        if let Some((token, bias)) = options.logit_bias.iter().find(|(_, b)| b.is_nan() || **b == f32::INFINITY) {
            return Err(Error::Sampling(format!("logit bias {bias} of token {token}: it must be a number or -inf")));
        }
        let rng = ChaCha8Rng::seed_from_u64(options.seed);
        Ok(Sampler { options, counts: BTreeMap::new(), rng })
    }

    /// Chooses the next token.
    ///
    /// # Errors
    /// When a logit is NaN or infinite.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32, Error> {
        if logits.is_empty() || !all_finite(logits) {
            return Err(Error::NotFinite);
        }
        let o = &self.options;
        let mut logits = Cow::Borrowed(logits);
        for (&token, bias) in &o.logit_bias {
            if (token as usize) < logits.len() {
                logits.to_mut()[token as usize] += bias;
            }
        }
        if o.presence_penalty != 0.0 || o.frequency_penalty != 0.0 {
            for (&token, &count) in &self.counts {
                if (token as usize) < logits.len() {
                    logits.to_mut()[token as usize] -= o.presence_penalty + o.frequency_penalty * count;
                }
            }
        }
        let max = largest(&logits);
        let best = || logits.iter().position(|l| *l == max).unwrap_or(0);
        let token = if self.greedy() { best() } else { self.draw(&logits, max) } as u32;
        self.count(token);
        Ok(token)
    }

    /// Takes note of a token that a copy of this sampler chose: from here on it is as that was then.
    pub fn follow(&mut self, token: u32) {
        if !self.greedy() {
            // What a choice takes.
            self.rng.next_u64();
        }
        self.count(token);
    }

    fn count(&mut self, token: u32) {
        self.counts.values_mut().for_each(|c| *c *= self.options.penalty_decay);
        *self.counts.entry(token).or_default() += 1.0;
    }

    /// Whether it takes the most probable token.
    pub(crate) fn greedy(&self) -> bool {
        self.options.temperature == 0.0 || self.options.top_k == 1
    }

    /// What makes the choice on a GPU: `Some(None)` takes the most probable token. `None` if the choice depends on more than logits, or counts tokens, which
    /// only [`Sampler::sample`] does. It takes the place of a call of that, in effect as well as in random numbers.
    pub(crate) fn cuts(&mut self) -> Option<Option<Cuts>> {
        let o = &self.options;
        let greedy = self.greedy();
        let plain = o.presence_penalty == 0.0 && o.frequency_penalty == 0.0 && o.logit_bias.is_empty();
        if !plain || (o.top_k > 0 && !greedy) {
            return None;
        }
        if greedy {
            return Some(None);
        }
        let (before, after) = self.powers();
        let (top_p, min_p) = (self.options.top_p, self.options.min_p);
        Some(Some(Cuts { before: before as f32, after: after as f32, top_p, min_p, random: self.rng.next_u64() }))
    }

    /// The powers of probabilities before and after the cuts.
    fn powers(&self) -> (f64, f64) {
        let power = 1.0 / self.options.temperature as f64;
        match self.options.order {
            SamplerOrder::Rwkv => (1.0, power),
            SamplerOrder::OpenAi => (power, 1.0),
        }
    }

    fn draw(&mut self, logits: &[f32], max: f32) -> usize {
        let (before, after) = self.powers();
        let o = &self.options;
        let (weights, total) = weigh(logits, max, before as f32);
        // Below 1e-7 of the maximum a token is out of reach of top-p < 1.
        let floor = if o.top_p < 1.0 { o.min_p.max(1e-7) } else { o.min_p };
        let above = weights.into_iter().enumerate().filter(|(_, w)| *w >= floor);
        let mut kept = Falling::new(above.map(|(i, w)| (w, i as u32)));
        if o.top_k > 0 {
            kept.truncate(o.top_k);
        }
        if o.top_p < 1.0 {
            let mut sum = 0.0;
            let reach = kept.position(|w| {
                sum += f64::from(w) / total;
                sum >= o.top_p as f64
            });
            if let Some(limit) = reach.map(|last| Falling::pair(kept.tokens[last]).0) {
                let end = kept.position(|w| w < limit);
                kept.truncate(end.unwrap_or(usize::MAX));
            }
        }
        let power = |w: f32| if after == 1.0 { f64::from(w) } else { f64::from(w).powf(after) };
        let total: f64 = kept.tokens.iter().map(|&n| power(Falling::pair(n).0)).sum();
        let mut left = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * total;
        let drawn = kept.position(|w| {
            left -= power(w);
            left < 0.0
        });
        kept.get(drawn.unwrap_or(0)).map_or(0, |k| k.1 as usize)
    }
}

/// Whether no logit is NaN or infinite; all are looked at, sixteen at a time, as there is nearly never one.
fn all_finite(logits: &[f32]) -> bool {
    vectorize(
        #[inline(always)]
        || logits.iter().fold(true, |all, l| all & l.is_finite()),
    )
}

fn largest(logits: &[f32]) -> f32 {
    vectorize(
        #[inline(always)]
        || {
            let mut max = [f32::NEG_INFINITY; 16];
            let chunks = logits.chunks_exact(16);
            let rest = chunks.remainder().iter().copied().fold(f32::NEG_INFINITY, f32::max);
            for c in chunks {
                for (m, &l) in max.iter_mut().zip(c) {
                    *m = if l > *m { l } else { *m };
                }
            }
            max.into_iter().fold(rest, f32::max)
        },
    )
}

/// exp((logit - max) x power) of each token, and their sum in sixteen parts.
fn weigh(logits: &[f32], max: f32, power: f32) -> (Vec<f32>, f64) {
    // The largest logit is to have the weight 1 at any power.
    let power = power.min(f32::MAX);
    let mut weights = vec![0.0; logits.len()];
    let total = vectorize(
        #[inline(always)]
        || {
            for (w, l) in weights.iter_mut().zip(logits) {
                *w = math::exp((l - max) * power);
            }
            let mut parts = [0f32; 16];
            for c in weights.chunks(16) {
                parts.iter_mut().zip(c).for_each(|(p, w)| *p += w);
            }
            parts.iter().map(|&p| f64::from(p)).sum()
        },
    );
    (weights, total)
}

/// Tokens with weights, from high to low, of equal ones the lower token first. As few are sorted as are looked at: of a vocabulary most are not.
struct Falling {
    /// Numbers in whose ascending order the tokens are: the inverted bits of a weight, which is not negative, then the token. Numbers sort
    /// faster than pairs.
    tokens: Vec<u64>,
    /// How many are in their places, the first ones.
    sorted: usize,
}

impl Falling {
    fn new(tokens: impl Iterator<Item = (f32, u32)>) -> Falling {
        let number = |(weight, token): (f32, u32)| u64::from(!weight.to_bits()) << 32 | u64::from(token);
        Falling { tokens: tokens.map(number).collect(), sorted: 0 }
    }

    /// The weight and token of a number.
    fn pair(number: u64) -> (f32, u32) {
        (f32::from_bits(!((number >> 32) as u32)), number as u32)
    }

    fn get(&mut self, i: usize) -> Option<(f32, u32)> {
        if i >= self.sorted && i < self.tokens.len() {
            self.sort((4 * i).max(256));
        }
        self.tokens.get(i).copied().map(Falling::pair)
    }

    /// Brings the first `count` into their places.
    fn sort(&mut self, count: usize) {
        let count = count.min(self.tokens.len()) - self.sorted;
        let rest = &mut self.tokens[self.sorted..];
        if count < rest.len() {
            rest.select_nth_unstable(count);
        }
        rest[..count].sort_unstable();
        self.sorted += count;
    }

    /// The first whose weight is so.
    fn position(&mut self, mut is: impl FnMut(f32) -> bool) -> Option<usize> {
        (0..self.tokens.len()).find(|&i| self.get(i).is_some_and(|(w, _)| is(w)))
    }

    /// The first `count` alone.
    fn truncate(&mut self, count: usize) {
        if count < self.tokens.len() {
            if count > self.sorted {
                self.sort(count);
            }
            self.tokens.truncate(count);
            self.sorted = self.sorted.min(count);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share(options: Sampling, logits: &[f32], n: usize) -> Vec<f64> {
        let mut counts = vec![0.0; logits.len()];
        for seed in 0..n {
            let mut s = Sampler::new(Sampling { seed: seed as u64, ..options.clone() }).unwrap();
            counts[s.sample(logits).unwrap() as usize] += 1.0 / n as f64;
        }
        counts
    }

    #[test]
    fn cuts_and_temperature() {
        // Probabilities 0.5, 0.25, 0.125, 0.125.
        let logits = [3.0, 2.0, 1.0, 1.0].map(|x| x * std::f32::consts::LN_2);
        let plain = Sampling { top_p: 1.0, ..Sampling::default() };
        let close = |got: Vec<f64>, want: [f64; 4]| {
            assert!(got.iter().zip(want).all(|(g, w)| (g - w).abs() < 0.03), "{got:?} {want:?}")
        };
        close(share(plain.clone(), &logits, 4000), [0.5, 0.25, 0.125, 0.125]);
        close(share(Sampling { top_p: 0.6, ..plain.clone() }, &logits, 4000), [2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0]);
        // The third reaches 0.8; the fourth is as probable and stays.
        close(share(Sampling { top_p: 0.8, ..plain.clone() }, &logits, 4000), [0.5, 0.25, 0.125, 0.125]);
        close(share(Sampling { top_k: 2, ..plain.clone() }, &logits, 4000), [2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0]);
        close(share(Sampling { min_p: 0.4, ..plain.clone() }, &logits, 4000), [2.0 / 3.0, 1.0 / 3.0, 0.0, 0.0]);
        close(share(Sampling { temperature: 0.5, ..plain.clone() }, &logits, 4000), [0.727, 0.182, 0.045, 0.045]);
        close(share(Sampling { temperature: 0.0, ..plain }, &logits, 10), [1.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn openai_order_and_bias() {
        // Probabilities 0.5, 0.25, 0.125, 0.125; at temperature 0.5: 0.727, 0.182, 0.045, 0.045.
        let logits = [3.0, 2.0, 1.0, 1.0].map(|x| x * std::f32::consts::LN_2);
        let o = Sampling { top_p: 0.7, temperature: 0.5, ..Sampling::default() };
        let rwkv = share(o.clone(), &logits, 2000);
        assert!((rwkv[0] - 0.8).abs() < 0.03 && (rwkv[1] - 0.2).abs() < 0.03, "{rwkv:?}");
        let openai = share(Sampling { order: SamplerOrder::OpenAi, ..o }, &logits, 2000);
        assert_eq!(
            openai,
            [share(Sampling { temperature: 0.0, ..Sampling::default() }, &logits, 2000)[0], 0.0, 0.0, 0.0]
        );
        let ban = BTreeMap::from([(0, f32::NEG_INFINITY), (3, 5.0), (9, 1.0)]);
        let banned = Sampling { logit_bias: ban.clone(), top_p: 1.0, ..Sampling::default() };
        assert!(share(banned, &logits, 500)[0] == 0.0);
        let greedy = Sampling { logit_bias: ban, temperature: 0.0, ..Sampling::default() };
        assert_eq!(share(greedy, &logits, 1)[3], 1.0);
        let bad = BTreeMap::from([(1, f32::NAN)]);
        assert!(Sampler::new(Sampling { logit_bias: bad, ..Sampling::default() }).is_err());
    }

    #[test]
    fn as_much_sorting_as_needed_changes_nothing() {
        let hash = |i: usize| ((i * 2_654_435_761) >> 7) % 997;
        for n in [1, 2, 255, 256, 257, 5000] {
            let tokens: Vec<(f32, u32)> = (0..n).map(|i| (hash(i) as f32, i as u32)).collect();
            let mut sorted = tokens.clone();
            sorted.sort_by(|a, b| b.0.total_cmp(&a.0));
            let mut falling = Falling::new(tokens.iter().copied());
            assert!((0..n).all(|i| falling.get(i) == Some(sorted[i])) && falling.get(n).is_none());
            let limit = sorted[n / 3].0;
            assert_eq!(
                Falling::new(tokens.iter().copied()).position(|w| w <= limit),
                sorted.iter().position(|t| t.0 <= limit)
            );
            for count in [1, n / 2, n, n + 1] {
                let mut falling = Falling::new(tokens.iter().copied());
                falling.get(n / 4);
                falling.truncate(count);
                falling.get(count.saturating_sub(1));
                assert!(falling.tokens.len() == n.min(count));
                assert!((0..n.min(count)).all(|i| falling.get(i) == Some(sorted[i])));
            }
        }
    }

    #[test]
    fn penalties_decay_and_seeds_repeat() {
        let greedy =
            Sampling { temperature: 0.0, presence_penalty: 0.5, frequency_penalty: 1.0, ..Sampling::default() };
        let mut s = Sampler::new(Sampling { penalty_decay: 0.5, ..greedy }).unwrap();
        let mut next = || s.sample(&[2.0, 1.0, 0.0]).unwrap();
        // 2 - 0.5 - 1 < 1; then 0 has count 0.5 (2 - 0.5 - 0.5 = 1) and 1 has count 1: a tie with nothing above 1.
        assert_eq!([next(), next(), next()], [0, 1, 0]);
        let run = |seed| {
            let mut s = Sampler::new(Sampling { seed, ..Sampling::default() }).unwrap();
            (0..50).map(|_| s.sample(&[0.1, 0.2, 0.3, 0.4]).unwrap()).collect::<Vec<_>>()
        };
        let mut first = Sampler::new(Sampling { presence_penalty: 0.3, ..Sampling::default() }).unwrap();
        let (mut copy, logits) = (first.clone(), [0.1, 0.2, 0.3, 0.4]);
        let chosen: Vec<u32> = (0..20).map(|_| copy.sample(&logits).unwrap()).collect();
        chosen[..9].iter().for_each(|&t| first.follow(t));
        let rest: Vec<u32> = (9..20).map(|_| first.sample(&logits).unwrap()).collect();
        assert_eq!(rest, chosen[9..]);
        assert_eq!(run(3), run(3));
        assert_ne!(run(3), run(4));
    }

    #[test]
    fn bad_input_is_an_error() {
        assert!(
            Sampler::new(Sampling { top_p: 1.5, ..Sampling::default() })
                .err()
                .unwrap()
                .to_string()
                .contains("top-p = 1.5")
        );
        assert!(Sampler::new(Sampling { temperature: f32::NAN, ..Sampling::default() }).is_err());
        assert!(Sampler::new(Sampling::default()).unwrap().sample(&[0.0, f32::NAN]).is_err());
    }
}
