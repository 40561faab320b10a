//! What this machine can do: the figures that speeds are quoted against.

use crate::Context;
use crate::gemm::{Trans, gemm};
use std::time::Instant;

/// Best of `n` runs, in seconds.
fn best(n: usize, mut f: impl FnMut()) -> f64 {
    let time = |_| {
        let start = Instant::now();
        f();
        start.elapsed().as_secs_f64()
    };
    (0..n).map(time).fold(f64::INFINITY, f64::min)
}

/// Speed of a large matrix product, in floating-point operations per second: on the CPU in f32 (1024 x 1024 x 1024), on a GPU in the
/// type of activations (8192 x 8192 x 8192).
pub fn gemm_peak(ctx: &Context) -> f64 {
    if let Some(gpu) = ctx.cuda() {
        let (n, t) = (8192, ctx.dtype());
        let row: Vec<f32> = (0..n + 64).map(|i| (i as f32 * 0.7).sin()).collect();
        let values: Vec<f32> = (0..n).flat_map(|i| row[i % 61..][..n].iter().copied()).collect();
        let a = ctx.copy_of(&values);
        let (b, c) = (a.duplicate(), ctx.alloc(n * n));
        let seconds = best(8, || {
            gpu.gemm(Trans::N, Trans::T, n, n, n, a.ptr(), b.ptr(), t, false, c.ptr(), t);
            gpu.synchronize();
        });
        return 2.0 * (n * n * n) as f64 / seconds;
    }
    let n = 1024;
    let (a, b, mut c) = (vec![0.5; n * n], vec![0.25; n * n], vec![0.0; n * n]);
    let seconds = best(8, || gemm(ctx, Trans::N, Trans::T, n, n, n, &a, &b, false, &mut c));
    2.0 * (n * n * n) as f64 / seconds
}

/// Floating-point operations per second by the data sheet: two multiply-adds of eight f32 a cycle and thread at the clock that
/// the system reports. The processor may run faster than that clock. `None` where it is not known.
pub fn nominal_peak(ctx: &Context) -> Option<f64> {
    if ctx.cuda().is_some() {
        return None;
    }
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let clock = |l: &str| l.strip_prefix("cpu MHz")?.split(':').nth(1)?.trim().parse::<f64>().ok();
    let mhz = info.lines().find_map(clock)?;
    crate::simd::has_avx2().then(|| mhz * 1e6 * 32.0 * ctx.threads().len() as f64)
}

/// Speed of reading memory on all threads, in bytes per second; on a GPU of copying it, bytes read plus bytes written.
pub fn read_bandwidth(ctx: &Context) -> f64 {
    if let Some(gpu) = ctx.cuda() {
        let (a, b) = (ctx.zeros_f32(1 << 28), ctx.alloc_f32(1 << 28));
        let seconds = best(8, || {
            gpu.copy(a.ptr(), b.ptr(), a.bytes());
            gpu.synchronize();
        });
        return 2.0 * a.bytes() as f64 / seconds;
    }
    let data = vec![1u64; 1 << 25];
    let parts = 64;
    let sums: Vec<std::sync::atomic::AtomicU64> = (0..parts).map(|_| Default::default()).collect();
    let seconds = best(5, || {
        ctx.threads().run(parts, |i| {
            let part = &data[i * data.len() / parts..(i + 1) * data.len() / parts];
            let sum = crate::simd::vectorize(
                #[inline(always)]
                || part.iter().fold(0u64, |s, v| s.wrapping_add(*v)),
            );
            sums[i].store(sum, std::sync::atomic::Ordering::Relaxed);
        });
    });
    std::hint::black_box(&sums);
    (data.len() * 8) as f64 / seconds
}
