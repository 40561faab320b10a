//! Small random models, and what an engine and a session alone make of a prompt.

// Not every test uses all of it.
#![allow(dead_code)]

use anser_infer::engine::{End, Engine, EngineOptions, Event, Request, Stream, TokenLogprob};
use anser_infer::{Sampler, Sampling, SavedState, Session};
use anser_model::{Config, Hybrid, Init, Model};
use anser_tensor::Context;
use std::sync::Arc;

pub fn model(config: &Config) -> (Context, Arc<Model>) {
    let ctx = Context::cpu(2);
    let mut model = Model::init(&ctx, config, Init::Current, 1).unwrap();
    // What begins as zeros would let nothing through.
    let specs = model.params().specs().to_vec();
    let mut noise = 1u32;
    for s in specs.iter().filter(|s| s.name.ends_with("output.weight") || s.name == "head.weight") {
        for v in &mut model.params_mut().values_mut()[s.range.clone()] {
            noise = noise.wrapping_mul(1664525).wrapping_add(1013904223);
            *v = 0.2 * ((noise >> 8) as f32 / (1 << 23) as f32 - 1.0);
        }
    }
    (ctx, Arc::new(model))
}

pub fn plain() -> (Context, Arc<Model>) {
    model(&Config::new(2, 64, 300))
}

pub fn hybrid() -> (Context, Arc<Model>) {
    model(&Config { hybrid: Some(Hybrid { chunk: 16, topk: 2, ..Hybrid::new(2) }), ..Config::new(2, 64, 300) })
}

pub fn engine(of: &(Context, Arc<Model>), options: EngineOptions) -> Engine {
    Engine::start(of.0.clone(), of.1.clone(), options).unwrap()
}

pub fn prompt(seed: u32, len: u32) -> Vec<u32> {
    (0..len).map(|i| (i * i + 7 * i * seed + seed * 31) % 299 + 1).collect()
}

pub fn request(prompt: Vec<u32>, max_tokens: usize) -> Request {
    Request { prompt, max_tokens, owner: "a".into(), ..Request::default() }
}

/// What a request gave.
#[derive(Debug, Default, PartialEq)]
pub struct Answer {
    pub tokens: Vec<u32>,
    pub logprobs: Vec<TokenLogprob>,
    pub prompt: Vec<TokenLogprob>,
    pub hidden: Option<Vec<f32>>,
    pub read: usize,
    pub cached: usize,
    pub state: Option<SavedState>,
    pub end: Option<End>,
}

pub fn answer(mut stream: Stream) -> Answer {
    let mut a = Answer::default();
    while let Some(event) = stream.recv() {
        assert!(a.end.is_none(), "nothing comes after the end");
        match event {
            Event::Prompt { tokens, cached, logprobs, hidden } => {
                (a.read, a.cached, a.prompt, a.hidden) = (tokens, cached, logprobs, hidden);
            }
            Event::Token(t) => {
                assert!(a.state.is_none(), "the state comes after all tokens");
                a.tokens.push(t.token);
                if !t.logprob.is_nan() {
                    a.logprobs.push(t);
                }
            }
            Event::State(state) => a.state = Some(state),
            Event::End(end) => a.end = Some(end),
        }
    }
    a
}

/// What a session and a sampler alone give.
pub fn alone(of: &(Context, Arc<Model>), prompt: &[u32], sampling: &Sampling, seed: u64, count: usize) -> Vec<u32> {
    let mut session = Session::new(&of.0, &of.1);
    let mut sampler = Sampler::new(Sampling { seed, ..sampling.clone() }).unwrap();
    session.feed(prompt).unwrap();
    let mut tokens = Vec::new();
    for _ in 0..count {
        let token = sampler.sample(session.logits().unwrap()).unwrap();
        tokens.push(token);
        session.feed(&[token]).unwrap();
    }
    tokens
}

/// A folder that goes away at the end.
pub struct Folder(pub std::path::PathBuf);

impl Folder {
    pub fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("anser-engine-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        Folder(path)
    }

    pub fn options(&self) -> EngineOptions {
        EngineOptions { folder: Some(self.0.clone()), stride: 32, ..EngineOptions::default() }
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
