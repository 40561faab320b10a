//! What a GPU did, as a table and as a trace for Chrome (chrome://tracing) or Perfetto.

use anser_tensor::cuda::Span;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;

/// Work of one name.
#[derive(Clone, Debug, Default, PartialEq)]
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

/// A table of the kinds: calls, time, share of the sum, and the speed that the time means.
pub fn table(spans: &[Span]) -> String {
    let busy: f64 = spans.iter().map(|s| s.duration).sum();
    let end = spans.iter().map(|s| s.start + s.duration).fold(0.0, f64::max);
    let mut out = format!(
        "{} launches, {:.3} ms busy of {:.3} ms (events included)\n{:>6} {:>11} {:>7} {:>9} {:>9} {:>8}  name\n",
        spans.len(),
        busy / 1e3,
        end / 1e3,
        "calls",
        "total us",
        "share",
        "us each",
        "GB/s",
        "TFLOP/s"
    );
    for k in kinds(spans) {
        let (gbs, tflops) = (k.bytes as f64 / k.total / 1e3, k.flops / k.total / 1e6);
        let tflops = if k.flops > 0.0 { format!("{tflops:.1}") } else { String::new() };
        let _ = writeln!(
            out,
            "{:>6} {:>11.1} {:>6.2}% {:>9.2} {:>9.0} {:>8}  {}",
            k.calls,
            k.total,
            100.0 * k.total / busy,
            k.total / k.calls as f64,
            gbs,
            tflops,
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
        let t = table(&spans);
        assert!(t.starts_with("3 launches, 0.008 ms busy of 0.010 ms"), "{t}");
        assert!(t.lines().nth(3).unwrap().split_whitespace().eq(["2", "3.0", "37.50%", "1.50", "2000", "a"]), "{t}");
        let trace = chrome_trace(&spans);
        assert_eq!(trace["traceEvents"][2]["ts"], 8.0);
    }
}
