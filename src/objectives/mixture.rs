//! What the user chose: one objective or a weighted sum of several (MPO, Wang et al., arXiv:2411.10442, mixes a
//! preference, a quality and a generation loss so), their parameters, and the modifiers that these switch on.
//!
//! ```text
//! loss = sum_i weight_i loss_i
//! ```
//!
//! Parameters are shared by name: `beta` is the beta of every term that takes one. Of metrics that several terms have,
//! the first term's is kept; `loss/<term>` is a term's loss before its weight.

use super::registry::find;
use super::{Credit, Grads, Metric, Modifier, Needs, Objective, Outcome, Scope, Stats, Totals, modifiers};
use crate::error::{Error, Result};
use crate::params::{Params, flag};

/// An objective, completely: names, weights, parameters.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Choice {
    /// Names or aliases of the registry, each with the weight of its loss.
    pub terms: Vec<(String, f64)>,
    pub params: Params,
}

/// Puts something around an objective.
pub type Wrap<'a> = &'a dyn Fn(Box<dyn Objective>) -> Box<dyn Objective>;

impl Choice {
    /// One objective, unweighted.
    pub fn one(name: impl Into<String>, params: Params) -> Self {
        Self { terms: vec![(name.into(), 1.0)], params }
    }

    /// Builds it for one reference at most: see [`build`].
    pub fn build(&self) -> Result<Box<dyn Objective>> {
        build(self, &|leaf| leaf)
    }

    /// Every parameter that decides the loss, those at their defaults included.
    pub fn resolved(&self) -> Result<Params> {
        let mut all = Params::default();
        for (name, _) in &self.terms {
            find(name)?.resolve(&self.params)?.iter().for_each(|(name, value)| all.set(name, value.clone()));
        }
        for modifier in modifiers().iter().filter(|modifier| modifier.given(&self.params)) {
            all.set(modifier.param.name, self.params.get(modifier.param.name).expect("it is given").clone());
        }
        Ok(all)
    }

    fn check(&self) -> Result<()> {
        if self.terms.is_empty() {
            return Err(Error::option("--objective", "none is given; `cuvee list objectives` names them all"));
        }
        let mut names = Vec::new();
        for (given, weight) in &self.terms {
            let entry = find(given)?;
            if names.contains(&entry.name) {
                let detail = format!("{} is given twice; give it once, with the sum of the weights", entry.name);
                return Err(Error::option("--objective", detail));
            }
            names.push(entry.name);
            if !(*weight > 0.0 && weight.is_finite()) {
                let detail = format!("{weight} for {}; expected a number above 0", entry.name);
                return Err(Error::option("--objective-weights", detail));
            }
        }
        let mut flags = Vec::new();
        for spec in
            self.terms.iter().map(|term| find(&term.0)).collect::<Result<Vec<_>>>()?.iter().flat_map(|e| e.params)
        {
            if !flags.contains(&spec.name) {
                flags.push(spec.name);
            }
        }
        let known = |name: &str| flags.contains(&name) || modifiers().iter().any(|m| m.param.name == name);
        match self.params.names().find(|name| !known(name)) {
            None => Ok(()),
            Some(unused) => {
                let takes: Vec<String> = flags.iter().map(|name| flag(name)).collect();
                let takes = if takes.is_empty() { "no parameter".into() } else { takes.join(", ") };
                let detail = format!("{} does not use it, it takes {takes}; remove it", names.join(" + "));
                Err(Error::option(flag(unused), detail))
            }
        }
    }
}

/// Checks what the user chose and builds it. `leaf` is put around each term that reads exactly one reference, and
/// modifiers around that.
pub fn build(choice: &Choice, leaf: Wrap) -> Result<Box<dyn Objective>> {
    choice.check()?;
    let mut terms = Vec::new();
    for (name, weight) in &choice.terms {
        let entry = find(name)?;
        let mut objective = (entry.build)(&entry.resolve(&choice.params)?)?;
        if objective.needs().refs == (1..=1) {
            objective = leaf(objective);
        }
        terms.push(Term { objective, weight: *weight, loss: format!("loss/{}", entry.name).into() });
    }
    for modifier in modifiers().iter().filter(|modifier| modifier.given(&choice.params)) {
        terms = modify(modifier, &choice.params, terms)?;
    }
    if let [Term { weight: 1.0, .. }] = terms[..] {
        return Ok(terms.remove(0).objective);
    }
    let refs = terms.iter().map(|term| term.objective.needs()).reduce(Needs::union).expect("there are terms").refs;
    match terms.iter().filter(|term| term.objective.needs().rewards).count() {
        0 => {}
        2.. => {
            return Err(Error::option(
                "--objective",
                "two of them learn from rewards; train towards one such at a time",
            ));
        }
        // The others would be shown its samples, good and bad, as if they were the data's.
        1 => {
            let detail = "one of them learns from rewards of what the policy writes, the others from the data's completions; train \
                          towards one after the other";
            return Err(Error::option("--objective", detail));
        }
    }
    let name = terms.iter().map(|term| term.objective.name()).collect::<Vec<_>>().join(" + ");
    if refs.is_empty() {
        let detail = format!("{name}: no number of references fits all of them; train towards one at a time");
        return Err(Error::option("--objective", detail));
    }
    Ok(Box::new(Mixture { name, terms }))
}

/// Puts a modifier around the terms that it fits.
fn modify(modifier: &Modifier, params: &Params, terms: Vec<Term>) -> Result<Vec<Term>> {
    let spec = &modifier.param;
    if !terms.iter().any(|term| modifier.wraps(&term.objective.needs())) {
        let names: Vec<&str> = terms.iter().map(|term| term.objective.name()).collect();
        let detail = format!("{} does not use it: {}; remove it", names.join(" + "), modifier.fits);
        return Err(Error::option(spec.flag(), detail));
    }
    spec.check(modifier.name, params.get(spec.name).expect("it is given"))?;
    let wrap = |term: Term| match modifier.wraps(&term.objective.needs()) {
        true => Term { objective: (modifier.wrap)(params, term.objective), ..term },
        false => term,
    };
    Ok(terms.into_iter().map(wrap).collect())
}

struct Term {
    objective: Box<dyn Objective>,
    /// > 0
    weight: f64,
    /// The metric of its loss.
    loss: std::borrow::Cow<'static, str>,
}

struct Mixture {
    name: String,
    terms: Vec<Term>,
}

impl Objective for Mixture {
    fn name(&self) -> &str {
        &self.name
    }

    fn needs(&self) -> Needs {
        self.terms.iter().map(|term| term.objective.needs()).reduce(Needs::union).expect("a mixture has terms")
    }

    fn scope(&self) -> Scope {
        let coupled = self.terms.iter().any(|term| term.objective.scope() == Scope::Batch);
        if coupled { Scope::Batch } else { Scope::Pair }
    }

    /// Those of the terms, one after the other.
    fn initial_state(&self) -> Vec<f64> {
        self.terms.iter().flat_map(|term| term.objective.initial_state()).collect()
    }

    /// That of the one term that learns from rewards; [`build`] refuses two.
    fn credit(&self, rollouts: &Stats) -> Credit {
        let learns = |term: &Term| term.objective.needs().rewards;
        let Some(at) = self.terms.iter().position(learns) else { return Credit::default() };
        let remembered = |term: &Term| term.objective.initial_state().len();
        let before: usize = self.terms[..at].iter().map(remembered).sum();
        let own = rollouts.state.get(before..before + remembered(&self.terms[at])).unwrap_or_default().to_vec();
        let mut credit = self.terms[at].objective.credit(&Stats { state: own, ..rollouts.clone() });
        if !credit.state.is_empty() {
            let mut all = rollouts.state.clone();
            all[before..before + credit.state.len()].copy_from_slice(&credit.state);
            credit.state = all;
        }
        credit
    }

    fn evaluate(&self, stats: &Stats, totals: &Totals) -> Outcome {
        let mut sum = Outcome::default();
        let mut losses: Vec<Metric> = Vec::new();
        let mut states = &stats.state[..];
        for Term { objective, weight, loss } in &self.terms {
            let (state, rest) = states.split_at(objective.initial_state().len());
            states = rest;
            let own = (!stats.state.is_empty()).then(|| Stats { state: state.to_vec(), ..stats.clone() });
            let outcome = objective.evaluate(own.as_ref().unwrap_or(stats), totals);
            sum.loss += weight * outcome.loss;
            sum.grads.add(*weight, &outcome.grads);
            for metric in outcome.metrics {
                if sum.metrics.iter().all(|known| known.0 != metric.0) {
                    sum.metrics.push(metric);
                }
            }
            losses.push((loss.clone(), outcome.loss));
            sum.state.extend(outcome.state);
        }
        sum.metrics.extend(losses);
        sum
    }
}

impl Grads {
    /// `self += factor * other`, field by field.
    fn add(&mut self, factor: f64, other: &Grads) {
        let fields = [
            (&mut self.logps, &other.logps),
            (&mut self.token_logps, &other.token_logps),
            (&mut self.entropy, &other.entropy),
            (&mut self.scores, &other.scores),
            (&mut self.values, &other.values),
        ];
        fields.into_iter().for_each(|(sum, term)| add(sum, factor, term));
        if self.token_kl.len() < other.token_kl.len() {
            self.token_kl.resize(other.token_kl.len(), Vec::new());
        }
        self.token_kl.iter_mut().zip(&other.token_kl).for_each(|(sum, term)| add(sum, factor, term));
    }
}

/// An empty gradient is zero.
fn add(sum: &mut Vec<f64>, factor: f64, term: &[f64]) {
    if sum.is_empty() {
        sum.resize(term.len(), 0.0);
    }
    sum.iter_mut().zip(term).for_each(|(sum, term)| *sum += factor * term);
}
