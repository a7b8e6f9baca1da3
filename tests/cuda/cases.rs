//! Every op on the GPU against the f64 reference, with all that ops promise, in f32 and in bf16.

use std::env;

use cuvee::device::cuda::Options;
use cuvee::device::{Cuda, DType, Device};

use crate::common::case::{Case as OpCase, refusal, specs_on};
use crate::common::checks::{
    compare, flops, nan_surfaces, same_again, same_elsewhere, same_for_some_rows, twice_is_double, unwanted_stay,
    wrong_shapes_are_refused,
};
use crate::common::ops::head::{Head, HeadBackward};
use crate::common::ops::token_kl::{TokenKl, TokenKlBackward};
use crate::common::ops::{self, Visitor, activations, attention, head, norms, rope, token_kl, updates};
use crate::{Case, Mode, WITH_CUBLASLT};

/// Largest case in FLOPs. The emulator makes less than 10^9 a second, a fifth of that where it looks for races.
const MOST_FLOPS: u64 = 1 << 28;
const MOST_FLOPS_WATCHED: u64 = 1 << 25;

const STORAGES: [(&str, DType); 2] = [("f32", DType::F32), ("bf16", DType::Bf16)];

/// Ops with products, which cuBLASLt may make.
const PRODUCTS: [&str; 7] = [
    "linear",
    "linear_backward",
    "low_rank",
    "low_rank_backward",
    "logprob_head",
    "logprob_head_backward",
    "token_kl_backward",
];

/// Asks all of the first run. Of the others, which differ in the order of threads or in what watches them, it asks that
/// results are close and repeat, on cases of a moderate size.
struct OnCuda<'a> {
    cuda: &'a Cuda,
    all: bool,
    most_flops: u64,
}

impl<'a> OnCuda<'a> {
    fn new(cuda: &'a Cuda) -> Self {
        let first = env::var("CUVEE_EMULATOR_SEED").is_ok_and(|seed| seed == "0");
        let all = match Mode::current() {
            Mode::Plain => first,
            Mode::Real => env::var("CUVEE_CUDA_REAL").is_ok_and(|how| how != "watched"),
            Mode::Race | Mode::Asan => false,
        };
        Self { cuda, all, most_flops: if all { MOST_FLOPS } else { MOST_FLOPS_WATCHED } }
    }

    /// cuBLASLt's kernel, and with it the order of its sums, depends on the number of rows and on alignment.
    fn has_one_order(&self) -> bool {
        !self.cuda.arithmetic().ends_with("cublaslt")
    }

    fn takes<C: OpCase>(&self, case: &C) -> bool {
        flops(self.storage(), case) <= self.most_flops
    }
}

impl Visitor for OnCuda<'_> {
    fn storage(&self) -> DType {
        self.cuda.storage()
    }

    fn close<C: OpCase>(&mut self, case: &C) {
        if self.takes(case) {
            compare(self.cuda, case);
        }
    }

    fn repeatable<C: OpCase>(&mut self, case: &C) {
        if self.takes(case) {
            same_again(self.cuda, case);
            if self.has_one_order() {
                same_elsewhere(self.cuda, case);
            }
        }
    }

    fn rows<C: OpCase>(&mut self, case: &C) {
        if self.all && self.has_one_order() {
            same_for_some_rows(self.cuda, case);
        }
    }

    fn twice<C: OpCase>(&mut self, case: &C) {
        if self.all {
            twice_is_double(self.cuda, case);
        }
    }

    fn unwanted<C: OpCase>(&mut self, all: &C, some: &C, optional: &[&str], wanted: &[bool]) {
        if self.all {
            unwanted_stay(self.cuda, all, some, optional, wanted);
        }
    }

    fn nan<C: OpCase>(&mut self, case: &C) {
        if self.all {
            nan_surfaces(self.cuda, case);
        }
    }

    fn shapes<C: OpCase>(&mut self, case: &C) {
        if self.all {
            wrong_shapes_are_refused(self.cuda, case);
        }
    }
}

/// All cases of an op.
fn op(cuda: &Cuda, name: &str) {
    let mut visitor = OnCuda::new(cuda);
    let all = ops::all::<OnCuda>();
    let (_, visit) = all.iter().find(|(found, _)| *found == name).expect("listed");
    visit(&mut visitor);
}

fn with_workspace(storage: DType, workspace_bytes: usize) -> Cuda {
    Cuda::open(&Options { workspace_bytes, ..Options::new(0, storage) }).unwrap_or_else(|e| panic!("{e}"))
}

fn needs_more_workspace<C: OpCase>(cuda: &Cuda, case: &C) {
    let why = refusal(&with_workspace(cuda.storage(), 1 << 10), case, &specs_on(cuda, case)).map(|e| e.to_string());
    assert!(why.as_ref().is_some_and(|why| why.contains("bytes of workspace")), "{why:?}");
}

/// The head works through rows in chunks where the workspace does not hold what all need: here one tile of rows, then less.
fn head_in_a_small_workspace(cuda: &Cuda) {
    let with = |workspace_bytes| with_workspace(cuda.storage(), workspace_bytes);
    let (forward, backward) = (Head::new([200, 31, 5003]), HeadBackward::full([200, 31, 5003]));
    for workspace_bytes in [12 << 10, 5 << 10] {
        compare(&with(workspace_bytes), &forward);
    }
    for workspace_bytes in [9 << 18, 9 << 17] {
        compare(&with(workspace_bytes), &backward);
    }
    needs_more_workspace(cuda, &backward);
}

/// So does the KL, whose rows take 17 KB each, backward up to 41 KB.
fn token_kl_in_a_small_workspace(cuda: &Cuda) {
    let forward = TokenKl { rows: 200, vocab: 5003, hidden: &[8, 9, 5], scale: 1.0 };
    let backward = TokenKlBackward::full(forward);
    for workspace_bytes in [3 << 20, 1 << 20] {
        compare(&with_workspace(cuda.storage(), workspace_bytes), &forward);
    }
    for workspace_bytes in [8 << 20, 2 << 20] {
        compare(&with_workspace(cuda.storage(), workspace_bytes), &backward);
    }
    needs_more_workspace(cuda, &forward);
    needs_more_workspace(cuda, &backward);
}

/// Name, storage types, test.
type Promise = (&'static str, &'static [(&'static str, DType)], fn(&Cuda));

/// Single promises of single ops. The first are stated in numbers that bf16 does not hold.
fn special() -> Vec<Promise> {
    let f32_only = &STORAGES[..1];
    vec![
        ("rms_norm::zero_row", f32_only, norms::rms_norm_of_a_zero_row_is_finite),
        ("layer_norm::large_mean", f32_only, norms::layer_norm_bears_a_large_mean_and_a_constant_row),
        ("swiglu::saturation", f32_only, activations::swiglu_saturates_without_nan),
        ("gelu::values", f32_only, activations::gelu_has_the_values_of_others_and_saturates_without_nan),
        ("logprob_head::extreme_logits", f32_only, head::logprob_head_takes_extreme_logits),
        ("logprob_head::sum", f32_only, head::logprob_head_backward_sums_to_zero_over_the_vocabulary),
        ("logprob_head::workspace", &STORAGES, head_in_a_small_workspace),
        ("token_kl::same_distribution", &STORAGES, token_kl::token_kl_to_the_same_distribution_is_zero),
        ("token_kl::zero_probabilities", f32_only, token_kl::token_kl_takes_probabilities_of_zero),
        ("token_kl::sum", f32_only, token_kl::token_kl_backward_sums_to_zero_over_the_vocabulary),
        ("token_kl::workspace", &STORAGES, token_kl_in_a_small_workspace),
        ("sum_squares::overflow", f32_only, updates::sum_squares_overflow),
        ("merged_update::promises", f32_only, updates::merged_update_promises),
        ("merged_update::threshold", f32_only, updates::on_ties_keeps_the_largest),
        ("merged_update::rounding", f32_only, updates::stochastic_rounding_keeps_small_steps),
        ("rope::nan", &STORAGES, rope::rope_keeps_a_nan_in_its_pair),
        ("attention::heads", &STORAGES, attention::attention_refuses_heads_that_share_unevenly),
        (
            "attention::shared_prefix",
            &STORAGES,
            attention::attention_over_a_shared_prefix_has_the_bits_of_the_unrolled_sequence,
        ),
        ("attention::decoding", &STORAGES, attention::attention_of_a_decoding_step_has_the_bits_of_the_whole_sequence),
        ("attention::extreme_scores", &STORAGES, attention::attention_takes_extreme_scores),
        ("attention::nan", &STORAGES, attention::attention_keeps_what_is_broken_to_those_who_see_it),
        ("ops::no_rows", &STORAGES, ops::no_rows_are_no_work),
    ]
}

pub fn all() -> Vec<Case> {
    let names: Vec<&str> = ops::all::<OnCuda>().into_iter().map(|(name, _)| name).collect();
    let mut cases = Vec::new();
    for (storage, dtype) in STORAGES {
        cases.extend(
            names
                .iter()
                .copied()
                .map(|name| Case::new(format!("{name}::{storage}"), dtype, move |cuda| op(cuda, name))),
        );
    }
    for (storage, dtype) in STORAGES {
        cases.extend(PRODUCTS.map(|name| Case {
            modes: &[Mode::Plain, Mode::Real],
            ..Case::new(format!("{WITH_CUBLASLT}{name}::{storage}"), dtype, move |cuda| op(cuda, name))
        }));
    }
    for (name, storages, run) in special() {
        cases.extend(storages.iter().map(|(storage, dtype)| Case {
            modes: &[Mode::Plain, Mode::Real],
            ..Case::new(format!("{name}::{storage}"), *dtype, run)
        }));
    }
    cases
}
