//! The page at `/`: chat with the model. Three files, part of the program; nothing is fetched from elsewhere.

use axum::http::{HeaderName, header};
use axum::response::IntoResponse;

/// What the page may do: use this server, and nothing else.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The page.
pub async fn index() -> impl IntoResponse {
    file("text/html; charset=utf-8", include_str!("index.html"))
}

/// Its looks.
pub async fn style() -> impl IntoResponse {
    file("text/css; charset=utf-8", include_str!("page.css"))
}

/// Its script.
pub async fn script() -> impl IntoResponse {
    file("text/javascript; charset=utf-8", include_str!("page.js"))
}

/// How it shows Markdown.
pub async fn markdown() -> impl IntoResponse {
    file("text/javascript; charset=utf-8", include_str!("markdown.js"))
}

fn file(kind: &'static str, text: &'static str) -> impl IntoResponse {
    let headers: [(HeaderName, &str); 4] = [
        (header::CONTENT_TYPE, kind),
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CACHE_CONTROL, "no-cache"),
    ];
    (headers, text)
}
