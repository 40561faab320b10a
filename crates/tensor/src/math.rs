//! Elementary functions in f32, branch-free so that the compiler can vectorise loops over them.

/// e^x with a relative error below 2e-7; below -87.3 (where the result would be denormal) it is 0. NaN stays NaN.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    // x = n ln 2 + r, |r| <= ln 2 / 2; ln 2 in two parts so that n ln 2 is exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    // Adding and subtracting 1.5 x 2^23 rounds to the nearest integer; the low bits of the sum hold it.
    const ROUND: f32 = 12_582_912.0;
    let clamped = if x > 89.0 { 89.0 } else { x };
    let clamped = if clamped < -88.0 { -88.0 } else { clamped };
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_HIGH, clamped);
    let r = n.mul_add(-LN2_LOW, r);
    // Taylor coefficients, the last ones adjusted for the interval (minimax).
    let p = r.mul_add(1.398_199_9e-3, 8.333_452e-3);
    let p = r.mul_add(p, 4.166_579_6e-2);
    let p = r.mul_add(p, 1.666_666_6e-1);
    let p = r.mul_add(p, 0.5);
    let p = r.mul_add(p, 1.0);
    let p = r.mul_add(p, 1.0);
    // 2^n in two factors: n reaches 128 just below overflow.
    let bits = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let half = bits >> 1;
    let power = |e: i32| f32::from_bits(((e.wrapping_add(127)) << 23) as u32);
    let y = p * power(half) * power(bits.wrapping_sub(half));
    if x < -87.3 { 0.0 } else { y }
}

/// 1 / (1 + e^-x), with a small relative error for large negative x too (0 below -87.3). For 1 - sigmoid(x) use sigmoid(-x).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    // With e = e^-|x| nothing overflows: 1 / (1 + e) or e / (1 + e).
    let e = exp(-x.abs());
    let top = if x < 0.0 { e } else { 1.0 };
    let y = top / (1.0 + e);
    if x.is_nan() { x } else { y }
}

/// Hyperbolic tangent with a relative error below 3e-7, near 0 too.
#[inline(always)]
pub fn tanh(x: f32) -> f32 {
    let a = x.abs();
    let large = 1.0 - 2.0 / (exp(2.0 * a) + 1.0);
    // Below 0.55 the difference from 1 would lose digits: the odd Taylor series.
    let s = a * a;
    let p = s.mul_add(-1.456_834_3e-3, 3.592_128e-3);
    let p = s.mul_add(p, -8.863_236e-3);
    let p = s.mul_add(p, 2.186_949e-2);
    let p = s.mul_add(p, -5.396_825_3e-2);
    let p = s.mul_add(p, 1.333_333_3e-1);
    let p = s.mul_add(p, -3.333_333_4e-1);
    let small = (a * s).mul_add(p, a);
    let y = if a < 0.55 { small } else { large };
    if x.is_nan() { x } else { y.copysign(x) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::simd::vectorize;

    fn worst(range: (f32, f32), f: impl Fn(f32) -> f32, want: impl Fn(f64) -> f64) -> f64 {
        let n = 400_000;
        let at = |i: usize| range.0 + (range.1 - range.0) * (i as f32 / n as f32);
        let error = |x: f32| ((f(x) as f64 - want(x as f64)) / want(x as f64)).abs();
        vectorize(
            #[inline(always)]
            || (0..=n).map(at).filter(|&x| x != 0.0).map(error).fold(0.0, f64::max),
        )
    }

    #[test]
    fn relative_errors() {
        let sig = |x: f64| 1.0 / (1.0 + (-x).exp());
        for (what, error) in [
            ("exp", worst((-87.0, 88.7), exp, f64::exp)),
            ("exp near 0", worst((-1.0, 1.0), exp, f64::exp)),
            ("sigmoid", worst((-80.0, 80.0), sigmoid, sig)),
            ("sigmoid near 0", worst((-4.0, 4.0), sigmoid, sig)),
            ("tanh", worst((-10.0, 10.0), tanh, f64::tanh)),
            ("tanh near 0", worst((-1.0, 1.0), tanh, f64::tanh)),
            ("tanh at 0", worst((-1e-3, 1e-3), tanh, f64::tanh)),
        ] {
            assert!(error < 3e-7, "{what}: {error:.1e}");
        }
    }

    #[test]
    fn limits() {
        assert_eq!((exp(0.0), exp(f32::NEG_INFINITY), exp(-1000.0)), (1.0, 0.0, 0.0));
        assert_eq!((exp(f32::INFINITY), exp(89.0)), (f32::INFINITY, f32::INFINITY));
        assert_eq!((sigmoid(0.0), sigmoid(f32::INFINITY), sigmoid(f32::NEG_INFINITY)), (0.5, 1.0, 0.0));
        assert_eq!((tanh(0.0), tanh(f32::INFINITY), tanh(f32::NEG_INFINITY)), (0.0, 1.0, -1.0));
        assert!(exp(f32::NAN).is_nan() && sigmoid(f32::NAN).is_nan() && tanh(f32::NAN).is_nan());
    }
}
