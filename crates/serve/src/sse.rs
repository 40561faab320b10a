//! Server-sent events.

use crate::errors::ApiError;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use std::convert::Infallible;
use tokio::sync::mpsc;

/// Where events go.
#[derive(Clone)]
pub struct Sender(mpsc::Sender<Event>);

impl Sender {
    /// Sends an object: false when the client has gone.
    pub async fn json(&self, value: &Value) -> bool {
        self.text(&value.to_string()).await
    }

    /// Sends a line.
    pub async fn text(&self, text: &str) -> bool {
        self.0.send(Event::default().data(text)).await.is_ok()
    }

    /// Sends an object under a name.
    pub async fn named(&self, name: &str, value: &Value) -> bool {
        self.0.send(Event::default().event(name).data(value.to_string())).await.is_ok()
    }
}

/// A response of the events that `write` sends. When the client goes, `write` is dropped, whatever it waits for. An error is the
/// last event.
pub fn send<F, W>(write: F) -> Response
where
    F: FnOnce(Sender) -> W,
    W: Future<Output = Result<(), ApiError>> + Send + 'static,
{
    // A client that doesn't read holds up its own answer only.
    let (to, mut events) = mpsc::channel(64);
    let work = write(Sender(to.clone()));
    tokio::spawn(async move {
        tokio::select! {
            () = to.closed() => {}
            done = work => if let Err(error) = done {
                let _ = to.send(Event::default().data(error.body().to_string())).await;
            }
        }
    });
    let stream = futures_util::stream::poll_fn(move |ctx| events.poll_recv(ctx).map(|e| e.map(Ok::<_, Infallible>)));
    let mut response = Sse::new(stream).keep_alive(KeepAlive::default()).into_response();
    // Proxies are not to collect events.
    response.headers_mut().insert("x-accel-buffering", axum::http::HeaderValue::from_static("no"));
    response
}
