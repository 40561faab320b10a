/// Where in a prompt its state is kept: after so many strides, a number of which few leading bits are not zero, so that a long prompt doesn't
/// drive out everything else: with 4, after 1, 2, .. 15, 16, 18, .. 30, 32, 36, .. of them. With 1 all that attention keeps of a prompt, which grows, is
/// twice as much as at its end.
pub(super) struct Strides {
    /// 0: nowhere.
    pub length: usize,
    pub bits: u32,
}

impl Strides {
    pub fn is_end(&self, tokens: usize) -> bool {
        let count = tokens.checked_div(self.length).unwrap_or(0);
        count > 0 && count * self.length == tokens && count.ilog2() < count.trailing_zeros() + self.bits
    }

    /// The next place after so many tokens.
    pub fn next(&self, tokens: usize) -> usize {
        let Some(count) = tokens.checked_div(self.length) else { return usize::MAX };
        let step = 1 << (count + 1).ilog2().saturating_sub(self.bits - 1);
        (count / step + 1).saturating_mul(step * self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strides_become_rarer() {
        for bits in [1, 4] {
            let strides = Strides { length: 10, bits };
            let ends: Vec<usize> = (0..6000).filter(|&t| strides.is_end(t)).collect();
            for t in 0..4000 {
                assert_eq!(Some(&strides.next(t)), ends.iter().find(|e| **e > t), "{t}");
            }
        }
        let ends = |bits, most| (0..=most).filter(|&t| Strides { length: 10, bits }.is_end(t)).collect::<Vec<_>>();
        assert_eq!(ends(1, 700), [10, 20, 40, 80, 160, 320, 640]);
        assert_eq!(ends(4, 400)[13..], [140, 150, 160, 180, 200, 220, 240, 260, 280, 300, 320, 360, 400]);
        let never = Strides { length: 0, bits: 4 };
        assert!(!never.is_end(0) && !never.is_end(512) && never.next(512) == usize::MAX);
    }
}
