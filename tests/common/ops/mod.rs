//! Every op as cases: each awkward shape at least once, and which promises are checked on which of them. Who visits decides
//! how, and on which device.

use cuvee::device::{DType, Philox};

use cuvee::ops::Backend;

use super::case::{Case, Role, run, specs_on};

/// The tensors of a case by name; fails when the case and its specs drifted apart.
macro_rules! tensors {
    ($t:ident => $($name:ident),+) => {
        let [$($name),+] = $t else { panic!("another number of tensors than the case has specs") };
    };
}

pub mod activations;
pub mod attention;
pub mod head;
pub mod linear;
pub mod low_rank;
pub mod norms;
pub mod rope;
pub mod rows;
pub mod token_kl;
pub mod updates;

/// What is asked of the cases of an op.
pub trait Visitor {
    /// What the device keeps activations in.
    fn storage(&self) -> DType {
        DType::F32
    }

    /// Every output is as close to the oracle as the closeness rule asks.
    fn close<C: Case>(&mut self, _: &C) {}
    /// The same bits, however often and wherever it is run.
    fn repeatable<C: Case>(&mut self, _: &C) {}
    /// No row depends on its neighbours.
    fn rows<C: Case>(&mut self, _: &C) {}
    /// `+=` adds, `=` does not.
    fn twice<C: Case>(&mut self, _: &C) {}
    /// Gradients that are not wanted stay: `wanted[i]` belongs to the output `optional[i]`.
    fn unwanted<C: Case>(&mut self, _all: &C, _some: &C, _optional: &[&str], _wanted: &[bool]) {}
    /// A NaN comes out exactly where the oracle has one.
    fn nan<C: Case>(&mut self, _: &C) {}
    /// Tensors that do not fit each other are refused.
    fn shapes<C: Case>(&mut self, _: &C) {}
}

/// Visits the cases of one op.
pub type Visit<V> = fn(&mut V);

pub fn all<V: Visitor>() -> Vec<(&'static str, Visit<V>)> {
    vec![
        ("linear", linear::forward),
        ("linear_backward", linear::backward),
        ("low_rank", low_rank::forward),
        ("low_rank_backward", low_rank::backward),
        ("rms_norm", norms::rms_norm),
        ("rms_norm_backward", norms::rms_norm_backward),
        ("layer_norm", norms::layer_norm),
        ("layer_norm_backward", norms::layer_norm_backward),
        ("swiglu", activations::swiglu),
        ("swiglu_backward", activations::swiglu_backward),
        ("gelu", activations::gelu),
        ("gelu_backward", activations::gelu_backward),
        ("rope", rope::rope),
        ("gather", rows::gather),
        ("gather_add", rows::gather_add),
        ("gather_backward", rows::gather_backward),
        ("scatter", rows::scatter),
        ("sum_squares", updates::sum_squares),
        ("merged_update", updates::merged_update),
        ("lerp", updates::lerp),
        ("logprob_head", head::forward),
        ("logprob_head_backward", head::backward),
        ("token_kl", token_kl::forward),
        ("token_kl_backward", token_kl::backward),
        ("attention", attention::forward),
        ("attention_backward", attention::backward),
    ]
}

/// `len` random indices.
fn below(name: &str, len: usize, bound: usize) -> Vec<u32> {
    let random = Philox::named(7, name);
    (0..len).map(|i| (random.u64(i as u64) % bound as u64) as u32).collect()
}

/// A micro-batch may be empty: nothing is written, nothing panics.
pub fn no_rows_are_no_work<D: Backend>(device: &D) {
    fn check<D: Backend, C: Case>(device: &D, case: &C) {
        let specs = specs_on(device, case);
        let values = run(device, case, &specs);
        for (spec, values) in specs.iter().zip(&values).filter(|(spec, _)| spec.role == Role::Add) {
            assert!(*values == spec.values, "{}: {} changes", case.op(), spec.name);
        }
    }
    check(device, &linear::Linear::full([0, 31, 5]));
    check(device, &linear::LinearBackward::full([0, 31, 5]));
    check(device, &low_rank::LowRank { shape: [0, 31, 5, 2], scale: 2.0 });
    check(device, &low_rank::LowRankBackward::full([0, 31, 5, 2], 2.0));
    check(device, &norms::RmsNorm([0, 31]));
    check(device, &norms::RmsNormBackward::full([0, 31]));
    check(device, &norms::LayerNorm([0, 31]));
    check(device, &norms::LayerNormBackward::full([0, 31]));
    check(device, &activations::SwiGlu([0, 31]));
    let gather = rows::Gather { n: 5, rows: 0, cols: 3 };
    check(device, &gather);
    check(device, &rows::GatherBackward { gather, of_weights: true });
    check(device, &attention::Attention { dims: attention::dims(2, 1, 4, None), segments: Vec::new() });
}
