//! An HTTP server that speaks OpenAI's protocol, in which each request may blend the declared adapters as it likes.
//!
//! One thread computes: it runs a [`Session`](crate::rollout::Session), takes in between two passes what was asked, and
//! tells each request its tokens as they come. Connections live on a small runtime of their own. A blend costs no merge: each
//! row of a pass has its own weights for the low-rank products beside the base's (personalized soups, Jang et al.,
//! arXiv:2310.11564).
//!
//! An answer depends on its request alone: not on what runs beside it, nor on when it came.

mod answer;
mod api;
mod audit;
mod fields;
mod http;
mod metrics;
mod refusal;
mod soup;
mod wanted;
mod worker;

use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};

use crate::data::Tokenizer;
use crate::error::{At, Error, Result};
use crate::model::Model;
use crate::ops::Backend;
use crate::progress::say;
use crate::rollout::{Engine, Limits, Size};
use api::App;
use metrics::Metrics;

pub use audit::Audit;
pub use http::Manners;
pub use soup::{Declared, Soups};
pub use wanted::Most;

/// How a server behaves.
pub struct Settings {
    pub soups: Soups,
    pub limits: Limits,
    pub most: Most,
    /// Completions that may wait.
    pub queue: usize,
    /// Of a request's body.
    pub most_body: usize,
    pub manners: Manners,
    pub api_key: Option<String>,
    pub audit: Option<Audit>,
}

/// Serves until a signal asks it to stop. The model has the soups' adapters, in their order and as they are.
pub fn run<B: Backend>(
    device: &B,
    model: &Model<B>,
    tokenizer: Tokenizer,
    listener: TcpListener,
    settings: Settings,
) -> Result<()> {
    let Settings { soups, limits, most, queue, most_body, manners, api_key, audit } = settings;
    let (jobs, asked) = mpsc::channel();
    let (metrics, tokenizer) = (Arc::new(Metrics::default()), Arc::new(tokenizer));
    let size = Size::within(&model.spec, &limits);
    metrics.cache_rows.store(limits.tokens.max(limits.context), Ordering::Relaxed);
    let app = Arc::new(App {
        template: tokenizer.chat_template().map_err(|error| match error {
            Error::File { detail, .. } => detail,
            other => other.to_string(),
        }),
        tokenizer: tokenizer.clone(),
        soups,
        most,
        most_body,
        patience: manners.patience,
        api_key,
        jobs,
        places: Arc::new(Semaphore::new(limits.running + queue)),
        metrics: metrics.clone(),
        audit,
        started: audit::now() as u64,
        entropy: (audit::now() * 1e6) as u64 ^ (u64::from(std::process::id()) << 40),
        count: AtomicU64::new(0),
        stopping: AtomicBool::new(false),
    });
    let engine = Engine::new(device).with_tokenizer(&tokenizer);
    let session = engine.session(model, size)?;
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    // Few threads read requests, so that the cores are the model's.
    let runtime = runtime.worker_threads(2).max_blocking_threads(4).enable_all().build().at("runtime")?;
    let (fail, failed) = watch::channel(false);
    say(format_args!("listening on http://{}", listener.local_addr().at("listener")?));
    let over = Arc::new(AtomicBool::new(false));
    let connections = thread::spawn({
        let over = over.clone();
        move || {
            let served = runtime.block_on(http::serve(listener, app, manners, failed));
            over.store(true, Ordering::Relaxed);
            // Whoever is left is let go.
            runtime.shutdown_timeout(Duration::from_secs(1));
            served
        }
    });
    let worked = worker::work(session, &asked, &metrics, &|| over.load(Ordering::Relaxed));
    if worked.is_err() {
        // Nobody may be left to hear it.
        let _ = fail.send(true);
    }
    // Jobs that were never taken in have nobody to answer them.
    drop(asked);
    let served = connections.join().map_err(|_| Error::op("serve", "the thread of connections panicked"))?;
    worked.and(served)
}
