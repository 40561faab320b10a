//! A load generator: streamed completions that arrive by chance or one after the other, and how long each took.
//!
//! Times count from the moment at which a request was due, not from that at which it could be sent, so that a server that holds up
//! its clients doesn't hide it (coordinated omission).

use http_body_util::{BodyExt, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::{Request, Response, Uri, header};
use hyper_util::rt::TokioIo;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::TcpStream;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;
use tokio::time::Instant;

/// A server with an OpenAI API, reached without TLS.
#[derive(Clone, Debug)]
pub struct Target {
    /// Host and port.
    authority: String,
    /// What stands before `/v1`.
    path: String,
    key: Option<String>,
}

/// Which requests come, and when.
#[derive(Clone, Debug)]
pub struct Load {
    /// When they come.
    pub arrivals: Arrivals,
    /// For so long.
    pub duration: Duration,
    /// Tokens of a prompt, on average. They are printable characters by chance, so that no two prompts begin alike.
    pub prompt: usize,
    /// Tokens of an answer, on average.
    pub answer: usize,
    /// How both numbers vary.
    pub lengths: Lengths,
    /// Of all answers.
    pub temperature: f32,
    /// Of lengths, prompts, arrivals and answers.
    pub seed: u64,
    /// A request that takes longer is an error.
    pub timeout: Duration,
}

/// When requests come.
#[derive(Clone, Copy, Debug)]
pub enum Arrivals {
    /// So many a second on average, whatever the server does: a Poisson process.
    Poisson(f64),
    /// So many at any time: each is followed by the next when it ends.
    Concurrent(usize),
}

/// How a number of tokens varies around its mean.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lengths {
    /// Not at all.
    Fixed,
    /// From 1 to twice the mean, each as often.
    Uniform,
    /// Many short ones and a few up to eight times as long as the mean.
    Exponential,
}

/// What came of a request. Times are in seconds.
#[derive(Clone, Debug)]
pub struct Sample {
    /// When it was due, since the start.
    pub due: f64,
    /// From then to the first text.
    pub first: Option<f64>,
    /// From each piece of text to the next.
    pub gaps: Vec<f64>,
    /// From when it was due to the end.
    pub total: f64,
    /// Tokens of the answer.
    pub tokens: usize,
    /// Why there is no whole answer.
    pub error: Option<String>,
}

/// All that was measured.
#[derive(Clone, Debug)]
pub struct Measured {
    /// Of all requests.
    pub samples: Vec<Sample>,
    /// From the start to the last end.
    pub seconds: f64,
}

/// Quantiles of times.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct Quantiles {
    /// Half are shorter.
    pub p50: f64,
    /// 90 of 100 are.
    pub p90: f64,
    /// 99 of 100 are.
    pub p99: f64,
    /// The longest.
    pub max: f64,
}

impl Target {
    /// The server at `http://HOST[:PORT][/PATH]`, with or without `/v1` at the end.
    ///
    /// # Errors
    /// When it is no such address.
    pub fn new(url: &str, key: Option<String>) -> Result<Target, String> {
        let uri: Uri = url.parse().map_err(|e| format!("{url}: {e}"))?;
        if uri.scheme_str() != Some("http") {
            return Err(format!("{url}: give an address that begins with http:// (TLS is not spoken here)"));
        }
        let authority = uri.authority().ok_or_else(|| format!("{url}: there is no host in it"))?;
        let port = authority.port_u16().unwrap_or(80);
        let path = uri.path().trim_end_matches('/').trim_end_matches("/v1").to_string();
        Ok(Target { authority: format!("{}:{port}", authority.host()), path, key })
    }

    /// The name of the first model that the server has.
    ///
    /// # Errors
    /// When it cannot be reached or doesn't say.
    pub async fn model(&self) -> Result<String, String> {
        let failed = |why: String| format!("http://{}{}/v1/models: {why}", self.authority, self.path);
        let response = self.send("GET", "models", String::new()).await.map_err(failed)?;
        let status = response.status();
        let body = response.into_body().collect().await.map_err(|e| failed(e.to_string()))?.to_bytes();
        let said: Value = serde_json::from_slice(&body).unwrap_or_default();
        said["data"][0]["id"].as_str().map(String::from).ok_or_else(|| failed(format!("it answers {status} {said}")))
    }

    /// Sends a request on a connection of its own, which ends with the response.
    async fn send(&self, method: &str, route: &str, body: String) -> Result<Response<Incoming>, String> {
        let stream = TcpStream::connect(&self.authority).await.map_err(|e| format!("connecting: {}", e.kind()))?;
        // Nothing waits for more to be sent.
        let _ = stream.set_nodelay(true);
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|e| format!("connecting: {e}"))?;
        tokio::spawn(connection);
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}/v1/{route}", self.path))
            .header(header::HOST, &self.authority)
            .header(header::CONTENT_TYPE, "application/json");
        if let Some(key) = &self.key {
            request = request.header(header::AUTHORIZATION, format!("Bearer {key}"));
        }
        let request = request.body(Full::new(Bytes::from(body))).map_err(|e| e.to_string())?;
        sender.send_request(request).await.map_err(|e| format!("sending: {e}"))
    }
}

impl Load {
    /// Sends requests until the time is over and waits for the last answer, or until `stop`, whichever is first.
    ///
    /// # Errors
    /// When the server cannot be reached at all.
    pub async fn run(&self, target: &Target, stop: impl Future<Output = ()>) -> Result<Measured, String> {
        let model = target.model().await?;
        let (to, mut samples) = unbounded_channel();
        let client = Arc::new(Client { load: self.clone(), target: target.clone(), model, start: Instant::now(), to });
        let start = client.start;
        tokio::select! {
            () = client.send_all() => {}
            () = stop => {}
        }
        Ok(Measured { samples: drain(&mut samples), seconds: start.elapsed().as_secs_f64() })
    }

    /// The random numbers of a request.
    fn random(&self, number: u64) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(number);
        rng
    }
}

fn drain(samples: &mut UnboundedReceiver<Sample>) -> Vec<Sample> {
    std::iter::from_fn(|| samples.try_recv().ok()).collect()
}

/// The random numbers of arrivals, apart from those of requests.
const ARRIVALS: u64 = u64::MAX;

/// Uniform in (0, 1).
fn unit(rng: &mut ChaCha8Rng) -> f64 {
    ((rng.next_u64() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

impl Lengths {
    fn draw(self, mean: usize, rng: &mut ChaCha8Rng) -> usize {
        let (u, mean_f) = (unit(rng), mean as f64);
        match self {
            Lengths::Fixed => mean,
            // From 1 to 2 mean - 1.
            Lengths::Uniform => 1 + (u * (2 * mean).saturating_sub(1) as f64) as usize,
            Lengths::Exponential => ((-u.ln() * mean_f).ceil() as usize).clamp(1, 8 * mean),
        }
    }
}

struct Client {
    load: Load,
    target: Target,
    model: String,
    start: Instant,
    to: UnboundedSender<Sample>,
}

impl Client {
    async fn send_all(self: &Arc<Client>) {
        let mut tasks = JoinSet::new();
        let end = self.start + self.load.duration;
        match self.load.arrivals {
            Arrivals::Poisson(rate) => {
                let mut rng = self.load.random(ARRIVALS);
                let mut due = self.start;
                for number in 0.. {
                    due += Duration::from_secs_f64(-unit(&mut rng).ln() / rate);
                    if due >= end {
                        break;
                    }
                    tokio::time::sleep_until(due).await;
                    let client = self.clone();
                    tasks.spawn(async move {
                        client.ask(number, due).await;
                    });
                    while tasks.try_join_next().is_some() {}
                }
            }
            Arrivals::Concurrent(count) => {
                let numbers = Arc::new(AtomicU64::new(0));
                for _ in 0..count {
                    let (client, numbers) = (self.clone(), numbers.clone());
                    tasks.spawn(async move {
                        let mut failed = false;
                        while Instant::now() < end {
                            if failed {
                                // A server that refuses is not to be asked without a pause.
                                tokio::time::sleep(Duration::from_millis(100)).await;
                            }
                            failed = !client.ask(numbers.fetch_add(1, Ordering::Relaxed), Instant::now()).await;
                        }
                    });
                }
            }
        }
        while tasks.join_next().await.is_some() {}
    }

    /// One request: whether it was answered.
    async fn ask(&self, number: u64, due: Instant) -> bool {
        let mut sample = Sample {
            due: (due - self.start).as_secs_f64(),
            first: None,
            gaps: Vec::new(),
            total: 0.0,
            tokens: 0,
            error: None,
        };
        let answered = tokio::time::timeout_at(due + self.load.timeout, self.answer(number, due, &mut sample)).await;
        sample.error = answered.unwrap_or_else(|_| Err("timeout".into())).err();
        sample.total = due.elapsed().as_secs_f64();
        let answered = sample.error.is_none();
        // Nobody listens any more after a stop.
        let _ = self.to.send(sample);
        answered
    }

    async fn answer(&self, number: u64, due: Instant, sample: &mut Sample) -> Result<(), String> {
        let (load, mut rng) = (&self.load, self.load.random(number));
        let prompt = load.lengths.draw(load.prompt, &mut rng);
        // In the vocabularies of RWKV the character of code c is token c + 1.
        let prompt: Vec<u32> = (0..prompt).map(|_| 33 + (unit(&mut rng) * 94.0) as u32).collect();
        let body = json!({
            "model": self.model,
            "prompt": prompt,
            "max_tokens": load.lengths.draw(load.answer, &mut rng),
            "temperature": load.temperature,
            "seed": rng.next_u32(),
            "ignore_eos": true,
            "stream": true,
            "stream_options": { "include_usage": true },
        });
        let response = self.target.send("POST", "completions", body.to_string()).await?;
        if response.status() != 200 {
            return Err(format!("status {}", response.status().as_u16()));
        }
        let (mut body, mut held, mut last) = (response.into_body(), Vec::new(), None);
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| "the connection broke".to_string())?;
            let Some(data) = frame.data_ref() else { continue };
            let now = Instant::now();
            held.extend_from_slice(data);
            while let Some(end) = held.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = held.drain(..=end).collect();
                let Some(data) = line.strip_prefix(b"data: ").map(<[u8]>::trim_ascii_end) else { continue };
                if data == b"[DONE]" {
                    return Ok(());
                }
                let event: Value = serde_json::from_slice(data).map_err(|_| "an event is no JSON".to_string())?;
                if let Some(error) = event.get("error") {
                    return Err(format!("error in the stream: {}", error["message"].as_str().unwrap_or_default()));
                }
                if let Some(tokens) = event["usage"]["completion_tokens"].as_u64() {
                    sample.tokens = tokens as usize;
                }
                if event["choices"][0]["text"].as_str().is_some_and(|t| !t.is_empty()) {
                    match last.replace(now) {
                        None => sample.first = Some((now - due).as_secs_f64()),
                        Some(last) => sample.gaps.push((now - last).as_secs_f64()),
                    }
                }
            }
        }
        Err("the stream ended early".into())
    }
}

impl Quantiles {
    /// Of times in any order; zeros if there are none.
    pub fn of(times: impl IntoIterator<Item = f64>) -> Quantiles {
        let mut times: Vec<f64> = times.into_iter().collect();
        times.sort_by(f64::total_cmp);
        // The shortest time that is not exceeded by such a share.
        let at = |share: f64| {
            let rank = (share * times.len() as f64).ceil() as usize;
            times.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
        };
        Quantiles { p50: at(0.5), p90: at(0.9), p99: at(0.99), max: at(1.0) }
    }
}

impl Measured {
    /// Requests that were answered whole.
    pub fn answered(&self) -> impl Iterator<Item = &Sample> {
        self.samples.iter().filter(|s| s.error.is_none())
    }

    /// How many failed, by reason.
    pub fn errors(&self) -> BTreeMap<&str, usize> {
        let mut errors = BTreeMap::new();
        for error in self.samples.iter().filter_map(|s| s.error.as_deref()) {
            *errors.entry(error).or_default() += 1;
        }
        errors
    }

    /// Times of answered requests in seconds, by name: to the first text, from text to text, to the end.
    pub fn times(&self) -> [(&'static str, Vec<f64>); 3] {
        [
            ("first", self.answered().filter_map(|s| s.first).collect()),
            ("between", self.answered().flat_map(|s| s.gaps.iter().copied()).collect()),
            ("whole", self.answered().map(|s| s.total).collect()),
        ]
    }

    /// Tokens and answers a second.
    pub fn throughput(&self) -> [f64; 2] {
        let tokens: usize = self.answered().map(|s| s.tokens).sum();
        [tokens as f64 / self.seconds, self.answered().count() as f64 / self.seconds]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_of_the_times_that_there_were() {
        let q = Quantiles::of((1..=200).rev().map(f64::from));
        assert_eq!([q.p50, q.p90, q.p99, q.max], [100.0, 180.0, 198.0, 200.0]);
        assert_eq!(Quantiles::of([3.0]).p50, 3.0);
        assert_eq!(Quantiles::of([]).max, 0.0);
    }

    #[test]
    fn lengths_have_their_mean() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for (lengths, most) in [(Lengths::Fixed, 50), (Lengths::Uniform, 99), (Lengths::Exponential, 400)] {
            let all: Vec<usize> = (0..20_000).map(|_| lengths.draw(50, &mut rng)).collect();
            let mean = all.iter().sum::<usize>() as f64 / all.len() as f64;
            assert!((mean - 50.0).abs() < 1.5, "{lengths:?} {mean}");
            assert!(all.iter().all(|n| (1..=most).contains(n)), "{lengths:?}");
            assert!((0..100).all(|_| lengths.draw(1, &mut rng) >= 1));
        }
    }

    #[test]
    fn targets() {
        let t = Target::new("http://localhost:8000/v1/", None).unwrap();
        assert_eq!((&t.authority[..], &t.path[..]), ("localhost:8000", ""));
        let t = Target::new("http://host/api", None).unwrap();
        assert_eq!((&t.authority[..], &t.path[..]), ("host:80", "/api"));
        assert!(Target::new("https://host", None).unwrap_err().contains("TLS"));
        assert!(Target::new("host:8000", None).is_err() && Target::new("", None).is_err());
    }
}
