//! The routes: what is asked goes to the thread that computes, and what it tells becomes an answer.

use std::net::IpAddr;
use std::pin::Pin;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, mpsc};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use hyper::body::{Body as _, Bytes, Frame};
use serde_json::{Value, json};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use super::answer::{Answer, event};
use super::audit::{Audit, now};
use super::metrics::Metrics;
use super::refusal::Refusal;
use super::soup::Soups;
use super::wanted::{Most, Reader, Shape, Wanted};
use super::worker::{Job, News};
use crate::data::{ChatTemplate, Tokenizer};

/// What every request is answered with.
pub struct App {
    pub tokenizer: Arc<Tokenizer>,
    /// Or why there is none.
    pub template: Result<Arc<ChatTemplate>, String>,
    pub soups: Soups,
    pub most: Most,
    pub most_body: usize,
    /// A body that takes longer to arrive is not waited for.
    pub patience: Duration,
    pub api_key: Option<String>,
    pub jobs: mpsc::Sender<Job>,
    /// One place for each completion that runs or waits.
    pub places: Arc<Semaphore>,
    pub metrics: Arc<Metrics>,
    pub audit: Option<Audit>,
    pub started: u64,
    /// Mixed into ids and into seeds that nobody named.
    pub entropy: u64,
    pub count: AtomicU64,
    pub stopping: AtomicBool,
}

pub fn router(app: Arc<App>) -> Router {
    Router::new()
        .route("/v1/completions", post(completions))
        .route("/v1/chat/completions", post(chats))
        .route("/v1/models", get(models))
        .route("/v1/models/{name}", get(model))
        .route("/metrics", get(metrics))
        .route("/health", get(health))
        .fallback(nowhere)
        .method_not_allowed_fallback(wrong_method)
        .with_state(app)
}

async fn nowhere() -> Refusal {
    let routes = "/v1/completions, /v1/chat/completions, /v1/models, /metrics and /health";
    Refusal::new(StatusCode::NOT_FOUND, format!("there is nothing here; there are {routes}"))
}

async fn wrong_method() -> Refusal {
    let message = "completions are asked for with POST, everything else with GET";
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, message)
}

async fn health(State(app): State<Arc<App>>) -> Response {
    match app.stopping.load(Relaxed) {
        true => Refusal::stopping().into_response(),
        false => json_response(&json!({"status": "ok"})),
    }
}

async fn metrics(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    match app.admit(&headers) {
        Ok(()) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], app.metrics.text()).into_response(),
        Err(refusal) => refusal.into_response(),
    }
}

async fn models(State(app): State<Arc<App>>, headers: HeaderMap) -> Response {
    match app.admit(&headers) {
        Ok(()) => json_response(&json!({"object": "list", "data": app.models()})),
        Err(refusal) => refusal.into_response(),
    }
}

async fn model(
    State(app): State<Arc<App>>,
    axum::extract::Path(name): axum::extract::Path<String>,
    headers: HeaderMap,
) -> Response {
    let found = app.models().into_iter().find(|model| model["id"] == name.as_str());
    let missing = || Refusal::new(StatusCode::NOT_FOUND, format!("there is no {name:?}")).with_code("model_not_found");
    match app.admit(&headers).and_then(|()| found.ok_or_else(missing)) {
        Ok(model) => json_response(&model),
        Err(refusal) => refusal.into_response(),
    }
}

async fn completions(State(app): State<Arc<App>>, request: Request) -> Response {
    app.route("/v1/completions", Shape::Completion, request).await
}

async fn chats(State(app): State<Arc<App>>, request: Request) -> Response {
    app.route("/v1/chat/completions", Shape::Chat, request).await
}

fn json_response(value: &Value) -> Response {
    ([(header::CONTENT_TYPE, "application/json")], value.to_string()).into_response()
}

impl App {
    /// The base and each adapter that may be taken whole.
    fn models(&self) -> Vec<Value> {
        let model = |name: &str, hash: &str| json!({"id": name, "object": "model", "created": self.started, "owned_by": "cuvee", "hash": hash});
        let base = model(&self.soups.base, &self.soups.base_hash);
        let adapters = self.soups.adapters.iter().map(|adapter| {
            let mut model = model(&adapter.name, &adapter.hash);
            model["parent"] = self.soups.base.as_str().into();
            model["range"] = json!(adapter.range);
            model
        });
        std::iter::once(base).chain(adapters).collect()
    }

    /// Refuses who has not the key.
    fn admit(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let Some(key) = &self.api_key else { return local(headers) };
        let given = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let given = given.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
        // Hashes take the same time to compare whatever they have in common.
        if blake3::hash(given.as_bytes()) == blake3::hash(key.as_bytes()) {
            return Ok(());
        }
        let message = "this server wants its API key: Authorization: Bearer KEY";
        Err(Refusal::new(StatusCode::UNAUTHORIZED, message).with_code("invalid_api_key"))
    }

    async fn route(self: Arc<Self>, route: &'static str, shape: Shape, request: Request) -> Response {
        let app = self.clone();
        let response = app.answer(route, shape, request).await.unwrap_or_else(Refusal::into_response);
        self.metrics.answered(route, response.status().as_u16());
        response
    }

    async fn answer(self: Arc<Self>, route: &'static str, shape: Shape, request: Request) -> Result<Response, Refusal> {
        self.admit(request.headers())?;
        if self.stopping.load(Relaxed) {
            return Err(Refusal::stopping());
        }
        let content = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        if !content.is_some_and(|content| content.trim_start().starts_with("application/json")) {
            // A page of another site may send a form to this machine, but no JSON.
            let message = "expected Content-Type: application/json";
            return Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
        let body = tokio::time::timeout(self.patience, read(request.into_body(), self.most_body)).await;
        let late = |_| Refusal::new(StatusCode::REQUEST_TIMEOUT, "the body took too long to arrive");
        let body = body.map_err(late)??;
        // Templates and tokens take time that other connections should not wait for.
        let app = self.clone();
        let wanted = tokio::task::spawn_blocking(move || app.read(shape, &body)).await;
        let wanted = wanted.map_err(|_| Refusal::failed("the request cannot be read"))??;
        let (answer, news) = self.clone().ask(wanted)?;
        let made = self.soups.line(&answer.wanted.blend);
        let stream = answer.wanted.stream;
        let live = Live { app: self, route, answer, news, started: Instant::now(), begun: false, over: None };
        let mut response = match stream {
            true => {
                let mut response = Response::new(Body::new(live));
                let headers = response.headers_mut();
                headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
                headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-cache"));
                response
            }
            false => json_response(&live.whole().await?),
        };
        if let Ok(made) = HeaderValue::from_str(&made) {
            response.headers_mut().insert("x-cuvee-soup", made);
        }
        Ok(response)
    }

    fn read(&self, shape: Shape, body: &[u8]) -> Result<Wanted, Refusal> {
        let seed = mixed(self.entropy, self.count.fetch_add(1, Relaxed)) >> 32;
        let reader =
            Reader { tokenizer: &self.tokenizer, template: &self.template, soups: &self.soups, most: self.most, seed };
        match shape {
            Shape::Completion => reader.completion(body),
            Shape::Chat => reader.chat(body),
        }
    }

    /// Puts a request into the queue.
    fn ask(self: Arc<Self>, wanted: Wanted) -> Result<(Answer, UnboundedReceiver<News>), Refusal> {
        let mut places = Vec::new();
        for _ in &wanted.prompts {
            let taken = self.places.clone().try_acquire_many_owned(wanted.n as u32);
            places.push(taken.map_err(|_| Refusal::busy())?);
        }
        let prefix = match wanted.shape {
            Shape::Completion => "cmpl",
            Shape::Chat => "chatcmpl",
        };
        let id = format!("{prefix}-{:016x}", mixed(!self.entropy, self.count.fetch_add(1, Relaxed)));
        let mut provenance = self.soups.provenance(&wanted.blend);
        provenance["seed"] = wanted.sampling.seed.into();
        let answer = Answer::new(self.tokenizer.clone(), wanted, &id, now() as u64, provenance);
        let (news, receiver) = unbounded_channel();
        for ((number, prompt), places) in answer.wanted.prompts.iter().enumerate().zip(places) {
            let wanted = &answer.wanted;
            let job = Job {
                prompt: prompt.ids.clone(),
                samples: wanted.n,
                // Without a new token the prompt would not run.
                max_new_tokens: wanted.max_new_tokens.max(1),
                sampling: wanted.sampling,
                // Equal prompts are drawn for apart, unless a seed asks for what each gets alone.
                first_sample: if wanted.seeded { 0 } else { (number * wanted.n) as u64 },
                eos: if wanted.ignore_eos { Vec::new() } else { self.tokenizer.stops().to_vec() },
                stop: wanted.stop.clone(),
                blend: wanted.blend.clone(),
                alternatives: wanted.logprobs.unwrap_or(0),
                score_prompt: answer.scores_prompts(),
                number,
                news: news.clone(),
                _places: places,
            };
            self.jobs.send(job).map_err(|_| Refusal::stopping())?;
        }
        self.metrics.prompt_tokens.fetch_add(answer.prompt_tokens() as u64, Relaxed);
        Ok((answer, receiver))
    }
}

/// Refuses who calls this machine by a foreign name: a page's own name may be made to lead here, and a browser then lets it ask.
fn local(headers: &HeaderMap) -> Result<(), Refusal> {
    let Some(host) = headers.get(header::HOST) else { return Ok(()) };
    let host = host.to_str().unwrap_or_default();
    let port = |port: &str| port.bytes().all(|byte| byte.is_ascii_digit());
    let name = host.rsplit_once(':').filter(|(_, rest)| port(rest)).map_or(host, |(name, _)| name);
    let address: Option<IpAddr> = name.trim_matches(['[', ']']).parse().ok();
    if name == "localhost" || address.is_some_and(|address| address.is_loopback()) {
        return Ok(());
    }
    let message = format!("without an API key this server answers to localhost only, and was called {host:?}");
    Err(Refusal::new(StatusCode::FORBIDDEN, message))
}

/// A number that follows from both, SplitMix64's way (Steele et al., 2014).
fn mixed(entropy: u64, count: u64) -> u64 {
    let mut x = entropy.wrapping_add(count.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// A body of at most `most` bytes.
async fn read(mut body: Body, most: usize) -> Result<Vec<u8>, Refusal> {
    let mut bytes = Vec::new();
    while let Some(frame) = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        let frame =
            frame.map_err(|e| Refusal::new(StatusCode::BAD_REQUEST, format!("the body does not arrive: {e}")))?;
        let Ok(data) = frame.into_data() else { continue };
        if bytes.len() + data.len() > most {
            let message = format!("the body has more than {most} bytes, the most that this server reads");
            return Err(Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, message));
        }
        bytes.extend_from_slice(&data);
    }
    Ok(bytes)
}

/// An answer that is on its way. Where it is dropped before its end, its jobs end.
struct Live {
    app: Arc<App>,
    route: &'static str,
    answer: Answer,
    news: UnboundedReceiver<News>,
    started: Instant,
    begun: bool,
    /// How it ended.
    over: Option<&'static str>,
}

impl Live {
    fn take(&mut self, news: Option<News>) -> Result<Option<usize>, Refusal> {
        let taken = match news {
            Some(news) => self.answer.take(news).map_err(Refusal::failed),
            None => Err(Refusal::failed("the model stopped before the end of the answer")),
        };
        if let Ok(Some(_)) = taken
            && !std::mem::replace(&mut self.begun, true)
        {
            self.app.metrics.first_token.add(self.started.elapsed());
        }
        if taken.is_err() {
            self.over = Some("failed");
        } else if self.answer.ended() {
            self.over = Some("done");
        }
        taken
    }

    async fn whole(mut self) -> Result<Value, Refusal> {
        while self.over.is_none() {
            let news = self.news.recv().await;
            self.take(news)?;
        }
        Ok(self.answer.whole())
    }

    fn entry(&self, audit: &Audit) -> Value {
        let wanted = &self.answer.wanted;
        let mut entry = json!({
            "time": now(),
            "route": self.route,
            "model": wanted.model,
            "made_of": self.answer.provenance,
            "prompt_tokens": self.answer.prompt_tokens(),
            "completion_tokens": self.answer.tokens(),
            "completions": self.answer.finishes(),
            "ended": self.over.unwrap_or("abandoned"),
            "seconds": self.started.elapsed().as_secs_f64(),
        });
        if audit.prompts {
            entry["prompts"] = wanted.prompts.iter().map(|prompt| prompt.text.as_str()).collect();
            entry["texts"] = self.answer.texts().into();
        }
        entry
    }
}

impl Drop for Live {
    fn drop(&mut self) {
        match self.over {
            Some(_) => self.app.metrics.whole.add(self.started.elapsed()),
            None => drop(self.app.metrics.abandoned.fetch_add(1, Relaxed)),
        }
        if let Some(audit) = &self.app.audit {
            audit.write(&self.entry(audit));
        }
    }
}

/// A stream of events, made when the client takes them.
impl hyper::body::Body for Live {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, std::convert::Infallible>>> {
        loop {
            if self.over.is_some() {
                return Poll::Ready(None);
            }
            let Poll::Ready(news) = self.news.poll_recv(cx) else { return Poll::Pending };
            let events = match self.take(news) {
                Ok(Some(at)) => self.answer.events(at),
                Ok(None) => String::new(),
                Err(refusal) => event(&refusal.json()),
            };
            if !events.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(events.into()))));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_are_local() {
        let called = |host: &str| local(&HeaderMap::from_iter([(header::HOST, host.parse().unwrap())])).is_ok();
        for host in ["localhost", "localhost:8000", "127.0.0.1", "127.0.0.1:80", "[::1]:8000", "[::1]", "127.9.9.9:1"] {
            assert!(called(host), "{host}");
        }
        for host in ["evil.example", "evil.example:8000", "localhost.evil.example", "10.0.0.1:8000", "0.0.0.0", ""] {
            assert!(!called(host), "{host}");
        }
        assert!(local(&HeaderMap::new()).is_ok());
    }

    #[test]
    fn numbers_that_follow_each_other_have_nothing_in_common() {
        let numbers: Vec<u64> = (0..1000).map(|count| mixed(7, count) >> 32).collect();
        let mut sorted = numbers.clone();
        sorted.sort_unstable();
        sorted.dedup();
        assert_eq!(sorted.len(), numbers.len());
    }
}
