//! `/v1/models`, `/health`, `/ready` and `/metrics`.

use crate::App;
use crate::errors::ApiError;
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

/// The process runs.
pub async fn health() -> Json<Value> {
    Json(json!({ "status": "ok" }))
}

/// Requests are taken: not while the server shuts down.
pub async fn ready(State(app): State<App>) -> Result<Json<Value>, ApiError> {
    match app.draining() {
        false => Ok(Json(json!({ "status": "ready" }))),
        true => Err(ApiError::new(StatusCode::SERVICE_UNAVAILABLE, "the server is shutting down")),
    }
}

/// For Prometheus.
pub async fn metrics(State(app): State<App>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/openmetrics-text; version=1.0.0; charset=utf-8")], app.metrics.text())
}
