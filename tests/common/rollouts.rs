//! Many requests that have little in common, and what must be equal of their completions.

use cuvee::data::{self, Example, Extent, Sequence, Sharing, Temperature};
use cuvee::device::Philox;
use cuvee::model::Keep;
use cuvee::ops::Backend;
use cuvee::rollout::{Engine, Request, Rollout, Sampling};

use super::tiny::{Rig, SEED, Tiny};

const EOS: [u32; 2] = [7, 100];
/// Of prompt and completion.
const LONGEST: usize = 100;

/// Prompts of 1 to 70 tokens, some of them equal.
pub fn prompts(count: usize) -> Vec<Vec<u32>> {
    let random = Philox::named(SEED, "prompts");
    let number = |at: usize, below: u64| random.u64(at as u64) % below;
    let prompt = |i: usize| {
        let same = if i % 9 == 8 { i - 1 } else { i };
        (0..1 + number(1000 * same, 70) as usize).map(|t| number(1000 * same + t + 1, 523) as u32).collect()
    };
    (0..count).map(prompt).collect()
}

/// A request for each prompt, of all lengths, temperatures, rules and numbers of samples.
pub fn requests<'a>(prompts: &'a [Vec<u32>], stop: &'a [String]) -> Vec<Request<'a>> {
    let request = |(i, prompt): (usize, &'a Vec<u32>)| {
        let sampling = Sampling {
            temperature: [1.0, 0.0, 0.7, 1.0, 1.6][i % 5],
            top_k: [0, 0, 30, 0][i % 4],
            top_p: [1.0, 1.0, 0.9][i % 3],
            min_p: if i % 7 == 3 { 0.02 } else { 0.0 },
            repetition_penalty: if i % 6 == 1 { 1.3 } else { 1.0 },
            seed: (i / 20) as u64,
        };
        Request {
            samples: [1, 3, 2][i % 3],
            first_sample: 10 * i as u64,
            min_new_tokens: if i % 8 == 5 { 6 } else { 0 },
            no_repeat_ngram_size: if i % 10 == 1 { 2 } else { 0 },
            eos: &EOS[..i % 3],
            stop: if i % 4 == 2 { stop } else { &[] },
            ..Request::new(prompt, 1 + i * 13 % 29, sampling)
        }
    };
    prompts.iter().enumerate().map(request).collect()
}

/// The model, able to score what it generates.
pub fn rig<B: Backend>(device: B, tiny: &Tiny) -> Rig<B> {
    let extent = Extent { rows: LONGEST, targets: LONGEST, segments: 1, sequences: 1, longest: LONGEST };
    Rig::new(device, tiny, &extent, Keep::Nothing)
}

pub fn run<B: Backend>(engine: &Engine<B>, rig: &Rig<B>, requests: &[Request]) -> Vec<Rollout> {
    let (mut last, mut calls) = (None, 0);
    let rollouts = engine.run(&rig.model, requests, &mut |done| {
        (last, calls) = (Some(done), calls + 1);
    });
    let rollouts = rollouts.unwrap();
    let last = last.expect("it is called after every pass");
    assert_eq!(last.completions, requests.iter().map(|request| request.samples).sum::<usize>());
    assert_eq!(last.tokens, rollouts.iter().map(|rollout| rollout.ids.len()).sum::<usize>());
    let order: Vec<_> = rollouts.iter().map(|rollout| (rollout.prompt, rollout.sample)).collect();
    assert!(order.is_sorted() && order.len() == last.completions && calls > 0);
    rollouts
}

#[track_caller]
pub fn assert_same(what: &str, found: &[Rollout], expected: &[Rollout]) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (found, expected) in found.iter().zip(expected) {
        let bits = |rollout: &Rollout| {
            let all = rollout.logps.iter().chain(&rollout.sampled_logps);
            all.map(|logp| logp.to_bits()).collect::<Vec<_>>()
        };
        assert_eq!(found.ids, expected.ids, "{what}: request {}, sample {}", found.prompt, found.sample);
        assert_eq!((bits(found), found.finish), (bits(expected), expected.finish), "{what}: request {}", found.prompt);
    }
}

/// The log-probabilities that scoring gives the tokens of `rollout`.
pub fn scored<B: Backend>(rig: &mut Rig<B>, requests: &[Request], rollout: &Rollout) -> Vec<f64> {
    scored_at(Temperature::ONE, rig, requests, rollout)
}

pub fn scored_at<B: Backend>(
    temperature: Temperature,
    rig: &mut Rig<B>,
    requests: &[Request],
    rollout: &Rollout,
) -> Vec<f64> {
    let prompt = requests[rollout.prompt].prompt;
    let sequences = vec![Sequence::new([prompt, &rollout.ids].concat(), prompt.len())];
    let batch = data::Batch::new(&[Example { sequences, ..Example::default() }], Sharing::On);
    rig.forward(&data::Batch { temperature, ..batch })
}
