//! Connections: how many, how slow, and how they end.

use crate::{App, Tls, router};
use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;
use tokio_io_timeout::TimeoutStream;

/// How long a client that has its answer may go on to send what nobody reads.
const LINGER: Duration = Duration::from_secs(2);

/// Serves, over TLS or plainly, until `stop` is ready, then lets running requests end, for `grace` at most.
///
/// # Errors
/// When the engine fails, which ends it, too: why. Whoever started the server has to start it again.
pub async fn serve(
    app: App, listener: TcpListener, tls: Option<Tls>, stop: impl Future<Output = ()>, grace: Duration,
) -> Result<(), String> {
    let service = router(app.clone());
    let (ending, ends) = watch::channel(()); // told that the server ends; closed when no connection is left
    let room = Arc::new(Semaphore::new(app.options.connections));
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(app.options.read_timeout).max_headers(100);
    let (mut stop, mut failed) = (pin!(stop), pin!(app.engine.failed()));
    loop {
        let accept = async {
            // Beyond the limit connections wait in the listener's queue.
            let place = room.clone().acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, connection) = tokio::select! {
            () = &mut stop => break,
            _ = &mut failed => break,
            both = accept => both,
        };
        let Ok((stream, _)) = connection else {
            // Such as too many open files: ends of others make room.
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        };
        // Tokens are small and are not to wait for each other.
        let _ = stream.set_nodelay(true);
        let mut stream = TimeoutStream::new(stream);
        stream.set_write_timeout(Some(app.options.write_timeout));
        let stream = Box::pin(stream);
        let (http, service) = (http.clone(), TowerToHyperService::new(service.clone()));
        let (acceptor, patience) = (tls.as_ref().map(Tls::acceptor), app.options.read_timeout);
        let ends = ends.clone();
        tokio::spawn(async move {
            match acceptor {
                None => answer(stream, &http, service, ends).await,
                Some(acceptor) => {
                    if let Ok(Ok(stream)) = timeout(patience, acceptor.accept(stream)).await {
                        answer(stream, &http, service, ends).await;
                    }
                }
            }
            drop(place);
        });
    }
    app.draining.store(true, Ordering::SeqCst);
    drop((listener, ends));
    let engine = app.engine.clone();
    let drained = tokio::task::spawn_blocking(move || engine.drain());
    let _ = timeout(grace, async {
        let _ = ending.send(());
        ending.closed().await;
        let _ = drained.await;
    })
    .await;
    app.engine.failure().map_or(Ok(()), Err)
}

/// Answers all requests of a connection, after `ends` only those that have begun, and ends it so that the client can
/// read its last answer, also where that refuses a body still on its way: a socket closed with bytes unread resets the
/// connection, which may take the answer from the client.
async fn answer<S: AsyncRead + AsyncWrite + Unpin>(
    mut stream: S, http: &http1::Builder, service: TowerToHyperService<Router>, mut ends: watch::Receiver<()>,
) {
    let mut connection = pin!(http.serve_connection(TokioIo::new(&mut stream), service));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        _ = ends.changed() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    // What a client did wrong with its connection concerns nobody else.
    if ended.is_ok() {
        let _ = timeout(LINGER, tokio::io::copy(&mut stream, &mut tokio::io::sink())).await;
    }
}
