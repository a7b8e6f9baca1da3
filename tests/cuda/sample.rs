//! Tokens drawn on the GPU are those drawn on the CPU, whatever the vocabulary, temperature and nucleus.

use cuvee::device::{Arena, Cpu, Cuda, Kind, Philox};
use cuvee::ops::Backend;
use cuvee::ops::sample::{Args, DRAW, Sampling, draw, tokens};

use crate::Case;

const ROWS: usize = 3;
const VOCABULARIES: [usize; 5] = [1, 31, 123, 507, 8003];

/// What the device draws from rows of these logits.
fn drawn<B: Backend>(device: &B, logits: &[f32], vocab: usize, sampling: Sampling) -> Vec<u32> {
    let bytes = Arena::<B>::bytes_of(cuvee::device::DType::F32, ROWS, vocab) + (2 << 10);
    let mut arena = Arena::with_bytes(device, bytes).unwrap();
    let mut tensor = arena.floats(Kind::Activations, ROWS, vocab);
    let (mut draws, mut ids) =
        (arena.indices(Kind::Activations, ROWS, DRAW), arena.indices(Kind::Activations, ROWS, 1));
    let numbers: Vec<u32> = (0..ROWS as u32).flat_map(|row| draw(u64::from(row) << 33 | 5, 7 * row)).collect();
    device.write_f32(logits, tensor.view_mut()).unwrap();
    device.write_u32(&numbers, draws.view_mut()).unwrap();
    let (logits, draws) = (tensor.view_mut(), draws.view());
    device.sample(Args { logits, sampling, draws, ids: ids.view_mut() }).unwrap();
    let mut found = vec![0; ROWS];
    device.read_u32(ids.view(), &mut found).unwrap();
    found
}

fn draws_as_the_cpu(cuda: &Cuda) {
    let cpu = Cpu::new(1).unwrap();
    let mut chosen = Vec::new();
    for vocab in VOCABULARIES {
        let random = Philox::new(3, vocab as u64);
        // Rounded to quarters, so that many are equal.
        let logit = |i: usize| (4.0 * 2.0 * random.normal(i as u64) as f32).round() / 4.0;
        let logits: Vec<f32> = (0..ROWS * vocab).map(logit).collect();
        for (temperature, top_p) in [(0.0, 1.0), (1.0, 1.0), (0.7, 0.9), (1.5, 0.3), (1.0, 1e-9)] {
            let sampling = Sampling { temperature, top_p, seed: 11 };
            let found = drawn(cuda, &logits, vocab, sampling);
            assert_eq!(found, drawn(&cpu, &logits, vocab, sampling), "{vocab} tokens, {sampling:?}");
            assert!(tokens(&found).unwrap().iter().all(|id| (*id as usize) < vocab));
            chosen.extend(found);
        }
    }
    chosen.sort_unstable();
    chosen.dedup();
    assert!(chosen.len() > 20, "draws that differ: {chosen:?}");
}

fn names_what_is_no_number(cuda: &Cuda) {
    for (bad, word) in [(f32::NAN, "NaN"), (f32::INFINITY, "infinite")] {
        let mut logits = vec![0.5; ROWS * 507];
        logits[507 + 300] = bad;
        let sampling = Sampling { temperature: 1.0, top_p: 0.9, seed: 11 };
        let why = tokens(&drawn(cuda, &logits, 507, sampling)).unwrap_err().to_string();
        assert!(why.contains("token 300 in row 1") && why.contains(word), "{why}");
    }
}

pub fn all() -> Vec<Case> {
    let f32 = cuvee::device::DType::F32;
    vec![Case::new("sample::cpu", f32, draws_as_the_cpu), Case::new("sample::bad_logits", f32, names_what_is_no_number)]
}
