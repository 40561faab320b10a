//! Errors in the shape of OpenAI's API.

use anser_infer::engine::{Refused, StateError};
use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

/// What a client is told instead of an answer.
#[derive(Clone, Debug)]
pub struct ApiError {
    /// The status.
    pub status: StatusCode,
    /// What is wrong, and what to do.
    pub message: String,
    /// The field that is wrong.
    pub param: Option<String>,
    /// Seconds after which to try again.
    pub retry_after: Option<u64>,
}

impl ApiError {
    /// An error of a status.
    pub fn new(status: StatusCode, message: impl Into<String>) -> ApiError {
        ApiError { status, message: message.into(), param: None, retry_after: None }
    }

    /// A field that is wrong; `why` goes on after its name.
    pub fn field(name: &str, why: impl std::fmt::Display) -> ApiError {
        let message = format!("{name}: {why}");
        ApiError { param: Some(name.into()), ..ApiError::new(StatusCode::BAD_REQUEST, message) }
    }

    /// The same of a field within another one.
    pub fn within(mut self, outer: &str) -> ApiError {
        self.param = self.param.map(|p| format!("{outer}.{p}"));
        self.message = format!("{outer}.{}", self.message);
        self
    }

    /// The same of a field that the client calls otherwise.
    pub fn renamed(mut self, from: &str, to: &str) -> ApiError {
        if let Some(rest) = self.param.as_ref().and_then(|p| p.strip_prefix(from)) {
            self.message = self.message.replacen(from, to, 1);
            self.param = Some(format!("{to}{rest}"));
        }
        self
    }

    /// Something that is not there.
    pub fn not_found(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::NOT_FOUND, message)
    }

    /// Something that went wrong here.
    pub fn internal(message: impl Into<String>) -> ApiError {
        ApiError::new(StatusCode::INTERNAL_SERVER_ERROR, message)
    }

    /// Something that cannot be reached now.
    pub fn unreachable(message: impl Into<String>) -> ApiError {
        ApiError { retry_after: Some(1), ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message) }
    }

    /// OpenAI's name of the kind of error.
    pub fn kind(&self) -> &'static str {
        match self.status.as_u16() {
            401 => "authentication_error",
            403 => "permission_error",
            404 => "not_found_error",
            429 => "rate_limit_error",
            503 => "overloaded_error",
            500.. => "server_error",
            _ => "invalid_request_error",
        }
    }

    /// `{"error": {..}}`.
    pub fn body(&self) -> Value {
        let code = match self.status.as_u16() {
            401 => json!("invalid_api_key"),
            429 => json!("rate_limit_exceeded"),
            _ => Value::Null,
        };
        json!({ "error": { "message": self.message, "type": self.kind(), "param": self.param, "code": code } })
    }
}

impl From<Refused> for ApiError {
    fn from(refused: Refused) -> ApiError {
        let message = refused.to_string();
        match refused {
            Refused::Busy { retry_after } => ApiError {
                retry_after: Some(retry_after.as_secs().max(1)),
                ..ApiError::new(StatusCode::TOO_MANY_REQUESTS, message)
            },
            Refused::Draining | Refused::Failed(_) => {
                ApiError { retry_after: Some(1), ..ApiError::new(StatusCode::SERVICE_UNAVAILABLE, message) }
            }
            Refused::Invalid(_) => ApiError::new(StatusCode::BAD_REQUEST, message),
            Refused::Unreachable(_) => ApiError::unreachable(message),
        }
    }
}

impl From<StateError> for ApiError {
    fn from(error: StateError) -> ApiError {
        let message = error.to_string();
        match error {
            StateError::Missing(_) => ApiError::not_found(message),
            StateError::Taken(_) => ApiError::new(StatusCode::CONFLICT, message),
            StateError::Refused(_) => ApiError::new(StatusCode::BAD_REQUEST, message),
            StateError::Unreachable(_) => ApiError::unreachable(message),
        }
    }
}

/// Work that waits for a disk or for another machine, beside async code.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
    tokio::task::spawn_blocking(work).await.map_err(|e| ApiError::internal(e.to_string()))
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        // For routes that have another shape.
        response.extensions_mut().insert(self);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_fields() {
        let error = ApiError::field("name", "it is missing");
        assert_eq!(error.clone().within("tools[0]").message, "tools[0].name: it is missing");
        let error = error.within("messages").renamed("messages", "input");
        assert_eq!((error.message.as_str(), error.param.as_deref()), ("input.name: it is missing", Some("input.name")));
        assert_eq!(ApiError::not_found("messages").renamed("messages", "input").message, "messages");
    }
}
