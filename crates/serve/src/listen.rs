//! Connections: how many, how slow, and how they end.

use crate::{App, Tls, router};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;
use tokio_io_timeout::TimeoutStream;

/// Serves, over TLS or plainly, until `stop` is ready, then lets running requests end, for `grace` at most.
pub async fn serve(app: App, listener: TcpListener, tls: Option<Tls>, stop: impl Future<Output = ()>, grace: Duration) {
    let service = router(app.clone());
    let graceful = GracefulShutdown::new();
    let room = Arc::new(Semaphore::new(app.options.connections));
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(app.options.read_timeout).max_headers(100);
    let mut stop = std::pin::pin!(stop);
    loop {
        let accept = async {
            // Beyond the limit connections wait in the listener's queue.
            let place = room.clone().acquire_owned().await;
            (place, listener.accept().await)
        };
        let (place, connection) = tokio::select! {
            () = &mut stop => break,
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
        let watcher = graceful.watcher();
        tokio::spawn(async move {
            // What a client did wrong with its connection concerns nobody else.
            let _ = match acceptor {
                None => watcher.watch(http.serve_connection(TokioIo::new(stream), service)).await,
                Some(acceptor) => match timeout(patience, acceptor.accept(stream)).await {
                    Ok(Ok(stream)) => watcher.watch(http.serve_connection(TokioIo::new(stream), service)).await,
                    _ => Ok(()),
                },
            };
            drop(place);
        });
    }
    app.draining.store(true, Ordering::SeqCst);
    drop(listener);
    let engine = app.engine.clone();
    let drained = tokio::task::spawn_blocking(move || engine.drain());
    let _ = timeout(grace, async {
        graceful.shutdown().await;
        let _ = drained.await;
    })
    .await;
}
