//! What a sequence so far does to the logits of its next token, as transformers' processors of the same names:
//! `repetition_penalty` (Keskar et al., arXiv:1909.05858) of every token in prompt and completion, `no_repeat_ngram_size`
//! (Paulus et al., arXiv:1705.04304) over both, no end before `min_new_tokens`. A token that is banned by one of them is not
//! penalized besides, which comes to the same.

use super::Request;
use crate::ops::sample::BANNED;

/// Appends the edits of the token that follows `completion`, each token once, [`BANNED`] or penalized.
pub fn append(request: &Request, completion: &[u32], edits: &mut Vec<u32>) {
    let mut tokens = Vec::new();
    if completion.len() < request.min_new_tokens {
        tokens.extend(request.eos.iter().map(|id| id | BANNED));
    }
    if request.no_repeat_ngram_size > 0 || request.sampling.repetition_penalty != 1.0 {
        let all = [request.prompt, completion].concat();
        if let Some(known) = request.no_repeat_ngram_size.checked_sub(1) {
            let last = &all[all.len().saturating_sub(known)..];
            let repeats = all.windows(known + 1).filter(|ngram| ngram[..known] == *last);
            tokens.extend(repeats.map(|ngram| ngram[known] | BANNED));
        }
        if request.sampling.repetition_penalty != 1.0 {
            tokens.extend(all);
        }
    }
    // Banned before penalized, of which the first stays.
    tokens.sort_unstable_by_key(|edit| (edit & !BANNED, edit & BANNED == 0));
    tokens.dedup_by_key(|edit| *edit & !BANNED);
    edits.append(&mut tokens);
}

/// Most edits of one token of `request`, for a vocabulary of `vocab`.
pub fn most(request: &Request, vocab: usize) -> usize {
    let eos = if request.min_new_tokens > 0 { request.eos.len() } else { 0 };
    let edits = request.no_repeat_ngram_size > 0 || request.sampling.repetition_penalty != 1.0;
    let seen = if edits { request.prompt.len() + request.max_new_tokens } else { 0 };
    (eos + seen).min(vocab)
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::device::{Arena, Cpu, Device, Kind};
    use crate::ops::sample::{Args, ODDS, Row, Sample, Sampling, sampled_logp};

    /// What transformers' processors leave of some logits is what tokens are drawn from here: tests/data/rollout/make.py.
    #[test]
    fn what_is_left_is_what_transformers_leaves() {
        let file: Value = serde_json::from_str(include_str!("../../tests/data/rollout/processors.json")).unwrap();
        let numbers = |of: &Value| of.as_array().unwrap().iter().map(|x| x.as_f64()).collect::<Vec<_>>();
        let ids = |of: &Value| numbers(of).into_iter().map(|id| id.unwrap() as u32).collect::<Vec<_>>();
        let [eos, prompt, completion] = ["eos", "prompt", "completion"].map(|key| ids(&file[key]));
        for case in file["cases"].as_array().unwrap() {
            let option = |key: &str, none: f64| case["options"][key].as_f64().unwrap_or(none);
            let sampling = Sampling {
                temperature: option("temperature", 1.0),
                top_k: option("top_k", 0.0) as usize,
                top_p: option("top_p", 1.0),
                min_p: option("min_p", 0.0),
                repetition_penalty: option("repetition_penalty", 1.0),
                seed: 5,
            };
            let request = Request {
                eos: &eos,
                min_new_tokens: option("min_new_tokens", 0.0) as usize,
                no_repeat_ngram_size: option("no_repeat_ngram_size", 0.0) as usize,
                ..Request::new(&prompt, 99, sampling)
            };
            let logits: Vec<f32> = numbers(&case["logits"]).into_iter().map(|l| l.unwrap() as f32).collect();
            let mut drawn = vec![None; logits.len()];
            for (id, logp) in draws(&logits, sampling, &of(&request, &completion)) {
                drawn[id as usize] = Some(logp);
            }
            for (id, (drawn, expected)) in drawn.into_iter().zip(numbers(&case["logps"])).enumerate() {
                let likely = expected.is_some_and(|logp| logp.exp() > 0.003);
                let near = drawn.zip(expected).is_some_and(|(drawn, logp)| (drawn - logp).abs() < 2e-5);
                let holds = if drawn.is_some() { near } else { !likely };
                assert!(holds, "{}: token {id} {drawn:?}, expected {expected:?}", case["options"]);
            }
        }
    }

    /// Many draws, each with its log-probability.
    fn draws(logits: &[f32], sampling: Sampling, edits: &[u32]) -> Vec<(u32, f64)> {
        const ROWS: usize = 4000;
        let cpu = Cpu::new(1).unwrap();
        let mut arena = Arena::with_bytes(&cpu, 8 << 20).unwrap();
        let (mut x, mut saved) =
            (arena.floats(Kind::Workspace, ROWS, logits.len()), arena.floats(Kind::Workspace, edits.len(), 1));
        let mut index = |rows, cols| arena.indices(Kind::Workspace, rows, cols);
        let (mut how, mut all_edits) = (index(ROWS, Row::WORDS), index(edits.len(), 1));
        let (mut ids, mut odds) = (index(ROWS, 1), index(ROWS, ODDS));
        let rows: Vec<Row> = (0..ROWS as u32).map(|position| sampling.row(9, position, 0, edits.len())).collect();
        cpu.write_f32(&logits.repeat(ROWS), x.view_mut()).unwrap();
        cpu.write_u32(bytemuck::cast_slice(&rows), how.view_mut()).unwrap();
        cpu.write_u32(edits, all_edits.view_mut()).unwrap();
        let (rows, edits) = (how.view(), all_edits.view());
        let outs = (saved.view_mut(), ids.view_mut(), odds.view_mut());
        cpu.sample(Args { logits: x.view_mut(), rows, edits, saved: outs.0, ids: outs.1, odds: outs.2 }).unwrap();
        let (mut found, mut chances) = (vec![0; ROWS], vec![[0; ODDS]; ROWS]);
        cpu.read_u32(ids.view(), &mut found).unwrap();
        cpu.read_u32(odds.view(), chances.as_flattened_mut()).unwrap();
        found.into_iter().zip(chances.into_iter().map(sampled_logp)).collect()
    }

    fn of(request: &Request, completion: &[u32]) -> Vec<u32> {
        let mut edits = Vec::new();
        append(request, completion, &mut edits);
        assert!(edits.len() <= most(request, 1 << 20));
        edits
    }

    #[test]
    fn nothing_is_edited_without_a_rule() {
        assert_eq!(of(&Request::new(&[1, 1, 1], 9, Sampling::plain(0)), &[1, 1]), [0; 0]);
    }

    #[test]
    fn a_token_is_edited_once_and_banned_before_it_is_penalized() {
        let sampling = Sampling { repetition_penalty: 1.5, ..Sampling::plain(0) };
        let request = Request {
            eos: &[9, 5],
            min_new_tokens: 3,
            no_repeat_ngram_size: 2,
            ..Request::new(&[5, 6, 5], 9, sampling)
        };
        assert_eq!(of(&request, &[]), [5 | BANNED, 6 | BANNED, 9 | BANNED]);
        assert_eq!(of(&request, &[7, 6]), [5 | BANNED, 6, 7, 9 | BANNED]);
        assert_eq!(of(&request, &[7, 6, 7]), [5, 6 | BANNED, 7]);
    }

    #[test]
    fn no_ngram_comes_again() {
        let repeats = |size, prompt: &[u32], completion: &[u32]| {
            let request = Request { no_repeat_ngram_size: size, ..Request::new(prompt, 99, Sampling::plain(0)) };
            of(&request, completion).iter().map(|edit| edit & !BANNED).collect::<Vec<_>>()
        };
        assert_eq!(repeats(1, &[4, 2, 4], &[3]), [2, 3, 4]);
        assert_eq!(repeats(3, &[1, 2, 3, 1], &[2]), [3]);
        assert_eq!(repeats(3, &[1, 2, 3, 1, 2], &[4, 1, 2]), [3, 4]);
        assert_eq!(repeats(3, &[1, 2], &[]), [0; 0]);
        assert_eq!(repeats(9, &[1], &[]), [0; 0]);
    }
}
