//! Run-time choice of the instruction set for code that the compiler vectorises.

/// Runs `f` compiled for the best instruction set of this machine (AVX2 + FMA where present).
///
/// Mark what `f` calls `#[inline(always)]`, or it stays compiled for the baseline.
#[inline(always)]
pub fn vectorize<R>(f: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        // SAFETY: the features are there.
        return unsafe { avx2(f) };
    }
    f()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn avx2<R>(f: impl FnOnce() -> R) -> R {
    f()
}
