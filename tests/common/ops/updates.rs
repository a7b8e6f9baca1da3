//! See src/ops/sum_squares, src/ops/merged_update and src/ops/lerp.

use cuvee::Result;
use cuvee::device::{Arena, DType, Kind, Philox};
use cuvee::ops::merged_update::{self, Adam, Consensus, DareVariant, Form, Purpose, Rounding, Rule, Step};
use cuvee::ops::{Backend, lerp, sum_squares};

use super::Visitor;
use crate::common::case::{Case, Slot, Spec, normals, output_of, put, refusal, run, slots, specs_on, zero};
use crate::common::checks::assert_same_bits;

pub struct SumSquares(pub [usize; 2]);

impl Case for SumSquares {
    fn op(&self) -> &'static str {
        "sum_squares"
    }

    fn specs(&self) -> Vec<Spec> {
        vec![Spec::input("x", self.0).always_f32(), Spec::set("sum", [1, 1]).always_f32()]
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        tensors!(t => x, sum);
        device.sum_squares(sum_squares::Args { x: x.view(), sum: sum.view_mut() })
    }

    fn naive(&self, _: &[Spec], t: &mut [Vec<f32>]) {
        tensors!(t => x, sum);
        sum[0] = x.iter().fold(0.0, |sum, x| sum + x * x);
    }
}

/// What a weight is kept in.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Kept {
    /// f32
    Wide,
    /// bf16 that is rounded from an f32 master
    Master,
    /// f32 beside an f32 master
    Beside,
    /// bf16 alone
    Narrow,
}

#[derive(Clone, Copy)]
pub struct Update {
    pub shape: [usize; 2],
    pub step: Step,
    pub kept: Kept,
    pub since_merge: bool,
    pub tau_ref: Option<DType>,
}

pub const ADAM: Adam = Adam { beta1: 0.9, beta2: 0.999, eps: 1e-8, form: Form::Torch };
pub const HUGGING_FACE: Form = Form::HuggingFace { correct_bias: true };
pub const ON_DARE: Rule =
    Rule::OnDare { reserve_rate: 0.3, merge_weight: 0.2, variant: DareVariant::Released, rescale: false, clip: 1.0 };
pub const ON_TIES: Rule =
    Rule::OnTies { reserve_rate: 0.3, merge_weight: 0.2, consensus: Consensus::BeforeWeight, rescale: false };

impl Update {
    /// Of an f32 weight, at a rate so large that the update, not the weight, is what is compared.
    pub fn at(shape: [usize; 2], step: u64) -> Self {
        let step = Step {
            adam: ADAM,
            rule: Rule::Adam,
            step,
            learning_rate: 0.5,
            weight_decay: 0.1,
            clip: 0.3,
            gradient_reserve_rate: 1.0,
            merges: true,
            share: 0.0,
            rounding: Rounding::Nearest,
            random: Philox::named(3, "a weight"),
        };
        Self { shape, step, kept: Kept::Wide, since_merge: false, tau_ref: None }
    }

    /// In the form that the authors' code has, merging with a task vector.
    pub fn merging(shape: [usize; 2], step: u64, rule: Rule) -> Self {
        let plain = Self::at(shape, step);
        let adam = Adam { form: HUGGING_FACE, ..ADAM };
        Self { step: Step { adam, rule, ..plain.step }, tau_ref: Some(DType::Bf16), ..plain }
    }

    pub fn stochastic(self) -> Self {
        Self { step: Step { rounding: Rounding::Stochastic, ..self.step }, ..self }
    }

    fn has_average(&self) -> bool {
        matches!(self.step.rule, Rule::Ema { .. })
    }

    fn has_scratch(&self) -> bool {
        self.step.merges && self.step.rule.scratch(self.shape[0] * self.shape[1]) > 0
    }

    /// Whether an element is kept: a word for each, of a counter of step, purpose and four elements.
    fn keeps(&self, purpose: Purpose, reserve_rate: f64, i: usize) -> bool {
        let counter = self.step.step << 34 | (purpose as u64) << 32 | (i / 4) as u64;
        let word = self.step.random.words(counter)[i % 4];
        f64::from(word) < (reserve_rate * (1u64 << 32) as f64).floor()
    }

    /// What is added of the update `x` and of `tau_ref`, left to right in f32.
    fn merged(&self, x: &[f32], tau_ref: &[f32]) -> Vec<f32> {
        let indices = 0..x.len();
        match self.step.rule {
            _ if !self.step.merges => x.to_vec(),
            Rule::Adam | Rule::Ema { .. } => x.to_vec(),
            Rule::OnDare { reserve_rate: p, merge_weight: a, variant, rescale, clip } => {
                let released = variant == DareVariant::Released;
                let scale = if released { p as f32 } else { 1.0 };
                let keep = |i| if self.keeps(Purpose::Update, p, i) { x[i] / scale } else { 0.0 };
                let mut kept: Vec<f32> = indices.clone().map(keep).collect();
                if rescale {
                    let factor = magnitudes(x) / (magnitudes(&kept) + self.step.adam.eps as f32);
                    kept.iter_mut().for_each(|x| *x = (*x * factor).clamp(-clip as f32, clip as f32));
                }
                let pulls = |i| !released && self.keeps(Purpose::TauRef, p, i);
                let sum = |i| (1.0 - a as f32) * kept[i] + if pulls(i) { a as f32 * tau_ref[i] } else { 0.0 };
                indices.map(sum).collect()
            }
            Rule::OnTies { reserve_rate: p, merge_weight: a, consensus, rescale } => {
                let count = (p * x.len() as f64) as usize;
                let mut kept = x.to_vec();
                if p < 1.0 && count > 0 {
                    let mut sorted: Vec<f32> = x.iter().map(|x| x.abs()).collect();
                    sorted.sort_by(|a, b| b.total_cmp(a));
                    kept.iter_mut().filter(|x| x.abs() < sorted[count - 1]).for_each(|x| *x = 0.0);
                    let factor = if rescale { magnitudes(x) / magnitudes(&kept) } else { 1.0 };
                    kept.iter_mut().for_each(|x| *x *= factor);
                }
                let (own, other) = (1.0 - a as f32, a as f32);
                let sum = |i: usize| {
                    let (x, tau_ref): (f32, f32) = (kept[i], tau_ref[i]);
                    if consensus == Consensus::BeforeWeight {
                        let elected = if tau_ref + x >= 0.0 { 1.0 } else { -1.0 };
                        let of = |x: f32| if x * elected < 0.0 { 0.0 } else { x };
                        return own * of(x) + other * of(tau_ref);
                    }
                    let (x, y) = (own * x, other * tau_ref);
                    let larger = |x: f32, y: f32| if x.abs() >= y.abs() { x } else { 0.0 };
                    if x * y < 0.0 { larger(x, y) + larger(y, x) } else { x + y }
                };
                indices.map(sum).collect()
            }
        }
    }
}

fn magnitudes(x: &[f32]) -> f32 {
    x.iter().map(|x| x.abs()).sum()
}

impl Case for Update {
    fn op(&self) -> &'static str {
        "merged_update"
    }

    /// The weight in full comes first: the master where there is one.
    fn specs(&self) -> Vec<Spec> {
        let full = Spec::in_place("weight", self.shape);
        let of = |there: bool, spec: fn(&'static str, [usize; 2]) -> Spec, name| there.then(|| spec(name, self.shape));
        let beside = of(matches!(self.kept, Kept::Master | Kept::Beside), Spec::set, "beside");
        let len = self.shape[0] * self.shape[1];
        let specs = [
            Some(if self.kept == Kept::Narrow { full.always(DType::Bf16) } else { full.always_f32() }),
            Some(Spec::input("grad", self.shape)),
            Some(Spec::in_place("first_moment", self.shape)),
            Some(Spec::in_place("second_moment", self.shape).map(|x| x * x + 0.1)),
            beside.map(|spec| if self.kept == Kept::Master { spec.always(DType::Bf16) } else { spec }),
            of(self.since_merge, Spec::in_place, "since_merge"),
            of(self.has_average(), Spec::in_place, "average"),
            self.tau_ref.map(|dtype| Spec::input("tau_ref", self.shape).always(dtype)),
        ];
        let scratch = self.has_scratch().then(|| Spec::scratch("scratch", [len, 1]));
        specs.into_iter().flatten().map(|spec| spec.always_f32().per_row()).chain(scratch).collect()
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        let mut t = t.iter_mut();
        let mut next = || t.next().expect("as many as there are specs");
        let full = next().view_mut();
        let (grad, first_moment, second_moment) = (next().view(), next().view_mut(), next().view_mut());
        let (weight, master) = match self.kept {
            Kept::Wide | Kept::Narrow => (full, None),
            Kept::Master | Kept::Beside => (next().view_mut(), Some(full)),
        };
        device.merged_update(merged_update::Args {
            step: self.step,
            grad,
            weight,
            master,
            first_moment,
            second_moment,
            since_merge: self.since_merge.then(|| next().view_mut()),
            average: self.has_average().then(|| next().view_mut()),
            tau_ref: self.tau_ref.map(|_| next().view()),
            scratch: self.has_scratch().then(|| next().view_mut()),
            lost: None,
        })
    }

    fn naive(&self, specs: &[Spec], t: &mut [Vec<f32>]) {
        let at = |name: &str| specs.iter().position(|spec| spec.name == name);
        let [weight, grad, m, v, others @ ..] = t else { panic!("four tensors") };
        let Adam { beta1, beta2, eps, form } = self.step.adam;
        let (rate, decay) = (self.step.learning_rate as f32, self.step.weight_decay as f32);
        let correction = |beta: f64| match form {
            Form::HuggingFace { correct_bias: false } => 1.0,
            _ => (1.0 - beta.powf(self.step.step as f64)) as f32,
        };
        let (c1, c2) = (correction(beta1), correction(beta2));
        let mut update = vec![0.0; grad.len()];
        for i in 0..grad.len() {
            let p = self.step.gradient_reserve_rate;
            let g = if self.keeps(Purpose::Gradient, p, i) { self.step.clip as f32 * grad[i] / p as f32 } else { 0.0 };
            m[i] = beta1 as f32 * m[i] + (1.0 - beta1) as f32 * g;
            v[i] = beta2 as f32 * v[i] + (1.0 - beta2) as f32 * g * g;
            update[i] = match form {
                Form::Torch => -rate * (m[i] / c1) / ((v[i] / c2).sqrt() + eps as f32),
                _ => -rate * c2.sqrt() / c1 * m[i] / (v[i].sqrt() + eps as f32),
            };
        }
        let none = vec![0.0; grad.len()];
        let mut taken_back = none.clone();
        if let Some(since) = at("since_merge").map(|at| &mut others[at - 4]) {
            for i in 0..since.len() {
                if self.step.merges {
                    (taken_back[i], since[i]) = (since[i], 0.0);
                    update[i] += taken_back[i];
                } else {
                    since[i] += update[i];
                }
            }
        }
        let tau_ref = at("tau_ref").map_or(none, |at| others[at - 4].clone());
        let sum = self.merged(&update, &tau_ref);
        for i in 0..weight.len() {
            let keeps = 1.0 - rate * decay;
            let moved = sum[i] - taken_back[i];
            weight[i] = if form == Form::Torch { weight[i] * keeps + moved } else { (weight[i] + moved) * keeps };
        }
        if let (Rule::Ema { rate }, Some(at)) = (self.step.rule, at("average")) {
            for (w, average) in weight.iter_mut().zip(&mut others[at - 4]) {
                *average = (1.0 - rate as f32) * *average + rate as f32 * *w;
                *w = (1.0 - rate as f32) * *w + rate as f32 * *average;
            }
        }
        if let Some(at) = at("beside") {
            let shared = weight.iter().zip(&tau_ref).map(|(w, tau_ref)| w + self.step.share as f32 * tau_ref);
            others[at - 4] = shared.collect();
        }
    }
}

pub struct Lerp {
    pub shape: [usize; 2],
    pub share: f64,
    /// The tensor is what rounding leaves of an f32 master.
    pub master: bool,
}

impl Case for Lerp {
    fn op(&self) -> &'static str {
        "lerp"
    }

    fn specs(&self) -> Vec<Spec> {
        let tensors = [Spec::input("x", self.shape), Spec::in_place("y", self.shape)];
        let rounding = self.master.then(|| Spec::set("rounded", self.shape));
        tensors.map(Spec::always_f32).into_iter().chain(rounding).map(Spec::per_row).collect()
    }

    fn run<D: Backend>(&self, device: &D, t: &mut [Slot<D>]) -> Result<()> {
        let [x, y, rounded @ ..] = t else { panic!("two tensors") };
        let (y, master) = match rounded {
            [rounded] => (rounded.view_mut(), Some(y.view_mut())),
            _ => (y.view_mut(), None),
        };
        device.lerp(lerp::Args { share: self.share, x: x.view(), y, master })
    }

    fn naive(&self, _: &[Spec], t: &mut [Vec<f32>]) {
        let [x, y, rounded @ ..] = t else { panic!("two tensors") };
        let share = self.share as f32;
        y.iter_mut().zip(&*x).for_each(|(y, x)| *y = (1.0 - share) * *y + share * x);
        rounded.iter_mut().for_each(|rounded| rounded.clone_from(y));
    }
}

pub fn lerp<V: Visitor>(v: &mut V) {
    let kinds: &[bool] = if v.storage() == DType::F32 { &[false] } else { &[false, true] };
    for master in kinds.iter().copied() {
        for (shape, share) in [([1, 31], 1.0), ([3, 123], 0.6), ([47, 507], 1e-3)] {
            v.close(&Lerp { shape, share, master });
        }
        let case = Lerp { shape: [47, 123], share: 0.3, master };
        v.repeatable(&case);
        v.rows(&case);
        v.nan(&case);
        v.shapes(&Lerp { shape: [3, 5], ..case });
    }
}

pub fn sum_squares<V: Visitor>(v: &mut V) {
    // The last is longer than one task of one thread.
    for shape in [[1, 1], [1, 31], [47, 123], [3, 8003], [1, 300_001]] {
        v.close(&SumSquares(shape));
        v.repeatable(&SumSquares(shape));
    }
    v.nan(&SumSquares([47, 123]));
}

/// What no f32 holds is infinite, not NaN.
pub fn sum_squares_overflow<D: Backend>(device: &D) {
    let case = SumSquares([3, 5]);
    for value in [f64::INFINITY, f64::NEG_INFINITY, 2e19] {
        let mut specs = case.specs();
        specs[0].values[14] = f64::from(value as f32);
        assert_eq!(run(device, &case, &specs)[1], [f64::INFINITY], "{value}");
    }
}

/// Every rule in both forms, by name.
fn rules(shape: [usize; 2], step: u64) -> Vec<Update> {
    let dare = |variant, rescale, reserve_rate, clip| {
        Update::merging(shape, step, Rule::OnDare { reserve_rate, merge_weight: 0.2, variant, rescale, clip })
    };
    let ties = |consensus, rescale, reserve_rate| {
        Update::merging(shape, step, Rule::OnTies { reserve_rate, merge_weight: 0.2, consensus, rescale })
    };
    let form = |form| Update {
        step: Step { adam: Adam { form, ..ADAM }, ..Update::at(shape, step).step },
        ..Update::at(shape, step)
    };
    let (released, paper) = (DareVariant::Released, DareVariant::Paper);
    let (before, after) = (Consensus::BeforeWeight, Consensus::AfterWeight);
    let mut rules = vec![
        Update::at(shape, step),
        form(HUGGING_FACE),
        form(Form::HuggingFace { correct_bias: false }),
        dare(released, false, 0.3, 1.0),
        dare(released, true, 0.3, 1.0),
        dare(released, true, 1.0, 0.2),
        dare(paper, false, 0.5, 1.0),
        ties(before, false, 0.3),
        ties(before, true, 0.05),
        ties(after, false, 0.3),
        ties(after, true, 1.0),
        ties(before, true, 1e-9),
    ];
    let with = |change: &dyn Fn(&mut Step)| {
        let mut update = Update::at(shape, step);
        change(&mut update.step);
        update
    };
    rules.push(with(&|step| step.gradient_reserve_rate = 0.3));
    rules.push(with(&|step| step.rule = Rule::Ema { rate: 0.2 }));
    let torch =
        |update: Update| Update { step: Step { adam: ADAM, ..update.step }, tau_ref: Some(DType::F32), ..update };
    rules.push(torch(dare(paper, true, 0.5, 1.0)));
    rules.push(torch(ties(before, true, 0.5)));
    rules
}

pub fn merged_update<V: Visitor>(v: &mut V) {
    for (shape, step) in [([1, 31], 1), ([3, 123], 2), ([47, 507], 10)] {
        for update in rules(shape, step) {
            v.close(&update);
            v.close(&Update { since_merge: true, ..update });
        }
    }
    v.close(&Update::at([252, 123], 100_000));
    for rule in [Rule::Adam, ON_DARE, ON_TIES] {
        let update = Update { since_merge: true, ..Update::merging([3, 123], 2, rule) };
        let between = Update { step: Step { merges: false, ..update.step }, ..update };
        let with_share = |kept| Update { kept, step: Step { share: 0.3, ..update.step }, ..update };
        let others =
            [between, with_share(Kept::Beside), with_share(Kept::Master), Update { kept: Kept::Master, ..update }];
        for update in others {
            v.close(&update);
            v.close(&update.stochastic());
        }
        v.close(&Update { kept: Kept::Narrow, ..update }.stochastic());
        v.shapes(&Update { since_merge: true, ..Update::merging([3, 5], 3, rule) });
        v.shapes(&Update { kept: Kept::Master, ..Update::merging([3, 5], 3, rule) });
    }
    // Longer than a task of a thread, and than the blocks that sum and count on a GPU.
    for update in rules([129, 257], 3) {
        v.repeatable(&update);
        v.repeatable(&Update { since_merge: true, ..update }.stochastic());
    }
    v.rows(&Update::at([252, 123], 3));
    v.rows(&Update { kept: Kept::Master, ..Update::at([252, 123], 3) });
    // The released OnDARE reads the task vector for its share only.
    let shared = Update::merging([3, 31], 3, ON_DARE);
    v.nan(&Update { kept: Kept::Master, step: Step { share: 0.3, ..shared.step }, ..shared });
    v.nan(&Update { since_merge: true, ..Update::merging([3, 31], 3, ON_TIES) });
    v.nan(&Update { kept: Kept::Narrow, ..Update::merging([3, 31], 3, ON_TIES) }.stochastic());
    v.nan(&Update {
        step: Step { rule: Rule::Ema { rate: 0.2 }, ..Update::at([3, 31], 3).step },
        ..Update::at([3, 31], 3)
    });
    v.nan(&Update::at([3, 31], 3));
    v.shapes(&Update::at([3, 5], 3));
    v.shapes(&Update {
        step: Step { rule: Rule::Ema { rate: 0.2 }, ..Update::at([3, 5], 3).step },
        ..Update::at([3, 5], 3)
    });
}

// ---- single promises --------------------------------------------------------------------------------------------------

/// A step that adds -grad: the moments are the gradient and 1, nothing decays.
fn exact(len: usize, rule: Rule) -> Update {
    let form = Form::HuggingFace { correct_bias: false };
    let adam = Adam { beta1: 0.0, beta2: 1.0, eps: 0.0, form };
    let update = Update::merging([1, len], 3, rule);
    Update { step: Step { adam, learning_rate: 1.0, weight_decay: 0.0, clip: 1.0, ..update.step }, ..update }
}

/// What `exact` makes of a weight of 0, by name of the output.
fn exact_run<D: Backend>(device: &D, update: &Update, grad: &[f64], output: &str) -> Vec<f64> {
    let mut specs = specs_on(device, update);
    put(&mut specs, "grad", grad);
    put(&mut specs, "second_moment", &vec![1.0; grad.len()]);
    zero(&mut specs, &["weight", "tau_ref"]);
    output_of(&specs, &run(device, update, &specs), output).to_vec()
}

/// The same masks on every device: word i % 4 of the counter of step, purpose and i / 4.
pub fn masks_are_those_of_philox<D: Backend>(device: &D) {
    const LEN: usize = 4099;
    for reserve_rate in [1e-3, 0.01, 0.5, 0.999] {
        let masked = |update: &Update, output: &str, purpose: Purpose| {
            let found = exact_run(device, update, &vec![1.0; LEN], output);
            let kept: Vec<bool> = (0..LEN).map(|i| update.keeps(purpose, reserve_rate, i)).collect();
            assert!(found.iter().zip(&kept).all(|(x, kept)| (*x != 0.0) == *kept), "{purpose:?} {reserve_rate}");
            assert!(kept.contains(&true) && kept.contains(&false), "{purpose:?} {reserve_rate}");
        };
        for variant in [DareVariant::Released, DareVariant::Paper] {
            let rule = Rule::OnDare { reserve_rate, merge_weight: 0.0, variant, rescale: false, clip: 1.0 };
            masked(&exact(LEN, rule), "weight", Purpose::Update);
        }
        let rule =
            Rule::OnDare { reserve_rate, merge_weight: 1.0, variant: DareVariant::Paper, rescale: false, clip: 1.0 };
        let pulled = Update { tau_ref: Some(DType::F32), ..exact(LEN, rule) };
        let mut specs = specs_on(device, &pulled);
        put(&mut specs, "tau_ref", &vec![1.0; LEN]);
        zero(&mut specs, &["weight"]);
        let weight = output_of(&specs, &run(device, &pulled, &specs), "weight").to_vec();
        assert!((0..LEN).all(|i| (weight[i] != 0.0) == pulled.keeps(Purpose::TauRef, reserve_rate, i)));
        let plain = exact(LEN, Rule::Adam);
        let dropped = Update { step: Step { gradient_reserve_rate: reserve_rate, ..plain.step }, ..plain };
        masked(&dropped, "first_moment", Purpose::Gradient);
    }
}

/// Exactly the k largest, with all that equal the smallest of them.
pub fn on_ties_keeps_the_largest<D: Backend>(device: &D) {
    const LEN: usize = 80_003;
    let random = Philox::named(5, "magnitudes");
    // Where the CPU looks for a sample.
    let sampled = |run: u64| ((run.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) * (LEN as u64 / 16)) >> 32;
    let sampled: Vec<usize> = (0..64).map(|run| sampled(run) as usize).collect();
    let of = |f: fn(u64) -> f64| -> Vec<f64> { (0..LEN).map(|i| f(random.u64(i as u64))).collect() };
    let contents = [
        ("different", normals("different", LEN)),
        ("many equal", of(|x| ((x % 64) as f64 - 31.0) / 8.0)),
        ("mostly zero", of(|x| if x.is_multiple_of(50) { ((x >> 8) % 1000) as f64 - 500.0 } else { 0.0 })),
        ("all equal", of(|x| if x.is_multiple_of(2) { 0.25 } else { -0.25 })),
        ("all zero", vec![0.0; LEN]),
        ("close", of(|x| f64::from(f32::from_bits(0x3f80_0000 + (x % 5) as u32)))),
        (
            "misleading",
            (0..LEN).map(|i| if sampled.contains(&(i / 16)) { 2.0 + (i % 97) as f64 } else { 1.0 }).collect(),
        ),
        ("from small to large", of(|x| f64::from(f32::from_bits((x % 0x7f00_0000) as u32)))),
    ];
    let least = 1.0 / LEN as f64;
    for (name, grad) in &contents {
        let mut sorted: Vec<f64> = grad.iter().map(|x| x.abs()).collect();
        sorted.sort_by(|a, b| b.total_cmp(a));
        for reserve_rate in [0.9 * least, 1.5 * least, 0.01, 0.5, 1.0 - 0.5 * least, 1.0] {
            let consensus = Consensus::BeforeWeight;
            let rule = Rule::OnTies { reserve_rate, merge_weight: 0.0, consensus, rescale: false };
            let count = (reserve_rate * LEN as f64) as usize;
            let threshold = if reserve_rate < 1.0 && count > 0 { sorted[count - 1] } else { 0.0 };
            let found = exact_run(device, &exact(LEN, rule), grad, "weight");
            let expected = grad.iter().map(|x| if x.abs() < threshold { 0.0 } else { -*x });
            let first = expected.zip(&found).position(|(expected, found)| expected != *found);
            assert!(first.is_none(), "{name}, {count} of {LEN}: differs at {first:?}");
        }
    }
}

/// Which updates are lost beside a weight of 1.
pub fn lost_updates_are_counted<D: Backend>(device: &D) {
    const LEN: usize = 5003;
    let mut arena = Arena::with_bytes(device, 8 * Arena::<D>::bytes_of(DType::F32, 1, LEN)).unwrap();
    let mut tensor = |values: &dyn Fn(usize) -> f64| {
        let mut tensor = arena.floats(Kind::States, 1, LEN);
        device.write_f64(&(0..LEN).map(values).collect::<Vec<_>>(), tensor.view_mut()).unwrap();
        tensor
    };
    let grad = tensor(&|i| if i % 3 == 0 { 0.0 } else { 1.0 });
    let (mut m, mut v) = (tensor(&|_| 0.0), tensor(&|_| 1.0));
    // 1e-20 is lost beside 1 in f64, too.
    let mut weight = tensor(&|i| if i % 5 == 0 { 0.0 } else { 1.0 });
    let mut lost = arena.indices(Kind::States, 1, 2);
    device.zero(lost.view_mut()).unwrap();
    let step = Step { learning_rate: 1e-20, ..exact(LEN, Rule::Adam).step };
    for _ in 0..2 {
        device
            .merged_update(merged_update::Args {
                step,
                grad: grad.view(),
                weight: weight.view_mut(),
                master: None,
                first_moment: m.view_mut(),
                second_moment: v.view_mut(),
                since_merge: None,
                average: None,
                tau_ref: None,
                scratch: None,
                lost: Some(lost.view_mut()),
            })
            .unwrap();
    }
    let mut counts = [0; 2];
    device.read_u32(lost.view(), &mut counts).unwrap();
    let moved = |i: &usize| !i.is_multiple_of(3);
    let expected = [(0..LEN).filter(moved).count(), (0..LEN).filter(moved).filter(|i| i % 5 != 0).count()];
    assert_eq!(counts.map(|count| count as usize), expected.map(|count| 2 * count));
}

/// Steps that are far below a rounding of the weight arrive on average, and none does where sums are rounded to nearest.
pub fn stochastic_rounding_keeps_small_steps<D: Backend>(device: &D) {
    const LEN: usize = 4096;
    const STEPS: u64 = 200;
    for (kept, weight, rate, tolerance) in [(Kept::Wide, 0.02, 1e-10, 0.03), (Kept::Narrow, -1.0, 1e-5, 0.1)] {
        let plain = Update { kept, ..exact(LEN, Rule::Adam) }.stochastic();
        let mut specs = specs_on(device, &plain);
        put(&mut specs, "grad", &[1.0; LEN]);
        put(&mut specs, "second_moment", &[1.0; LEN]);
        put(&mut specs, "weight", &[weight; LEN]);
        let mut slots = slots(device, &specs, 0);
        for step in 1..=STEPS {
            let step = Step { step, learning_rate: rate, ..plain.step };
            Update { step, ..plain }.run(device, &mut slots).unwrap();
        }
        let mut values = vec![0.0; LEN];
        device.read_f64(slots[0].view(), &mut values).unwrap();
        let start = f64::from(weight as f32);
        let moved = values.iter().map(|x| start - x).sum::<f64>() / LEN as f64;
        let expected = STEPS as f64 * rate;
        assert!((moved - expected).abs() < tolerance * expected, "{kept:?}: moved {moved:e} of {expected:e}");
        // And not all together.
        assert!(values.iter().any(|x| *x != values[0]), "{kept:?}");
        if kept == Kept::Wide {
            let nearest =
                Update { step: Step { rounding: Rounding::Nearest, learning_rate: rate, ..plain.step }, ..plain };
            let values = run(device, &nearest, &specs);
            assert!(values[0].iter().all(|x| *x == start));
        }
    }
}

/// Where nothing is dropped and nothing merged, the authors' OnDARE is Adam in their form, bit for bit.
pub fn on_dare_that_keeps_all_is_adam<D: Backend>(device: &D) {
    for variant in [DareVariant::Released, DareVariant::Paper] {
        let rule = Rule::OnDare { reserve_rate: 1.0, merge_weight: 0.0, variant, rescale: false, clip: 1.0 };
        let adam = Update::merging([47, 123], 7, Rule::Adam);
        let specs = specs_on(device, &adam);
        let expected = run(device, &adam, &specs);
        let dare = Update::merging([47, 123], 7, rule);
        assert_same_bits("OnDARE of everything", &specs, &run(device, &dare, &specs), &expected);
    }
}

/// What is missing or senseless is said before anything is written.
pub fn senseless_steps_are_refused<D: Backend>(device: &D) {
    let refused = |update: Update, why: &str| {
        let error = refusal(device, &update, &specs_on(device, &update)).map(|e| e.to_string()).unwrap_or_default();
        assert!(error.starts_with("merged_update") && error.contains(why), "{why}: {error:?}");
    };
    let merging = |rule| Update::merging([3, 5], 3, rule);
    let with = |change: &dyn Fn(&mut Step)| {
        let mut update = Update { since_merge: true, ..merging(ON_DARE) };
        change(&mut update.step);
        update
    };
    refused(Update { tau_ref: None, ..merging(ON_DARE) }, "tau_ref");
    refused(Update { tau_ref: None, ..merging(ON_TIES) }, "tau_ref");
    refused(Update { since_merge: false, ..with(&|step| step.merges = false) }, "since_merge");
    refused(Update { kept: Kept::Narrow, ..merging(ON_DARE) }, "no master");
    refused(Update { kept: Kept::Beside, tau_ref: None, ..merging(Rule::Adam) }, "no tau_ref");
    refused(with(&|step| step.share = 0.1), "no master");
    refused(with(&|step| step.gradient_reserve_rate = 0.0), "gradient_reserve_rate");
    refused(with(&|step| step.step = 0), "step 0");
    refused(with(&|step| step.step = 1 << 30), "step 1073741824");
    let dare = |reserve_rate, merge_weight, clip| {
        let variant = DareVariant::Released;
        merging(Rule::OnDare { reserve_rate, merge_weight, variant, rescale: true, clip })
    };
    refused(dare(0.0, 0.1, 1.0), "reserve_rate");
    refused(dare(1.5, 0.1, 1.0), "reserve_rate");
    refused(dare(f64::NAN, 0.1, 1.0), "reserve_rate");
    refused(dare(0.5, -0.1, 1.0), "merge_weight");
    refused(dare(0.5, 0.1, 0.0), "clip");
    refused(merging(Rule::Ema { rate: 2.0 }), "rate");
}

/// All of them.
pub fn merged_update_promises<D: Backend>(device: &D) {
    masks_are_those_of_philox(device);
    lost_updates_are_counted(device);
    on_dare_that_keeps_all_is_adam(device);
    senseless_steps_are_refused(device);
}
