/// The official learning-rate schedule: linear warm-up from 1%, then a cosine from `init` to `last`.
///
/// ```
/// let s = anser_train::Schedule { init: 2e-3, last: 2e-4, warmup: 5, total: 40 };
/// assert_eq!(s.at(0), 2e-5);
/// assert_eq!(s.at(5), 2e-3);
/// assert!((s.at(39) - 0.0002036231354042849).abs() < 1e-15);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// Learning rate after warm-up.
    pub init: f64,
    /// Learning rate at the end.
    pub last: f64,
    /// Steps of warm-up.
    pub warmup: u64,
    /// Steps of the whole run.
    pub total: u64,
}

impl Schedule {
    /// Learning rate of step `step` (from 0), for the 1x groups.
    pub fn at(&self, step: u64) -> f64 {
        let decaying = self.total.saturating_sub(self.warmup).max(1) as f64;
        let progress = (step.saturating_sub(self.warmup) as f64 / decaying).clamp(0.0, 1.0);
        let f = if self.init == 0.0 { 1.0 } else { self.last / self.init };
        let cosine = (0.5 + f / 2.0) + (0.5 - f / 2.0) * (std::f64::consts::PI * progress).cos();
        let warm = if step < self.warmup { 0.01 + 0.99 * step as f64 / self.warmup as f64 } else { 1.0 };
        self.init * cosine * warm
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_outside_its_range() {
        let s = Schedule { init: 1e-3, last: 1e-4, warmup: 3, total: 10 };
        assert!((s.at(10) - 1e-4).abs() < 1e-18 && (s.at(1000) - 1e-4).abs() < 1e-18);
        let none = Schedule { init: 1e-3, last: 1e-3, warmup: 0, total: 0 };
        assert_eq!((none.at(0), none.at(5)), (1e-3, 1e-3));
    }
}
