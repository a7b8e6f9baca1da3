//! Tokens drawn on the GPU are those drawn on the CPU, whatever the vocabulary, temperature, thresholds and edits.

use cuvee::device::{Arena, Cpu, Cuda, Kind, Philox};
use cuvee::ops::Backend;
use cuvee::ops::sample::{Args, BANNED, ODDS, Row, Sampling, tokens};

use crate::Case;

const ROWS: usize = 3;
const VOCABULARIES: [usize; 5] = [1, 31, 123, 507, 8003];

/// What the device draws from rows of these logits, every row with `edits`, and the odds; the logits stay what they were.
fn drawn<B: Backend>(
    device: &B,
    logits: &[f32],
    vocab: usize,
    sampling: Sampling,
    edits: &[u32],
) -> (Vec<u32>, Vec<u32>) {
    let bytes = Arena::<B>::bytes_of(cuvee::device::DType::F32, ROWS, vocab) + (64 << 10);
    let mut arena = Arena::with_bytes(device, bytes).unwrap();
    let mut tensor = arena.floats(Kind::Activations, ROWS, vocab);
    let mut index = |rows, cols| arena.indices(Kind::Activations, rows, cols);
    let (mut rows, mut all_edits) = (index(ROWS, Row::WORDS), index(ROWS * edits.len(), 1));
    let (mut ids, mut odds) = (index(ROWS, 1), index(ROWS, ODDS));
    let mut saved = arena.floats(Kind::Activations, ROWS * edits.len(), 1);
    // Row 1 has no edits where the others have some.
    let row = |row: usize| {
        let of_row = if row == 1 { 0 } else { edits.len() };
        sampling.row((row as u64) << 33 | 5, 7 * row as u32, row * edits.len(), of_row)
    };
    let how: Vec<Row> = (0..ROWS).map(row).collect();
    device.write_f32(logits, tensor.view_mut()).unwrap();
    device.write_u32(bytemuck::cast_slice(&how), rows.view_mut()).unwrap();
    device.write_u32(&edits.repeat(ROWS), all_edits.view_mut()).unwrap();
    let (logits_view, saved, edits) = (tensor.view_mut(), saved.view_mut(), all_edits.view());
    let (rows, [ids_out, odds_out]) = (rows.view(), [ids.view_mut(), odds.view_mut()]);
    device.sample(Args { logits: logits_view, rows, edits, saved, ids: ids_out, odds: odds_out }).unwrap();
    let (mut found, mut chances, mut after) = (vec![0; ROWS], vec![0; ROWS * ODDS], vec![0.0; logits.len()]);
    device.read_u32(ids.view(), &mut found).unwrap();
    device.read_u32(odds.view(), &mut chances).unwrap();
    device.read_f32(tensor.view(), &mut after).unwrap();
    assert!(after.iter().zip(logits).all(|(a, b)| a.to_bits() == b.to_bits()), "the logits are others now");
    (found, chances)
}

fn draws_as_the_cpu(cuda: &Cuda) {
    let cpu = Cpu::new(1).unwrap();
    let mut chosen = Vec::new();
    for vocab in VOCABULARIES {
        let random = Philox::new(3, vocab as u64);
        // Rounded to quarters, so that many are equal.
        let logit = |i: usize| (4.0 * 2.0 * random.normal(i as u64) as f32).round() / 4.0;
        let logits: Vec<f32> = (0..ROWS * vocab).map(logit).collect();
        let edits: Vec<u32> =
            (0..vocab as u32).step_by(5).map(|id| id | if id % 2 == 0 { BANNED } else { 0 }).collect();
        for (temperature, top_k, top_p, min_p, edits) in [
            (0.0, 0, 1.0, 0.0, &[][..]),
            (1.0, 0, 1.0, 0.0, &[]),
            (0.7, 0, 0.9, 0.0, &[]),
            (1.5, 0, 0.3, 0.0, &[]),
            (1.0, 0, 1e-9, 0.0, &[]),
            (1.2, 9, 1.0, 0.0, &[]),
            (1.5, 40, 0.8, 0.05, &[]),
            (0.9, 0, 1.0, 0.1, &[]),
            (0.0, 0, 1.0, 0.0, &edits),
            (1.3, 20, 0.95, 0.01, &edits),
        ] {
            let sampling = Sampling { temperature, top_k, top_p, min_p, repetition_penalty: 1.7, seed: 11 };
            let found = drawn(cuda, &logits, vocab, sampling, edits);
            let expected = drawn(&cpu, &logits, vocab, sampling, edits);
            assert_eq!(found, expected, "{vocab} tokens, {} edits, {sampling:?}", edits.len());
            assert!(tokens(&found.0).unwrap().iter().all(|id| (*id as usize) < vocab));
            chosen.extend(found.0);
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
        let sampling = Sampling { top_p: 0.9, ..Sampling::plain(11) };
        let why = tokens(&drawn(cuda, &logits, 507, sampling, &[300 | BANNED]).0).unwrap_err().to_string();
        assert!(why.contains("token 300 in row 1") && why.contains(word), "{why}");
    }
}

pub fn all() -> Vec<Case> {
    let f32 = cuvee::device::DType::F32;
    vec![Case::new("sample::cpu", f32, draws_as_the_cpu), Case::new("sample::bad_logits", f32, names_what_is_no_number)]
}
