//! `/v1/states`: named states of conversations, kept by `save_as` and gone on from by `state` in requests for text.

use crate::App;
use crate::auth::Owner;
use crate::errors::ApiError;
use crate::fields::Fields;
use anser_infer::engine::StateInfo;
use axum::extract::{Path, State};
use axum::{Extension, Json};
use serde_json::{Value, json};

fn entry(info: &StateInfo) -> Value {
    let created = info.created.duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    json!({ "id": info.name, "object": "state", "tokens": info.tokens, "bytes": info.bytes, "created": created })
}

/// The owner's states.
pub async fn list(State(app): State<App>, Extension(Owner(owner)): Extension<Owner>) -> Json<Value> {
    let data: Vec<Value> = app.engine.states().list(&owner).iter().map(entry).collect();
    Json(json!({ "object": "list", "data": data }))
}

/// One of them.
pub async fn one(
    State(app): State<App>, Extension(Owner(owner)): Extension<Owner>, Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    app.engine.states().get(&owner, &name).map(|info| Json(entry(&info))).map_err(ApiError::not_found)
}

/// Gives a state a second name, to go on from it in two ways.
pub async fn branch(
    State(app): State<App>, Extension(Owner(owner)): Extension<Owner>, Path(name): Path<String>, f: Fields,
) -> Result<Json<Value>, ApiError> {
    let to = f.text("to")?.ok_or_else(|| ApiError::field("to", "it is missing: the name of the branch"))?.to_string();
    app.engine.states().get(&owner, &name).map_err(ApiError::not_found)?;
    // It may be written to disk.
    let made = tokio::task::spawn_blocking(move || app.engine.states().branch(&owner, &name, &to)).await;
    let made = made.map_err(|e| ApiError::internal(e.to_string()))?;
    made.map(|info| Json(entry(&info))).map_err(|e| ApiError::field("to", e))
}

/// Deletes one.
pub async fn delete(
    State(app): State<App>, Extension(Owner(owner)): Extension<Owner>, Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let of = name.clone();
    let done = tokio::task::spawn_blocking(move || app.engine.states().delete(&owner, &of)).await;
    done.map_err(|e| ApiError::internal(e.to_string()))?.map_err(ApiError::not_found)?;
    Ok(Json(json!({ "id": name, "object": "state", "deleted": true })))
}
