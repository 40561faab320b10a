//! An HTTP server over the engine: OpenAI's API, named states, metrics and a page to chat.
//!
//! `api` has a file for each family of routes; each reads its fields (`fields.rs`), gives the engine requests (`answer.rs` makes
//! text of what comes back) and sends JSON or server-sent events (`sse.rs`). What all routes share is here: keys, limits, errors.

mod answer;
mod api;
mod auth;
mod calls;
mod constraint;
mod errors;
mod fields;
mod kept;
mod listen;
pub mod load;
mod metrics;
mod origin;
mod page;
mod reply;
mod sse;
mod template;
mod think;
mod tls;
mod tools;

pub use auth::Keys;
pub use listen::serve;
pub use template::Template;
pub use tls::Tls;

use anser_infer::Engine;
use anser_infer::chat::Think;
use anser_tokenizer::Tokenizer;
use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, Uri};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Router, http};
use errors::ApiError;
use metrics::Metrics;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::cors::CorsLayer;
use tower_http::request_id::{MakeRequestUuid, PropagateRequestIdLayer, SetRequestIdLayer};
use tower_http::timeout::RequestBodyTimeoutLayer;

/// Every route and field; a test compares it with the routes.
const OPENAPI: &str = include_str!("openapi.json");

/// How a server behaves.
pub struct Options {
    /// The name under which the model is served.
    pub model: String,
    /// Without any, everybody may use it, and all share their states.
    pub keys: Keys,
    /// How prompts are made of messages.
    pub template: Template,
    /// How the model thinks where a request doesn't say.
    pub think: Think,
    /// Tokens of an answer at most.
    pub max_tokens: usize,
    /// Tokens of a prompt at most.
    pub max_prompt: usize,
    /// Bytes of a request's body at most.
    pub max_body: usize,
    /// How long an answer may take.
    pub timeout: Duration,
    /// How long a client may take for its headers, and between two pieces of its body.
    pub read_timeout: Duration,
    /// How long a client may take to read anything of what is sent to it.
    pub write_timeout: Duration,
    /// Connections at most.
    pub connections: usize,
    /// Requests of one key that run at the same time at most.
    pub per_key: usize,
    /// Web pages of other origins that may use it.
    pub cors: Vec<HeaderValue>,
}

/// What all requests see.
pub struct Shared {
    engine: Engine,
    tokenizer: Tokenizer,
    options: Options,
    metrics: Metrics,
    per_owner: auth::PerOwner,
    grammars: constraint::Grammars,
    responses: kept::Responses,
    created: u64,
    draining: AtomicBool,
}

/// A handle on it.
pub type App = Arc<Shared>;

impl Shared {
    /// A server's state.
    pub fn new(engine: Engine, tokenizer: Tokenizer, options: Options) -> App {
        Arc::new(Shared {
            metrics: Metrics::new(engine.clone()),
            per_owner: auth::PerOwner::new(options.per_key),
            grammars: constraint::Grammars::new(tokenizer),
            responses: kept::Responses::default(),
            created: api::now(),
            draining: AtomicBool::new(false),
            engine,
            tokenizer,
            options,
        })
    }

    /// Whether no more requests are taken.
    pub fn draining(&self) -> bool {
        self.draining.load(Ordering::SeqCst)
    }
}

/// All routes.
pub fn router(app: App) -> Router {
    let keyed = Router::new()
        .route("/v1/models", get(api::models::list))
        .route("/v1/models/{name}", get(api::models::one))
        .route("/v1/completions", post(api::completions::completions))
        .route("/v1/chat/completions", post(api::chat::completions))
        .route("/v1/responses", post(api::responses::create))
        .route("/v1/responses/{id}", get(api::responses::one).delete(api::responses::delete))
        .route("/v1/messages", post(api::messages::messages))
        .route("/v1/embeddings", post(api::embeddings::embeddings))
        .route("/v1/states", get(api::states::list))
        .route("/v1/states/{name}", get(api::states::one).delete(api::states::delete))
        .route("/v1/states/{name}/branch", post(api::states::branch))
        .route("/tokenize", post(api::tokens::tokenize))
        .route("/detokenize", post(api::tokens::detokenize))
        .route("/tokenizer_info", get(api::tokens::info))
        .route("/metrics", get(api::models::metrics))
        .route_layer(middleware::from_fn_with_state(app.clone(), auth::check));
    let open = Router::new()
        .route("/", get(page::index))
        .route("/page.css", get(page::style))
        .route("/page.js", get(page::script))
        .route("/markdown.js", get(page::markdown))
        .route("/docs", get(page::docs))
        .route("/docs.css", get(page::docs_style))
        .route("/docs.js", get(page::docs_script))
        .route("/health", get(api::models::health))
        .route("/ready", get(api::models::ready))
        .route("/openapi.json", get(openapi));
    let cors = CorsLayer::new()
        .allow_origin(app.options.cors.clone())
        .allow_methods([Method::GET, Method::POST, Method::DELETE])
        .allow_headers([http::header::AUTHORIZATION, http::header::CONTENT_TYPE]);
    keyed
        .merge(open)
        .route_layer(middleware::from_fn_with_state(app.clone(), count))
        .fallback(no_route)
        .method_not_allowed_fallback(no_method)
        .layer(DefaultBodyLimit::max(app.options.max_body))
        .layer(RequestBodyTimeoutLayer::new(app.options.read_timeout))
        .layer(CatchPanicLayer::custom(|_| ApiError::internal("this server has a fault; it goes on").into_response()))
        .layer(middleware::from_fn_with_state(app.clone(), origin::check))
        .layer(middleware::from_fn(api::messages::errors))
        .layer(cors)
        .layer(PropagateRequestIdLayer::x_request_id())
        .layer(SetRequestIdLayer::x_request_id(MakeRequestUuid))
        .with_state(app)
}

async fn count(State(app): State<App>, path: MatchedPath, request: Request, next: Next) -> Response {
    let response = next.run(request).await;
    app.metrics.answered(path.as_str(), response.status().as_u16());
    response
}

async fn openapi() -> impl IntoResponse {
    ([(http::header::CONTENT_TYPE, "application/json")], OPENAPI)
}

async fn no_route(method: Method, uri: Uri) -> ApiError {
    ApiError::not_found(format!("there is no {method} {}", uri.path()))
}

async fn no_method(method: Method, uri: Uri) -> ApiError {
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, format!("{} doesn't take {method}", uri.path()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use anser_infer::EngineOptions;
    use anser_model::{Config, Init, Model};
    use anser_tensor::Context;
    use std::collections::BTreeSet;

    /// A server's state, over a small model that knows nothing.
    pub fn app() -> App {
        let (ctx, tokenizer) = (Context::cpu(1), Tokenizer::world_4096());
        let model = Model::init(&ctx, &Config::new(1, 64, tokenizer.vocab_size()), Init::Current, 7).unwrap();
        let second = Duration::from_secs(1);
        let options = Options {
            model: "test".into(),
            keys: Keys::default(),
            template: Template::Rwkv,
            think: Think::Off,
            max_tokens: 100,
            max_prompt: 100,
            max_body: 1 << 16,
            timeout: second,
            read_timeout: second,
            write_timeout: second,
            connections: 1,
            per_key: 1,
            cors: Vec::new(),
        };
        Shared::new(Engine::start(ctx, Arc::new(model), EngineOptions::default()).unwrap(), tokenizer, options)
    }

    #[test]
    fn the_document_has_the_routes() {
        let document: serde_json::Value = serde_json::from_str(OPENAPI).unwrap();
        let written: BTreeSet<&str> = document["paths"].as_object().unwrap().keys().map(String::as_str).collect();
        let of_page = |path: &&str| {
            *path != "/" && !path.starts_with("/docs") && ![".css", ".js"].iter().any(|e| path.ends_with(e))
        };
        let routes = include_str!("lib.rs").split(".route(\"").skip(1).filter_map(|s| s.split('"').next());
        let routes: BTreeSet<&str> = routes.filter(|r| r.starts_with('/')).filter(of_page).collect();
        assert_eq!(written, routes);
        // Whoever sends fields finds an example, which has fields that are written.
        for (path, methods) in document["paths"].as_object().unwrap() {
            for about in methods.as_object().unwrap().values().filter(|about| about["requestBody"].is_object()) {
                let body = &about["requestBody"]["content"]["application/json"];
                let name = body["schema"]["$ref"].as_str().unwrap().rsplit('/').next().unwrap();
                let schemas = &document["components"]["schemas"];
                let parts = schemas[name]["allOf"].as_array().into_iter().flatten();
                let parts = parts.map(|part| &schemas[part["$ref"].as_str().unwrap().rsplit('/').next().unwrap()]);
                let parts: Vec<_> =
                    parts.chain([&schemas[name]]).map(|s| s["properties"].as_object().unwrap()).collect();
                let example = body["example"].as_object().unwrap_or_else(|| panic!("{path}"));
                assert!(example.keys().all(|field| parts.iter().any(|fields| fields.contains_key(field))), "{path}");
            }
        }
    }
}
