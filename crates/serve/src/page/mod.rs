//! The page at `/`, to chat with the model, and the page at `/docs`, which shows the API. They are part of the program; nothing is fetched from elsewhere.

use axum::http::{HeaderName, header};
use axum::response::IntoResponse;

/// What the page may do: use this server, and nothing else.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; \
                      base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// The page to chat.
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

/// The page that shows the API.
pub async fn docs() -> impl IntoResponse {
    file("text/html; charset=utf-8", include_str!("docs.html"))
}

/// Its looks.
pub async fn docs_style() -> impl IntoResponse {
    file("text/css; charset=utf-8", include_str!("docs.css"))
}

/// Its script, which reads `openapi.json`.
pub async fn docs_script() -> impl IntoResponse {
    file("text/javascript; charset=utf-8", include_str!("docs.js"))
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
