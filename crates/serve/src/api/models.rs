//! `/v1/models`, `/health`, `/ready` and `/metrics`.

use crate::App;
use crate::errors::ApiError;
use anser_infer::engine::Refused;
use axum::Json;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use serde_json::{Value, json};

fn entry(app: &App) -> Value {
    json!({ "id": app.options.model, "object": "model", "created": app.created, "owned_by": "anser" })
}

/// The one model.
pub async fn list(State(app): State<App>) -> Json<Value> {
    Json(json!({ "object": "list", "data": [entry(&app)] }))
}

/// The same by its name.
pub async fn one(State(app): State<App>, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    match name == app.options.model {
        true => Ok(Json(entry(&app))),
        false => {
            Err(ApiError::not_found(format!("model {name:?} is not served here: the model is {:?}", app.options.model)))
        }
    }
}

/// The engine works, or did when it last did anything.
pub async fn health(State(app): State<App>) -> Result<Json<Value>, ApiError> {
    match app.engine.failure() {
        None => Ok(Json(json!({ "status": "ok" }))),
        Some(why) => Err(Refused::Failed(why).into()),
    }
}

/// Requests are taken: not while the server shuts down, nor by an engine that has failed.
pub async fn ready(app: State<App>) -> Result<Json<Value>, ApiError> {
    health(app.clone()).await.map(drop)?;
    match app.draining() {
        false => Ok(Json(json!({ "status": "ready" }))),
        true => Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the server is shutting down")),
    }
}

/// For Prometheus.
pub async fn metrics(State(app): State<App>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], app.metrics.text())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::app;
    use anser_infer::engine::{Constraint, Next, Request};

    /// Makes the engine's thread panic.
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

    #[test]
    fn an_engine_that_has_failed_is_neither_healthy_nor_ready() {
        let (app, runtime) = (app(), tokio::runtime::Runtime::new().unwrap());
        assert!(runtime.block_on(health(State(app.clone()))).is_ok());
        assert!(runtime.block_on(ready(State(app.clone()))).is_ok());
        let fatal = Request { prompt: vec![1], constraint: Some(Box::new(Fatal)), ..Request::default() };
        let mut stream = app.engine.submit(fatal).unwrap();
        while stream.recv().is_some() {}
        let why = runtime.block_on(app.engine.failed());
        for answer in [runtime.block_on(health(State(app.clone()))), runtime.block_on(ready(State(app.clone())))] {
            let e = answer.unwrap_err();
            assert!(e.status == StatusCode::SERVICE_UNAVAILABLE && e.message.contains(&why), "{}", e.message);
        }
    }
}
