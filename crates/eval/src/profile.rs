//! What a GPU did, as a table and as a trace for Chrome (chrome://tracing) or Perfetto.

use anser_tensor::cuda::Span;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;

/// Work of one name.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct Kind {
    /// Name of the kernel.
    pub name: String,
    /// How often it ran.
    pub calls: usize,
    /// Microseconds altogether.
    pub total: f64,
    /// Bytes of its buffers altogether, each counted once a call.
    pub bytes: usize,
    /// Floating-point operations, of matrix products.
    pub flops: f64,
}

/// Sums by name, the longest first.
pub fn kinds(spans: &[Span]) -> Vec<Kind> {
    let mut by_name: BTreeMap<&str, Kind> = BTreeMap::new();
    for s in spans {
        let k = by_name.entry(&s.name).or_insert_with(|| Kind { name: s.name.clone(), ..Kind::default() });
        k.calls += 1;
        k.total += s.duration;
        k.bytes += s.bytes;
        k.flops += s.flops;
    }
    let mut kinds: Vec<Kind> = by_name.into_values().collect();
    kinds.sort_by(|a, b| b.total.total_cmp(&a.total));
    kinds
}

/// What a device can do at most.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Limits {
    /// Bytes a second, read and written.
    pub bandwidth: f64,
    /// Floating-point operations a second, of matrix products.
    pub peak: f64,
}

impl Kind {
    /// Bytes a second.
    pub fn bandwidth(&self) -> f64 {
        self.bytes as f64 / self.total * 1e6
    }

    /// Operations a second.
    pub fn rate(&self) -> f64 {
        self.flops / self.total * 1e6
    }

    /// The share of the nearer limit that it reaches. Buffers that stay in a cache, or are not read whole, give more than can be.
    pub fn of_limit(&self, limits: Limits) -> f64 {
        (self.bandwidth() / limits.bandwidth).max(self.rate() / limits.peak)
    }
}

/// A table of the kinds: calls, time, share of the sum, the speed that the time means, and how near to a limit that is.
pub fn table(spans: &[Span], limits: Limits) -> String {
    let busy: f64 = spans.iter().map(|s| s.duration).sum();
    let end = spans.iter().map(|s| s.start + s.duration).fold(0.0, f64::max);
    let mut out = format!(
        "{} launches, {:.3} ms busy of {:.3} ms (events included); limits {:.0} GB/s, {:.0} TFLOP/s\n{:>6} {:>11} {:>7} {:>9} {:>9} {:>8} {:>6}  name\n",
        spans.len(),
        busy / 1e3,
        end / 1e3,
        limits.bandwidth / 1e9,
        limits.peak / 1e12,
        "calls",
        "total us",
        "share",
        "us each",
        "GB/s",
        "TFLOP/s",
        "limit",
    );
    for k in kinds(spans) {
        let tflops = if k.flops > 0.0 { format!("{:.1}", k.rate() / 1e12) } else { String::new() };
        let _ = writeln!(
            out,
            "{:>6} {:>11.1} {:>6.2}% {:>9.2} {:>9.0} {:>8} {:>5.0}%  {}",
            k.calls,
            k.total,
            100.0 * k.total / busy,
            k.total / k.calls as f64,
            k.bandwidth() / 1e9,
            tflops,
            100.0 * k.of_limit(limits),
            k.name
        );
    }
    out
}

/// The spans as Chrome's trace events.
pub fn chrome_trace(spans: &[Span]) -> Value {
    let event = |s: &Span| {
        json!({
            "name": s.name, "ph": "X", "ts": s.start, "dur": s.duration, "pid": 0, "tid": 0,
            "args": { "bytes": s.bytes, "flops": s.flops },
        })
    };
    json!({ "traceEvents": spans.iter().map(event).collect::<Vec<_>>(), "displayTimeUnit": "ms" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_by_name() {
        let span = |name: &str, start: f64, duration: f64| Span {
            name: name.into(),
            start,
            duration,
            bytes: 3_000_000,
            flops: if name == "gemm" { 4e6 } else { 0.0 },
        };
        let spans = [span("a", 0.0, 1.0), span("gemm", 2.0, 5.0), span("a", 8.0, 2.0)];
        let k = kinds(&spans);
        assert_eq!(
            k.iter().map(|k| (k.name.as_str(), k.calls, k.total)).collect::<Vec<_>>(),
            [("gemm", 1, 5.0), ("a", 2, 3.0)]
        );
        let t = table(&spans, Limits { bandwidth: 4e12, peak: 1e12 });
        assert!(t.lines().nth(2).unwrap().ends_with("80%  gemm"), "{t}");
        assert!(t.starts_with("3 launches, 0.008 ms busy of 0.010 ms"), "{t}");
        assert!(
            t.lines().nth(3).unwrap().split_whitespace().eq(["2", "3.0", "37.50%", "1.50", "2000", "50%", "a"]),
            "{t}"
        );
        let trace = chrome_trace(&spans);
        assert_eq!(trace["traceEvents"][2]["ts"], 8.0);
    }
}
