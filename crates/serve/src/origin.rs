//! Web pages of others: a browser sends their requests too, with what this machine may reach.

use crate::App;
use crate::errors::ApiError;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::Next;
use axum::response::Response;
use std::net::IpAddr;

/// Refuses what a page of another origin asks for, unless it was allowed, and, where no key is asked for, whatever comes by a name of
/// the network: a page can make its own name stand for this machine.
pub async fn check(State(app): State<App>, request: Request, next: Next) -> Result<Response, ApiError> {
    let host = request.headers().get(header::HOST).and_then(|h| h.to_str().ok()).unwrap_or_default();
    let forbidden = |message: &str| Err(ApiError::new(StatusCode::FORBIDDEN, message));
    if app.options.keys.is_empty() && !is_local(host) {
        return forbidden(
            "this server has no API keys and is reached by its address or as localhost only (--api-keys)",
        );
    }
    if is_foreign(request.headers(), host)
        && !request.headers().get(header::ORIGIN).is_some_and(|o| app.options.cors.contains(o))
    {
        return forbidden("pages of this origin may not use the server (--cors ORIGIN)");
    }
    Ok(next.run(request).await)
}

/// An address, localhost, or nothing, as old clients have it.
fn is_local(host: &str) -> bool {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    let address = name.strip_prefix('[').and_then(|n| n.strip_suffix(']')).unwrap_or(name);
    name.is_empty() || name.eq_ignore_ascii_case("localhost") || address.parse::<IpAddr>().is_ok()
}

/// Whether it comes from a page of another host.
fn is_foreign(headers: &HeaderMap, host: &str) -> bool {
    let origin = headers.get(header::ORIGIN).map(|o| o.to_str().unwrap_or("?"));
    origin.is_some_and(|o| o.split_once("://").is_none_or(|(_, of_page)| !of_page.eq_ignore_ascii_case(host)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_origins() {
        assert!(["localhost:8000", "127.0.0.1:8000", "[::1]:8000", "192.168.1.5", ""].iter().all(|h| is_local(h)));
        assert!(
            ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example:80"]
                .iter()
                .all(|h| !is_local(h))
        );
        let foreign = |origin: &str| {
            is_foreign(&HeaderMap::from_iter([(header::ORIGIN, origin.parse().unwrap())]), "127.0.0.1:8000")
        };
        assert!(foreign("https://evil.example") && foreign("null") && foreign("http://127.0.0.1:9000"));
        assert!(!foreign("http://127.0.0.1:8000") && !is_foreign(&HeaderMap::new(), "127.0.0.1:8000"));
    }
}
