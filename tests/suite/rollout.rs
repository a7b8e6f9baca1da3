//! Generation: a text depends on its request alone, and its log-probabilities are those that scoring gives.

use std::path::Path;

use cuvee::data::{Temperature, Tokenizer};
use cuvee::device::{Cpu, Isa};
use cuvee::ops::sample::BANNED;
use cuvee::rollout::{
    Engine, Event, Finish, Limits, Request, Rollout, Sampling, Size as Room, before_stop, generate, max_running, plan,
};

use crate::common::rollouts::{assert_same, prompts, requests, rig, run, scored, scored_at};
use crate::common::tiny::{self, Size, Tiny};

fn model(name: &str) -> Tiny {
    tiny::all(Size::Small).into_iter().find(|tiny| tiny.name == name).expect("listed")
}

/// Of the shipped model; the small models have its first tokens.
fn tokenizer() -> Tokenizer {
    Tokenizer::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/review-llama-656k")).unwrap()
}

fn stops() -> Vec<String> {
    ["e", "th"].map(String::from).into()
}

#[test]
fn sixty_four_requests_get_what_each_gets_alone() {
    let (prompts, stop, tokenizer) = (prompts(64), stops(), tokenizer());
    let requests = requests(&prompts, &stop);
    let mut counts = [0; 3];
    for name in ["llama", "qwen3", "gpt2"] {
        let rig = rig(Cpu::new(2).unwrap(), &model(name));
        let engine = Engine::new(&rig.device).with_tokenizer(&tokenizer);
        let together = run(&engine, &rig, &requests);
        for max_running in [1, 3, 64] {
            let found = run(&engine.with_max_running(max_running), &rig, &requests);
            assert_same(&format!("{name}, {max_running} at a time"), &found, &together);
        }
        for (i, request) in requests.iter().enumerate() {
            let alone = run(&engine, &rig, &[*request]);
            let expected: Vec<_> = together.iter().filter(|rollout| rollout.prompt == i).cloned().collect();
            assert_same(&format!("{name}, request {i} alone"), &alone, &expected);
        }
        let mut backwards = requests.clone();
        backwards.reverse();
        let mut found = run(&engine.with_max_running(5), &rig, &backwards);
        found.sort_by_key(|rollout| (requests.len() - 1 - rollout.prompt, rollout.sample));
        assert_same(&format!("{name}, the other way round"), &found, &together);
        let ways = [Finish::Eos, Finish::Stop, Finish::Length];
        let count = |finish| together.iter().filter(|rollout| rollout.finish == finish).count();
        counts.iter_mut().zip(ways).for_each(|(sum, finish)| *sum += count(finish));
    }
    assert!(counts.iter().all(|count| *count > 2), "every way to end: {counts:?}");
}

#[test]
fn threads_and_instruction_sets_change_nothing() {
    let (prompts, tiny) = (prompts(16), model("mistral"));
    let requests = requests(&prompts, &[]);
    let of = |cpu: Cpu| {
        let rig = rig(cpu, &tiny);
        run(&Engine::new(&rig.device), &rig, &requests)
    };
    assert_same("one thread", &of(Cpu::new(1).unwrap()), &of(Cpu::new(2).unwrap()));
    let [portable, best] = [Isa::Portable, Isa::detect()].map(|isa| of(Cpu::with_isa(2, isa).unwrap()));
    assert_same("instruction sets", &portable, &best);
}

/// Bit for bit, for every architecture and under adapters.
#[test]
fn logps_are_those_of_scoring() {
    let prompts = prompts(9);
    let requests = requests(&prompts, &[]);
    for tiny in tiny::all(Size::Small).into_iter().chain(tiny::adapted(Size::Small, 0.1)) {
        let mut rig = rig(Cpu::new(2).unwrap(), &tiny);
        for rollout in run(&Engine::new(&rig.device), &rig, &requests) {
            let expected = scored(&mut rig, &requests, &rollout);
            let found: Vec<f64> = rollout.logps.iter().map(|logp| f64::from(*logp)).collect();
            assert_eq!(found, expected, "{}: request {}", tiny.name, rollout.prompt);
        }
    }
}

/// Whatever the tokens are drawn at; those that are drawn at it, from the whole vocabulary, are drawn by them.
#[test]
fn logps_at_another_temperature_are_those_of_scoring() {
    let prompts = prompts(9);
    let (tiny, temperature) = (model("llama"), Temperature::new(0.7).unwrap());
    let mut requests = requests(&prompts, &[]);
    requests[0].sampling = Sampling { temperature: 0.7, ..Sampling::plain(3) };
    let mut rig = rig(Cpu::new(2).unwrap(), &tiny);
    let cool = run(&Engine::new(&rig.device).with_logps_temperature(temperature), &rig, &requests);
    let plain = run(&Engine::new(&rig.device), &rig, &requests);
    for (rollout, plain) in cool.iter().zip(&plain) {
        assert_eq!(rollout.ids, plain.ids, "what is told changes nothing that is drawn");
        let found: Vec<f64> = rollout.logps.iter().map(|logp| f64::from(*logp)).collect();
        assert_eq!(found, scored_at(temperature, &mut rig, &requests, rollout), "request {}", rollout.prompt);
        if rollout.prompt == 0 {
            assert_eq!(rollout.sampled_logps, rollout.logps);
            // Without it the sampler tells them itself.
            let off = rollout.logps.iter().zip(&plain.sampled_logps).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(off < 1e-5, "{off:e}");
        }
    }
    let wanted = Request { alternatives: 3, score_prompt: true, ..requests[0] };
    let mut session = Engine::new(&rig.device).with_logps_temperature(temperature);
    session = session.with_max_running(1);
    let told = run(&session, &rig, &[wanted]).remove(0);
    for (alternatives, (id, logp)) in told.alternatives.iter().zip(told.ids.iter().zip(&told.logps)) {
        assert!(
            alternatives.iter().all(|(other, said)| other != id || said == logp),
            "{id}: {logp} and {alternatives:?}"
        );
    }
}

#[test]
fn what_tokens_were_drawn_from_is_told_apart_from_the_model() {
    let rig = rig(Cpu::new(2).unwrap(), &model("llama"));
    let of = |sampling| generate(&rig.device, &rig.model, &Request::new(&[5, 9], 20, sampling)).unwrap().remove(0);
    let plain = of(Sampling::plain(1));
    assert_eq!(plain.sampled_logps, plain.logps);
    assert!(of(Sampling::greedy()).sampled_logps.iter().all(|logp| *logp == 0.0));
    let narrow = of(Sampling { top_k: 5, ..Sampling::plain(1) });
    assert!(narrow.sampled_logps.iter().zip(&narrow.logps).all(|(sampled, logp)| sampled > logp && *sampled <= 0.0));
}

#[test]
fn a_prompt_whose_completions_come_in_turns_stays() {
    let rig = rig(Cpu::new(2).unwrap(), &model("llama"));
    let request = |prompt, samples| Request { samples, ..Request::new(prompt, 6, Sampling::plain(3)) };
    let (long, short) = ([[3u32, 4, 5]; 12].concat(), [8, 9]);
    let requests = [request(&long, 7), request(&short, 1), request(&long, 2), request(&short, 5)];
    let engine = Engine::new(&rig.device);
    let all = run(&engine, &rig, &requests);
    for running in [1, 2, 4] {
        assert_same("in turns", &run(&engine.with_max_running(running), &rig, &requests), &all);
    }
    let streams: Vec<_> = all.iter().filter(|rollout| rollout.prompt == 0).map(|rollout| &rollout.ids).collect();
    assert!(streams.windows(2).all(|pair| pair[0] != pair[1]), "every sample has a stream of its own");
}

#[test]
fn nothing_ends_before_its_least_length_and_no_rule_is_broken() {
    let rig = rig(Cpu::new(2).unwrap(), &model("llama"));
    let all: Vec<u32> = (0..523).collect();
    let plain = Request { samples: 4, ..Request::new(&[5, 9, 5], 12, Sampling::plain(7)) };
    let of = |request: Request| generate(&rig.device, &rig.model, &request).unwrap();
    // Whatever comes first is the end.
    let ended = of(Request { eos: &all, ..plain });
    assert!(ended.iter().all(|rollout| rollout.ids.len() == 1 && rollout.finish == Finish::Eos));
    let half = &all[..400];
    let late = of(Request { eos: half, min_new_tokens: 5, ..plain });
    let ends = |ids: &[u32]| ids.iter().position(|id| half.contains(id));
    assert!(late.iter().all(|rollout| ends(&rollout.ids).is_none_or(|at| at >= 5)));
    assert!(late.iter().any(|rollout| rollout.finish == Finish::Eos));
    for rollout in of(Request { no_repeat_ngram_size: 1, ..plain }) {
        let mut ids = [&[5, 9][..], &rollout.ids].concat();
        ids.sort();
        assert!(ids.windows(2).all(|pair| pair[0] != pair[1]), "a token came again: {ids:?}");
    }
    assert!(all.iter().all(|id| id & BANNED == 0));
}

/// A stop string is found wherever its tokens begin and end.
#[test]
fn stop_strings_end_a_text() {
    let (rig, tokenizer) = (rig(Cpu::new(2).unwrap(), &model("llama")), tokenizer());
    let plain = Request { samples: 12, ..Request::new(&[5, 9, 5], 40, Sampling::plain(2)) };
    let engine = Engine::new(&rig.device).with_tokenizer(&tokenizer);
    let whole = engine.run(&rig.model, &[plain], &mut |_| ()).unwrap();
    let (mut across, mut found) = (0, 0);
    for (i, rollout) in whole.iter().enumerate() {
        // From the middle of a token to the middle of another.
        let text = tokenizer.decode_all(&rollout.ids).unwrap();
        let Some(at) = (0..text.len().saturating_sub(10)).find(|at| text.get(at + 5..at + 9).is_some()) else {
            continue;
        };
        let stop = [text[at + 5..at + 9].to_string()];
        let request = Request { first_sample: i as u64, samples: 1, stop: &stop, ..plain };
        let stopped = engine.run(&rig.model, &[request], &mut |_| ()).unwrap().remove(0);
        let text = tokenizer.decode_all(&stopped.ids).unwrap();
        assert_eq!(stopped.finish, Finish::Stop);
        assert!(rollout.ids.starts_with(&stopped.ids) && text.contains(&stop[0]));
        let shorter = tokenizer.decode_all(&stopped.ids[..stopped.ids.len() - 1]).unwrap();
        assert!(!shorter.contains(&stop[0]), "{shorter:?} holds {stop:?} already");
        let cut = before_stop(&text, &stop);
        assert!(text.starts_with(&format!("{cut}{}", stop[0])) && !cut.contains(&stop[0]));
        found += 1;
        across += usize::from(tokenizer.decode_all(&stopped.ids[stopped.ids.len() - 1..]).unwrap().len() < 4);
    }
    assert!(found > 5 && across > 0, "{found} stops, {across} of them across tokens");
}

#[test]
fn bad_requests_are_refused() {
    let rig = rig(Cpu::new(1).unwrap(), &model("gpt2"));
    let plain = Request::new(&[5, 9], 4, Sampling::plain(0));
    let with = |change: fn(&mut Sampling)| {
        let mut request = plain;
        change(&mut request.sampling);
        request
    };
    let stop = stops();
    for (request, part) in [
        (Request { prompt: &[], ..plain }, "--prompt: the prompt has no token"),
        (Request { prompt: &[523], ..plain }, "token 523 lies past the model's vocabulary of 523"),
        (Request { eos: &[600], ..plain }, "token 600 lies past"),
        (Request { max_new_tokens: 0, ..plain }, "--max-new-tokens: 0 tokens"),
        (Request { max_new_tokens: 159, ..plain }, "--max-new-tokens: 159 tokens after a prompt of 2"),
        (Request { stop: &stop, ..plain }, "--stop: stop strings are found in text"),
        (with(|s| s.temperature = -1.0), "--temperature: -1 is not 0 or more"),
        (with(|s| s.temperature = f64::NAN), "--temperature: NaN"),
        (with(|s| s.top_p = 0.0), "--top-p: 0 is not above 0"),
        (with(|s| s.min_p = 1.5), "--min-p: 1.5 is not from 0 to 1"),
        (with(|s| s.repetition_penalty = 0.0), "--repetition-penalty: 0 is not above 0"),
    ] {
        let message = generate(&rig.device, &rig.model, &request).unwrap_err().to_string();
        assert!(message.contains(part), "{message:?} lacks {part:?}");
    }
    let nothing = Request { samples: 0, ..plain };
    assert_eq!(generate(&rig.device, &rig.model, &nothing).unwrap(), []);
}

#[test]
fn memory_decides_how_many_run() {
    let tiny = model("llama");
    let (spec, prompts) = (&tiny.checkpoint.spec, prompts(64));
    let requests = requests(&prompts, &[]);
    let needs = |running| plan(cuvee::device::DType::F32, spec, 0, &requests, running).total();
    let fits = |bytes| max_running(cuvee::device::DType::F32, spec, 0, &requests, bytes);
    assert!(needs(1) < needs(2) && needs(64) < needs(100));
    for running in [1, 2, 17, 100] {
        assert_eq!(fits(needs(running)).unwrap(), running);
    }
    assert!(fits(needs(1) - 1).unwrap_err().to_string().contains("one completion takes"));
    assert_eq!(fits(1 << 40).unwrap(), 256);
}

// ---- blends of adapters ---------------------------------------------------------------------------------------

/// The model under two adapters, of which so much is applied.
fn under(name: &str, weights: [f64; 2]) -> Tiny {
    let tiny = model(name);
    let mut checkpoint = tiny.checkpoint.clone();
    for ((seed, rank), weight) in [(1, 3), (2, 1)].into_iter().zip(weights) {
        let dir = tiny.dir.path().join(format!("adapter-{seed}"));
        tiny::write_adapter(&tiny.checkpoint, &dir, rank, seed);
        checkpoint = checkpoint.with_adapter(&dir, weight).unwrap();
    }
    Tiny { checkpoint, ..tiny }
}

/// Eight blends, the base and each adapter alone among them; exact in f32.
fn blends() -> Vec<[f32; 2]> {
    (0..8)
        .map(|i| [[0.0, 0.0], [0.125, 0.0], [0.0, 0.25]].get(i).copied().unwrap_or([0.03125 * i as f32, -0.0625]))
        .collect()
}

#[test]
fn eight_blends_in_a_batch_are_what_each_is_alone_and_what_a_merged_model_gives() {
    for name in ["llama", "qwen3", "gpt2", "neox"] {
        let (whole, blends, prompts) = (rig(Cpu::new(2).unwrap(), &under(name, [1.0; 2])), blends(), prompts(8));
        let request = |i: usize, blend| {
            let seeded = Sampling { temperature: [1.0, 0.0][i % 2], ..Sampling::plain(i as u64) };
            Request { samples: 1 + i % 2, blend, ..Request::new(&prompts[i], 9, seeded) }
        };
        let requests: Vec<Request> = (0..8).map(|i| request(i, &blends[i][..])).collect();
        let engine = Engine::new(&whole.device);
        let together = run(&engine, &whole, &requests);
        assert_same("in turns", &run(&engine.with_max_running(3), &whole, &requests), &together);
        let mut texts = Vec::new();
        for (i, blend) in blends.iter().enumerate() {
            let mut alone = run(&engine, &whole, &requests[i..=i]);
            alone.iter_mut().for_each(|rollout| rollout.prompt = i);
            let expected: Vec<Rollout> = together.iter().filter(|rollout| rollout.prompt == i).cloned().collect();
            assert_same(&format!("{name}, blend {i} alone"), &alone, &expected);
            let merged = rig(Cpu::new(2).unwrap(), &under(name, blend.map(f64::from)));
            let merged = run(&Engine::new(&merged.device), &merged, &[request(i, &[])]);
            for (found, expected) in expected.iter().zip(&merged) {
                assert_eq!(found.ids, expected.ids, "{name}, blend {i}");
                let pairs = found.logps.iter().zip(&expected.logps);
                let far = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                assert!(far < 1e-5, "{name}, blend {i}: log-probabilities differ by {far}");
            }
            // One prompt and seed for all: the blend decides.
            texts.push(run(&engine, &whole, &[Request { blend, ..Request::new(&[5, 9], 30, Sampling::plain(1)) }]));
        }
        let logps: Vec<_> = texts.iter().map(|rollouts| rollouts[0].logps[0].to_bits()).collect();
        assert!((1..8).all(|i| !logps[..i].contains(&logps[i])), "{name}: every blend is another model");
    }
}

#[test]
fn weights_are_one_for_each_adapter_or_none() {
    let rig = rig(Cpu::new(1).unwrap(), &under("llama", [0.1; 2]));
    let engine = Engine::new(&rig.device);
    let ask =
        |blend| engine.run(&rig.model, &[Request { blend, ..Request::new(&[5], 4, Sampling::plain(1)) }], &mut |_| ());
    let error = ask(&[1.0]).unwrap_err().to_string();
    assert!(error.contains("1 weights for the 2 adapters"), "{error}");
    assert_same("1 of each", &ask(&[1.0, 1.0]).unwrap(), &ask(&[]).unwrap());
}

// ---- sessions -------------------------------------------------------------------------------------------------

/// Requests that come while others run, and some that are given up, leave the others as they are.
#[test]
fn requests_may_come_and_go_while_others_run() {
    let (rig, tokenizer) = (rig(Cpu::new(2).unwrap(), &under("llama", [1.0; 2])), tokenizer());
    let (prompts, stop, blends) = (prompts(24), stops(), blends());
    let mut requests = requests(&prompts, &stop);
    requests.iter_mut().enumerate().for_each(|(i, request)| request.blend = &blends[i % 8]);
    let engine = Engine::new(&rig.device).with_tokenizer(&tokenizer);
    let alone: Vec<Vec<Rollout>> = requests.iter().map(|request| run(&engine, &rig, &[*request])).collect();
    for (running, tokens, every) in [(64, 4000, 1), (5, 400, 2), (2, 120, 3)] {
        let size = Room::within(&rig.model.spec, &Limits { running, context: 100, tokens, adapters: 2 });
        let mut session = engine.session(&rig.model, size).unwrap();
        let (mut steps, mut given_up, mut ended) = (0, Vec::new(), Vec::new());
        let mut come = requests.iter();
        loop {
            if steps % every == 0 {
                come.by_ref().take(2).for_each(|request| assert!(session.push(*request).is_ok()));
            }
            if steps % 7 == 5 && given_up.len() < 4 {
                let key = steps * 5 % 24;
                session.cancel(key);
                given_up.push(key);
            }
            let mut seen = 0;
            let goes_on = session.step(&mut |event| match event {
                Event::Token(_) => seen += 1,
                Event::Ended(rollout) => ended.push(rollout),
                _ => panic!("nobody asked for scores, and nothing fails"),
            });
            assert!(seen <= running);
            steps += 1;
            if !goes_on.unwrap() && come.len() == 0 {
                break;
            }
        }
        assert_eq!(session.load(), [0; 3], "all room is free again");
        for (key, expected) in alone.iter().enumerate() {
            let mut found: Vec<Rollout> = ended.iter().filter(|rollout| rollout.prompt == key).cloned().collect();
            found.sort_by_key(|rollout| rollout.sample);
            found.iter_mut().for_each(|rollout| rollout.prompt = 0);
            if given_up.contains(&key) {
                assert!(found.iter().all(|rollout| *rollout == expected[rollout.sample]));
            } else {
                assert_same(&format!("{running} at a time, request {key}"), &found, expected);
            }
        }
        let counts = [given_up.len(), ended.len()];
        assert!(counts[0] > 2 && counts[1] > 24, "some are given up, most are not: {counts:?}");
    }
}

#[test]
fn what_can_never_run_is_refused() {
    let rig = rig(Cpu::new(1).unwrap(), &model("llama"));
    let engine = Engine::new(&rig.device);
    let size = Room::within(&rig.model.spec, &Limits { running: 2, context: 20, tokens: 20, adapters: 0 });
    let mut session = engine.session(&rig.model, size).unwrap();
    let prompt = [1; 10];
    let mut push = |prompt, new| session.push(Request::new(prompt, new, Sampling::plain(1)));
    assert!(push(&prompt[..], 10).is_ok());
    let error = push(&prompt[..], 11).unwrap_err().to_string();
    assert!(error.contains("11 tokens after a prompt of 10, and there is room for 20"), "{error}");
    assert!(push(&[][..], 1).unwrap_err().to_string().contains("no token"));
}

/// Bit for bit what scoring the sequence gives, however few rows are read at a time.
#[test]
fn a_prompt_is_scored_as_sequences_are() {
    let prompts = prompts(6);
    for tiny in [model("llama"), model("gpt2")] {
        let mut rig = rig(Cpu::new(2).unwrap(), &tiny);
        for running in [1, 3, 64] {
            let size = Room::within(&rig.model.spec, &Limits { running, context: 100, tokens: 400, adapters: 0 });
            let engine = Engine::new(&rig.device);
            let mut session = engine.session(&rig.model, size).unwrap();
            for prompt in &prompts {
                let scored = Request {
                    score_prompt: true,
                    alternatives: 3,
                    samples: 2,
                    ..Request::new(prompt, 2, Sampling::greedy())
                };
                session.push(scored).unwrap();
            }
            let (mut found, mut drawn) = (vec![None; prompts.len()], Vec::new());
            while session
                .step(&mut |event| match event {
                    Event::Prompt(key, scores) => assert!(found[key].replace(scores).is_none(), "scored once"),
                    Event::Ended(rollout) => drawn.push(rollout),
                    _ => {}
                })
                .unwrap()
            {}
            drop(session);
            for rollout in drawn {
                for ((id, logp), others) in rollout.ids.iter().zip(&rollout.logps).zip(&rollout.alternatives) {
                    assert_eq!((others[0], others.len()), ((*id, *logp), 3), "the likeliest was drawn");
                    assert!(others.is_sorted_by(|a, b| a.1 >= b.1));
                }
            }
            for (prompt, scores) in prompts.iter().zip(found) {
                let (scores, first) = (scores.expect("every prompt is scored"), &prompt[..1]);
                if prompt.len() == 1 {
                    assert!(scores.logps.is_empty());
                    continue;
                }
                let sequence = Rollout {
                    prompt: 0,
                    sample: 0,
                    ids: prompt[1..].to_vec(),
                    logps: Vec::new(),
                    sampled_logps: Vec::new(),
                    alternatives: Vec::new(),
                    finish: Finish::Length,
                };
                let expected = scored(&mut rig, &[Request::new(first, 1, Sampling::greedy())], &sequence);
                let found: Vec<f64> = scores.logps.iter().map(|logp| f64::from(*logp)).collect();
                assert_eq!(found, expected, "{}: {running} rows at a time", tiny.name);
                for ((logp, others), id) in scores.logps.iter().zip(&scores.alternatives).zip(&prompt[1..]) {
                    let told = others.iter().find(|(other, _)| other == id);
                    assert!(told.map_or(*logp <= others[2].1, |(_, told)| told == logp));
                }
            }
        }
    }
}
