//! Digit reversal: "12345,54321#". A small model has to carry the digits in its state and read them back in reverse.

use crate::Batch;
use crate::random::Random;

/// The ten digits, the comma and the end mark.
pub const VOCAB: usize = 12;
const COMMA: u32 = 10;
const END: u32 = 11;

/// Rows of `ctx` inputs with as many numbers of 1 to `max` digits as fit, the state starting anew at each. Only the
/// answers (reversed digits and end mark) are targets; the digits of a number cannot be foretold. The same seed and
/// stream give the same batch.
///
/// # Panics
/// When a number of `max` digits does not fit a row (2 max + 1 inputs).
pub fn batch(seed: u64, stream: u64, rows: usize, ctx: usize, max: usize) -> Batch {
    assert!(max >= 1 && 2 * max < ctx);
    let mut random = Random::new(seed, stream);
    let mut b = Batch::default();
    for row in 0..rows {
        let end = (row + 1) * ctx;
        while end - b.tokens.len() > 2 * max {
            let digits = 1 + random.below(max);
            add(&mut b, digits, &mut random);
        }
        // What is left takes a shorter number.
        let room = (end - b.tokens.len()).saturating_sub(1) / 2;
        if room > 0 {
            add(&mut b, room, &mut random);
        }
        b.targets.resize(end, -1);
        b.tokens.resize(end, END);
    }
    b
}

/// Numbers of exactly `digits` digits, one a row.
pub fn exact(seed: u64, digits: usize, rows: usize) -> Batch {
    let mut random = Random::new(seed, digits as u64);
    let mut b = Batch::default();
    (0..rows).for_each(|_| add(&mut b, digits, &mut random));
    b
}

fn add(b: &mut Batch, digits: usize, random: &mut Random) {
    b.starts.push(b.tokens.len());
    let number: Vec<u32> = (0..digits).map(|_| random.below(10) as u32).collect();
    b.tokens.extend(&number);
    b.tokens.push(COMMA);
    b.tokens.extend(number.iter().rev());
    b.targets.extend(std::iter::repeat_n(-1, digits));
    b.targets.extend(number.iter().rev().map(|&d| d as i32));
    b.targets.push(END as i32);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_hold_reversed_numbers() {
        let b = batch(1, 2, 50, 64, 30);
        assert_eq!((b.tokens.len(), b.targets.len()), (50 * 64, 50 * 64));
        assert_eq!(b, batch(1, 2, 50, 64, 30));
        assert_ne!(b, batch(1, 3, 50, 64, 30));
        let mut lengths = std::collections::BTreeSet::new();
        for (i, &start) in b.starts.iter().enumerate() {
            let end = b.starts.get(i + 1).copied().unwrap_or(b.tokens.len());
            let comma = (start..end).find(|&j| b.tokens[j] == COMMA).unwrap();
            let n = comma - start;
            lengths.insert(n);
            assert!(start / 64 == (comma + n) / 64, "a number stays in its row");
            for j in 0..n {
                assert_eq!(b.targets[comma + j], b.tokens[comma - 1 - j] as i32);
                assert_eq!(b.targets[start + j], -1);
            }
            assert_eq!(b.targets[comma + n], END as i32);
            assert!((comma + n + 1..end).all(|j| b.targets[j] == -1));
        }
        assert_eq!(lengths, (1..=30).collect());
        let e = exact(1, 7, 3);
        assert_eq!((e.tokens.len(), e.starts), (45, vec![0, 15, 30]));
    }
}
