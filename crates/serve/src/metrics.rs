//! What the server counts, in the text format of Prometheus.

use anser_infer::Engine;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

/// Counters of the HTTP side; those of the engine are read when asked for.
pub struct Metrics {
    registry: Registry,
    requests: Family<Answered, Counter>,
    /// Seconds until the first token of an answer.
    pub first: Histogram,
    /// Seconds from a token to the next.
    pub between: Histogram,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Answered {
    path: String,
    status: u16,
}

impl Metrics {
    /// With the statistics of an engine.
    pub fn new(engine: Engine) -> Metrics {
        let mut registry = Registry::with_prefix("anser");
        let requests = Family::default();
        let first = Histogram::new(exponential_buckets(0.005, 2.0, 14));
        let between = Histogram::new(exponential_buckets(0.001, 2.0, 12));
        registry.register("http_requests", "Responses by route and status", requests.clone());
        registry.register("time_to_first_token_seconds", "From a request to its first token", first.clone());
        registry.register("time_between_tokens_seconds", "From a token to the next", between.clone());
        registry.register_collector(Box::new(OfEngine(engine)));
        Metrics { registry, requests, first, between }
    }

    /// Counts a response.
    pub fn answered(&self, path: &str, status: u16) {
        self.requests.get_or_create(&Answered { path: path.into(), status }).inc();
    }

    /// All of it.
    pub fn text(&self) -> String {
        let mut out = String::new();
        // Writing to a string doesn't fail.
        let _ = text::encode(&mut out, &self.registry);
        out
    }
}

struct OfEngine(Engine);

impl std::fmt::Debug for OfEngine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("OfEngine")
    }
}

impl Collector for OfEngine {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let s = self.0.stats();
        for (name, help, value) in [
            ("requests_running", "Sequences in the batch", s.running),
            ("requests_waiting", "Requests that wait for a slot", s.waiting),
            ("state_bytes_running", "Bytes of the states of running sequences", s.running_bytes),
            ("state_bytes_cached", "Bytes of states kept in memory", s.cached_bytes),
            ("state_bytes_disk", "Bytes of states in the folder", s.disk_bytes),
            ("states_cached", "States kept in memory or in the folder", s.cached_states),
        ] {
            let gauge = ConstGauge::new(value as i64);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)?;
        }
        for (name, help, value) in [
            ("requests_finished", "Requests that came to their end", s.finished),
            ("requests_cancelled", "Requests whose client went away", s.cancelled),
            ("requests_failed", "Requests that failed", s.failed),
            ("requests_refused", "Requests refused because too many waited", s.refused),
            ("tokens_read", "Tokens that the model has read", s.tokens_read),
            ("tokens_written", "Tokens written", s.tokens_written),
            ("prefix_hits", "Requests that went on from a cached prefix", s.prefix_hits),
            ("tokens_cached", "Tokens of prompts that a cached state saved", s.tokens_cached),
            ("steps", "Steps of the model", s.steps),
        ] {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(name, help, None, counter.metric_type())?)?;
        }
        let tiers = self.0.states().tiers();
        let help = "Whether where states are kept worked when it was last used";
        let mut up = encoder.encode_descriptor("state_tier_up", help, None, MetricType::Gauge)?;
        for t in &tiers {
            ConstGauge::new(i64::from(t.up)).encode(up.encode_family(&[("tier", t.tier)])?)?;
        }
        let help = "How often it failed";
        let mut errors = encoder.encode_descriptor("state_tier_errors", help, None, MetricType::Counter)?;
        for t in &tiers {
            ConstCounter::new(t.errors).encode(errors.encode_family(&[("tier", t.tier)])?)?;
        }
        let help = "States that it was not given, as they are larger than what it takes";
        let mut too_large = encoder.encode_descriptor("state_tier_too_large", help, None, MetricType::Counter)?;
        for t in &tiers {
            ConstCounter::new(t.too_large).encode(too_large.encode_family(&[("tier", t.tier)])?)?;
        }
        Ok(())
    }
}
