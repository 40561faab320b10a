/// A run of rows that is one sequence (or a piece of one).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First row.
    pub start: usize,
    /// Number of rows, at least 1.
    pub len: usize,
    /// Row of the state arena to start from; `None` starts from zero (a new document).
    pub state_in: Option<usize>,
    /// Row of the state arena that receives the final state, if it is wanted. No two segments share one.
    pub state_out: Option<usize>,
}

/// The segments of `b` sequences of `t` rows each: sequence i starts from and ends in state row i if `state`.
pub fn batch(b: usize, t: usize, state: bool) -> Vec<Segment> {
    let slot = |i| state.then_some(i);
    (0..b).map(|i| Segment { start: i * t, len: t, state_in: slot(i), state_out: slot(i) }).collect()
}
