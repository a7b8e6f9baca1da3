//! Connections: how many there are, how long a slow one is waited for, and how they end.

use std::future::Future;
use std::io;
use std::net::TcpListener;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulShutdown;
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Semaphore, watch};
use tokio::time::{Sleep, sleep, timeout};

use super::api::{App, router};
use super::refusal::Refusal;
use crate::error::{At, Result};
use crate::progress::say;

/// How connections are treated.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Manners {
    pub connections: usize,
    /// Who sends no header, or takes nothing of an answer, for so long is let go.
    pub patience: Duration,
    /// How long answers may take that run when the server is asked to stop.
    pub drain: Duration,
}

/// Most bytes of a request's header.
const HEADER_BYTES: usize = 32 << 10;

/// Serves until a signal comes, or until `failed` says that nothing computes any more; then finishes what runs.
pub async fn serve(
    listener: TcpListener,
    app: Arc<App>,
    manners: Manners,
    mut failed: watch::Receiver<bool>,
) -> Result<()> {
    const SIGNALS: &str = "signal handler";
    let (mut terminate, mut interrupt) =
        (signal(SignalKind::terminate()).at(SIGNALS)?, signal(SignalKind::interrupt()).at(SIGNALS)?);
    listener.set_nonblocking(true).at("listener")?;
    let listener = tokio::net::TcpListener::from_std(listener).at("listener")?;
    let (places, open) = (Arc::new(Semaphore::new(manners.connections)), GracefulShutdown::new());
    let router = router(app.clone());
    loop {
        tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => match places.clone().try_acquire_owned() {
                    Ok(place) => {
                        let connection = connection(&router, stream, manners.patience);
                        let (watched, app) = (open.watch(connection), app.clone());
                        app.metrics.connections.fetch_add(1, Relaxed);
                        tokio::spawn(async move {
                            // How a connection ends is its client's business.
                            let _ = watched.await;
                            app.metrics.connections.fetch_sub(1, Relaxed);
                            drop(place);
                        });
                    }
                    Err(_) => drop(tokio::spawn(turn_away(stream))),
                },
                // Out of file descriptors, most likely: others are about to be free.
                Err(_) => sleep(Duration::from_millis(50)).await,
            },
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = failed.changed() => break,
        }
    }
    drop(listener);
    app.stopping.store(true, Relaxed);
    let failed = *failed.borrow();
    if !failed && open.count() > 0 {
        say("stopping: what runs is finished; a second signal stops at once");
    }
    tokio::select! {
        () = open.shutdown() => {}
        () = sleep(if failed { Duration::from_secs(1) } else { manners.drain }) => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    Ok(())
}

type Connection = http1::Connection<TokioIo<Patient>, TowerToHyperService<Router>>;

fn connection(router: &Router, stream: TcpStream, patience: Duration) -> Connection {
    // Small events should not wait for more of them.
    let _ = stream.set_nodelay(true);
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(patience).max_buf_size(HEADER_BYTES);
    let stream = TokioIo::new(Patient { stream, patience, stalled: None });
    http.serve_connection(stream, TowerToHyperService::new(router.clone()))
}

/// Says that there is no place. The request is not read.
async fn turn_away(mut stream: TcpStream) {
    let body = Refusal { message: "too many connections; try again in a moment".into(), ..Refusal::busy() };
    let body = Refusal { status: axum::http::StatusCode::SERVICE_UNAVAILABLE, ..body }.json().to_string();
    let head =
        "HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 1\r\nconnection: close";
    let answer = format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len());
    let _ = timeout(Duration::from_secs(1), stream.write_all(answer.as_bytes())).await;
}

/// A connection that ends where nothing can be written for too long.
struct Patient {
    stream: TcpStream,
    patience: Duration,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl Patient {
    fn waited<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.stalled = None;
            return written;
        }
        let patience = self.patience;
        let stalled = self.stalled.get_or_insert_with(|| Box::pin(sleep(patience)));
        match stalled.as_mut().poll(cx) {
            Poll::Ready(()) => Poll::Ready(Err(io::ErrorKind::TimedOut.into())),
            Poll::Pending => Poll::Pending,
        }
    }
}

impl AsyncRead for Patient {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buffer)
    }
}

impl AsyncWrite for Patient {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.waited(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(cx, bytes);
        self.waited(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(cx);
        self.waited(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let shut = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.waited(cx, shut)
    }
}
