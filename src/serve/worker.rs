//! The thread that computes: between two passes it takes in what was asked and forgets those who left.

use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedSender;

use super::metrics::Metrics;
use crate::error::Result;
use crate::ops::Backend;
use crate::rollout::{Ask, Event, Finish, Request, Rollout, Sampling, Scores, Session};

/// One prompt to complete.
pub struct Job {
    pub prompt: Vec<u32>,
    pub samples: usize,
    pub max_new_tokens: usize,
    pub sampling: Sampling,
    /// Where its streams of random numbers begin.
    pub first_sample: u64,
    pub eos: Vec<u32>,
    pub stop: Vec<String>,
    pub blend: Vec<f32>,
    pub alternatives: usize,
    pub score_prompt: bool,
    /// Which prompt of its HTTP request it is.
    pub number: usize,
    /// Where news goes. Its length is bounded by the tokens that the job may have; a receiver that is gone ends the job.
    pub news: UnboundedSender<News>,
    /// Its places in the queue, free when the job is dropped.
    pub _places: OwnedSemaphorePermit,
}

impl Ask for Job {
    fn request(&self) -> Request<'_> {
        Request {
            samples: self.samples,
            first_sample: self.first_sample,
            eos: &self.eos,
            stop: &self.stop,
            blend: &self.blend,
            alternatives: self.alternatives,
            score_prompt: self.score_prompt,
            ..Request::new(&self.prompt, self.max_new_tokens, self.sampling)
        }
    }
}

/// What became of a job since the last news.
#[derive(Debug)]
pub enum News {
    /// The tokens of prompt `number` have these log-probabilities.
    Prompt(usize, Scores),
    /// A completion has one more token.
    Token(Token),
    /// The model cannot go on.
    Failed(String),
}

/// A token of a completion.
#[derive(Clone, PartialEq, Debug)]
pub struct Token {
    /// Prompt and sample.
    pub of: [usize; 2],
    pub id: u32,
    pub logp: f32,
    pub alternatives: Vec<(u32, f32)>,
    /// Why it was the last.
    pub finish: Option<Finish>,
}

impl Token {
    /// The newest.
    fn of(number: usize, rollout: &Rollout, finish: Option<Finish>) -> Self {
        const DRAWN: &str = "an event comes with a token";
        Self {
            of: [number, rollout.sample],
            id: *rollout.ids.last().expect(DRAWN),
            logp: *rollout.logps.last().expect(DRAWN),
            alternatives: rollout.alternatives.last().cloned().unwrap_or_default(),
            finish,
        }
    }
}

/// A job that the session holds.
struct Live {
    news: UnboundedSender<News>,
    number: usize,
    /// Completions that have not ended.
    left: usize,
}

/// How often a session without work looks whether it may end.
const IDLE: Duration = Duration::from_millis(200);

/// Works until nobody can ask any more, or until `ended`.
///
/// # Errors
/// The device fails; every live job is dropped then.
pub fn work<B: Backend>(
    mut session: Session<B, Job>,
    jobs: &Receiver<Job>,
    metrics: &Metrics,
    ended: &dyn Fn() -> bool,
) -> Result<()> {
    let mut live: HashMap<usize, Live> = HashMap::new();
    loop {
        let first = match live.is_empty() {
            false => None,
            true => match jobs.recv_timeout(IDLE) {
                Ok(job) => Some(job),
                Err(RecvTimeoutError::Timeout) if !ended() => None,
                Err(_) => return Ok(()),
            },
        };
        for job in first.into_iter().chain(jobs.try_iter()) {
            let (news, number, left) = (job.news.clone(), job.number, job.samples);
            match session.push(job) {
                Ok(key) => drop(live.insert(key, Live { news, number, left })),
                // Nobody listens where this fails.
                Err(error) => drop(news.send(News::Failed(error.to_string()))),
            }
        }
        live.retain(|key, live| {
            let stays = !live.news.is_closed();
            if !stays {
                session.cancel(*key);
            }
            stays
        });
        let worked = session.step(&mut |event| tell(&mut live, event, metrics))?;
        metrics.passes.fetch_add(u64::from(worked), Relaxed);
        let [running, waiting, rows] = session.load();
        metrics.running.store(running, Relaxed);
        metrics.waiting.store(waiting, Relaxed);
        metrics.cache_used.store(rows, Relaxed);
    }
}

fn tell(live: &mut HashMap<usize, Live>, event: Event, metrics: &Metrics) {
    let (key, finish) = match &event {
        Event::Prompt(key, _) | Event::Failed(key, _) => (*key, None),
        Event::Token(rollout) => (rollout.prompt, None),
        Event::Ended(rollout) => (rollout.prompt, Some(rollout.finish)),
    };
    let Some(job) = live.get_mut(&key) else { return };
    let failed = matches!(event, Event::Failed(..));
    let news = match event {
        Event::Prompt(_, scores) => News::Prompt(job.number, scores),
        Event::Failed(_, error) => News::Failed(error.to_string()),
        Event::Token(rollout) => News::Token(Token::of(job.number, rollout, None)),
        Event::Ended(rollout) => News::Token(Token::of(job.number, &rollout, finish)),
    };
    metrics.completion_tokens.fetch_add(u64::from(matches!(news, News::Token(_))), Relaxed);
    // A client that left is seen before the next pass.
    let _ = job.news.send(news);
    job.left -= usize::from(finish.is_some());
    if job.left == 0 || failed {
        live.remove(&key);
    }
}
