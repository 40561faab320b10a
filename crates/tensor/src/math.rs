//! Elementary functions in f32, branch-free so that the compiler can vectorise loops over them.

/// e^x, relative error below 3e-7 over the whole range.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    x.exp()
}

/// 1 / (1 + e^-x), accurate for large negative x too. For 1 - sigmoid(x) use sigmoid(-x).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// Hyperbolic tangent.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    x.tanh()
}
