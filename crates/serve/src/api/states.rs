//! `/v1/states`: named states of conversations, kept by `save_as` and gone on from by `state` in requests for text.

use crate::App;
use crate::auth::Owner;
use crate::errors::{ApiError, blocking};
use crate::fields::Fields;
use anser_infer::engine::{StateError, StateInfo, StateStore};
use axum::extract::{Path, State};
use axum::{Extension, Json};
use serde_json::{Value, json};

fn entry(info: &StateInfo) -> Value {
    let created = info.created.duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs());
    json!({ "id": info.name, "object": "state", "tokens": info.tokens, "bytes": info.bytes, "created": created, "initial": info.initial })
}

/// Does something with the states, which may be on disk or on another machine.
async fn with<T: Send + 'static>(
    app: App, work: impl FnOnce(&StateStore) -> Result<T, StateError> + Send + 'static,
) -> Result<T, ApiError> {
    Ok(blocking(move || work(app.engine.states())).await??)
}

/// The owner's states.
pub async fn list(State(app): State<App>, Extension(Owner(owner)): Extension<Owner>) -> Result<Json<Value>, ApiError> {
    let all = with(app, move |states| states.list(&owner)).await?;
    Ok(Json(json!({ "object": "list", "data": all.iter().map(entry).collect::<Vec<_>>() })))
}

/// One of them.
pub async fn one(
    State(app): State<App>, Extension(Owner(owner)): Extension<Owner>, Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    Ok(Json(entry(&with(app, move |states| states.get(&owner, &name)).await?)))
}

/// Gives a state a second name, to go on from it in two ways.
pub async fn branch(
    State(app): State<App>, Extension(Owner(owner)): Extension<Owner>, Path(name): Path<String>, f: Fields,
) -> Result<Json<Value>, ApiError> {
    let to = f.text("to")?.ok_or_else(|| ApiError::field("to", "it is missing: the name of the branch"))?.to_string();
    let made = with(app, move |states| states.branch(&owner, &name, &to)).await;
    // Only its name can be wrong.
    let of_name = |e: ApiError| match e.status.as_u16() {
        400 | 409 => ApiError { status: e.status, ..ApiError::field("to", e.message) },
        _ => e,
    };
    Ok(Json(entry(&made.map_err(of_name)?)))
}

/// Deletes one.
pub async fn delete(
    State(app): State<App>, Extension(Owner(owner)): Extension<Owner>, Path(name): Path<String>,
) -> Result<Json<Value>, ApiError> {
    let of = name.clone();
    with(app, move |states| states.delete(&owner, &of)).await?;
    Ok(Json(json!({ "id": name, "object": "state", "deleted": true })))
}
