//! A real server on a free port, and a plain HTTP client.

#![allow(dead_code)]

use anser_formats::Checkpoint;
use anser_infer::chat::Think;
use anser_infer::engine::{Constraint, Next, Request};
use anser_infer::{Engine, EngineOptions};
use anser_model::{Config, Init, Load, Model};
use anser_serve::{Keys, Options, Shared, Template, Tls, serve};
use anser_tensor::{Context, DType};
use anser_tokenizer::Tokenizer;
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::time::Duration;

/// A running server.
pub struct Server {
    pub address: SocketAddr,
    pub engine: Engine,
    pub stop: Option<tokio::sync::oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<Result<(), String>>>,
}

/// Of most tests.
pub fn options() -> Options {
    Options {
        model: "anser-12m".into(),
        keys: Keys::default(),
        template: Template::Rwkv,
        think: Think::Off,
        max_tokens: 4096,
        max_prompt: 2000,
        max_body: 1 << 16,
        timeout: Duration::from_secs(60),
        read_timeout: Duration::from_secs(2),
        write_timeout: Duration::from_secs(2),
        connections: 64,
        per_key: 64,
        cors: Vec::new(),
    }
}

impl Server {
    /// The bundled model.
    pub fn start(options: Options, engine: EngineOptions) -> Server {
        Server::over(options, engine, None)
    }

    /// The bundled model, where there is TLS, over that.
    pub fn over(options: Options, engine: EngineOptions, tls: Option<Tls>) -> Server {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../models/anser-12m.safetensors");
        let ckpt = Checkpoint::open(path.as_ref()).unwrap();
        let tokenizer = Tokenizer::from_name(&ckpt.metadata()["anser.tokenizer"]).unwrap();
        let ctx = Context::cpu(2);
        let config = Config::from_checkpoint(&ckpt).unwrap();
        let model = Model::load_as(&ctx, &ckpt, config, Load::Inference(DType::BF16.into())).unwrap();
        Server::of(ctx, model, tokenizer, options, engine, tls)
    }

    /// A small model that knows nothing.
    pub fn random() -> Server {
        let (ctx, tokenizer) = (Context::cpu(2), Tokenizer::world_4096());
        let model = Model::init(&ctx, &Config::new(1, 64, tokenizer.vocab_size()), Init::Current, 7).unwrap();
        Server::of(ctx, model, tokenizer, options(), EngineOptions::default(), None)
    }

    fn of(
        ctx: Context, model: Model, tokenizer: Tokenizer, options: Options, engine: EngineOptions, tls: Option<Tls>,
    ) -> Server {
        let engine = Engine::start(ctx, Arc::new(model), engine).unwrap();
        let app = Shared::new(engine.clone(), tokenizer, options);
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let listener = {
            let _inside = runtime.enter();
            let socket = tokio::net::TcpSocket::new_v4().unwrap();
            // Little room, so that it is soon full where nobody reads.
            socket.set_send_buffer_size(8 << 10).unwrap();
            socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
            socket.listen(4096).unwrap()
        };
        let address = listener.local_addr().unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let thread = std::thread::spawn(move || {
            let stopped = async {
                let _ = stopped.await;
            };
            runtime.block_on(serve(app, listener, tls, stopped, Duration::from_secs(20)))
        });
        Server { address, engine, stop: Some(stop), thread: Some(thread) }
    }

    /// The bundled model.
    pub fn plain() -> Server {
        Server::start(options(), EngineOptions::default())
    }

    /// Waits until it ends by itself: why.
    pub fn ended(mut self) -> Result<(), String> {
        self.thread.take().unwrap().join().unwrap()
    }

    /// A connection.
    pub fn connect(&self) -> TcpStream {
        let socket = TcpStream::connect(self.address).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket
    }

    /// Any request.
    pub fn call(&self, method: &str, path: &str, key: Option<&str>, body: &str) -> ureq::http::Response<ureq::Body> {
        let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
        let mut request = ureq::http::Request::builder().method(method).uri(format!("http://{}{path}", self.address));
        if let Some(key) = key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        agent.run(request.body(body.to_string()).unwrap()).unwrap()
    }

    /// What a GET gives.
    pub fn get(&self, path: &str) -> Value {
        self.call("GET", path, None, "").body_mut().read_json().unwrap()
    }

    /// What a POST gives, which must succeed.
    pub fn post(&self, path: &str, body: Value) -> Value {
        let mut response = self.call("POST", path, None, &body.to_string());
        let text = response.body_mut().read_to_string().unwrap();
        assert_eq!(response.status(), 200, "{text}");
        serde_json::from_str(&text).unwrap()
    }

    /// The status of a POST, and what is said.
    pub fn refused(&self, path: &str, body: &str) -> (u16, Value) {
        let mut response = self.call("POST", path, None, body);
        (response.status().as_u16(), response.body_mut().read_json().unwrap())
    }

    /// The data of all events.
    pub fn events(&self, path: &str, body: Value) -> Vec<String> {
        let mut response = self.call("POST", path, None, &body.to_string());
        assert_eq!(response.headers()["content-type"], "text/event-stream");
        let lines = BufReader::new(response.body_mut().as_reader()).lines().map(Result::unwrap);
        lines.filter_map(|l| l.strip_prefix("data: ").map(String::from)).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.stop.take().unwrap().send(());
        let done = self.thread.take().map(std::thread::JoinHandle::join);
        assert!(done.is_none_or(|done| done.is_ok()) || std::thread::panicking());
    }
}

/// A request that makes the engine's thread panic.
pub fn fatal() -> Request {
    struct Fatal;
    impl Constraint for Fatal {
        fn mask(&mut self, _: &mut [f32]) -> Result<(), String> {
            Ok(())
        }

        fn accept(&mut self, _: u32) -> Result<Next, String> {
            Ok(Next::End)
        }
    }
    impl Drop for Fatal {
        fn drop(&mut self) {
            panic!("this constraint ends the engine, as a test");
        }
    }
    Request { prompt: vec![1], constraint: Some(Box::new(Fatal)), ..Request::default() }
}
