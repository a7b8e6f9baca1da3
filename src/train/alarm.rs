//! When a run has gone too far, said of what its evaluations see: the same prompts and random streams each time, so that what
//! changes between two is the policy.
//!
//! ```text
//! over-optimised   gold is below its best by two standard errors of the paired difference, at two evaluations in a row
//! too far          KL(policy || first reference) is above --kl-budget
//! ```
//!
//! The best is replaced by what is better by as much, not by what is better by chance: among many evaluations of a policy that stays
//! as it is, the luckiest would soon lie above the others (20 evaluations of a plateau: false alarms in 22 % of simulated runs with the
//! plain maximum, in 10 % so, of humps that were found none was lost).
//!
//! A curve fitted so far only warns: early in a healthy run it puts the peak too soon. So do what goes before: likelihoods of chosen
//! completions that fall, completions that change in length, that become alike.

use serde::{Deserialize, Serialize};

use super::drift::Estimate;
use crate::scaling::{Curve, Form, Point, fits};

/// Evaluations in a row that must be below the best.
const IN_A_ROW: u32 = 2;
/// Standard errors between two evaluations that differ.
const BELOW: f64 = 2.0;
/// Evaluations before a curve is fitted.
const POINTS: usize = 6;
const RESAMPLES: usize = 200;
/// Share of the length at the start by which completions have changed, and standard errors.
const LENGTH: f64 = 0.2;
/// Share that is left of what was distinct at the start.
const DISTINCT: f64 = 0.75;
/// Share of its negative log-probability at the start that a chosen completion has lost.
const DISPLACED: f64 = 0.05;
/// Each halves the learning rate, or doubles beta; after these a run ends.
const ROLLBACKS: u32 = 3;

/// What a run does about it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OnAlarm {
    Warn,
    /// End with the best checkpoint.
    Stop,
    /// Go back to the best checkpoint and on from there at half the learning rate, or twice the beta; after the third time, end
    /// there.
    Rollback,
}

/// What a run that went back does otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Lever {
    #[default]
    LearningRate,
    Beta,
}

/// What one evaluation saw.
#[derive(Clone, PartialEq, Debug)]
pub struct Seen {
    pub step: u64,
    /// From the first reference, nats.
    pub kl: Estimate,
    /// Of each sample, in the same order every time; a gold reward may say nothing. Empty without one.
    pub gold: Vec<Option<f64>>,
    /// Tokens of each sample.
    pub lengths: Vec<f64>,
    /// Share of distinct pairs of neighbouring tokens among all pairs.
    pub distinct_2: f64,
    /// Mean log-probabilities of held-out completions, where they are pairs.
    pub chosen: Option<f64>,
    pub rejected: Option<f64>,
}

/// An evaluation that was worth keeping.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Best {
    pub step: u64,
    pub gold: Vec<Option<f64>>,
}

/// What is remembered of earlier evaluations, in checkpoints too.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Watch {
    pub best: Option<Best>,
    /// How often the run went back.
    pub rollbacks: u32,
    start: Option<Start>,
    /// Evaluations in a row that are below the best.
    below: u32,
    /// (d, mean gold) of every evaluation.
    path: Vec<(f64, f64)>,
    /// What was said already.
    said: Vec<String>,
}

#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
struct Start {
    lengths: Vec<f64>,
    distinct_2: f64,
    chosen: Option<f64>,
    rejected: Option<f64>,
}

/// What an evaluation comes to.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Finding {
    /// The policy is clearly better than any before, within the budget.
    pub best: bool,
    pub alarm: Option<String>,
    /// Each is said once in a run.
    pub warnings: Vec<String>,
}

fn known(values: &[Option<f64>]) -> Vec<f64> {
    values.iter().flatten().copied().collect()
}

/// Of the samples that both say something of; none where those are fewer than two.
fn paired(now: &[Option<f64>], then: &[Option<f64>]) -> Option<Estimate> {
    let differences: Vec<f64> = now.iter().zip(then).filter_map(|(now, then)| Some((*now)? - (*then)?)).collect();
    (differences.len() > 1).then(|| Estimate::of(&differences))
}

impl Watch {
    /// What to keep in mind, and what to say, after an evaluation. `budget`: the largest KL, nats.
    pub fn look(&mut self, seen: &Seen, budget: Option<f64>) -> Finding {
        let mut finding = Finding::default();
        let d = seen.kl.mean.max(0.0).sqrt();
        let far = budget.filter(|budget| seen.kl.mean > *budget);
        let golds = known(&seen.gold);
        let gold = (!golds.is_empty()).then(|| Estimate::of(&golds).mean);
        if let Some(gold) = gold {
            self.path.push((d, gold));
        }
        let before = self.best.as_ref().map(|best| (best.step, paired(&seen.gold, &best.gold)));
        finding.best = far.is_none()
            && match &before {
                None | Some((_, None)) => true,
                Some((_, Some(difference))) => difference.mean > BELOW * difference.stderr,
            };
        let worse = before.and_then(|(step, difference)| {
            difference.filter(|d| d.mean < -BELOW * d.stderr && d.mean < 0.0).map(|difference| (step, difference))
        });
        self.below = if worse.is_some() { self.below + 1 } else { 0 };
        finding.alarm = match (far, worse) {
            (Some(budget), _) => Some(format!(
                "too far: KL from the first reference is {:.2} ± {:.2} nats (d = {d:.2}), above the budget of {budget} (--kl-budget)",
                seen.kl.mean, seen.kl.stderr
            )),
            (None, Some((step, Estimate { mean, stderr }))) if self.below >= IN_A_ROW => Some(format!(
                "over-optimised: the gold reward is {:.3} ± {stderr:.3} below its best, at step {step}, for the second evaluation in \
                 a row (d = {d:.2})",
                -mean
            )),
            _ => None,
        };
        if finding.best {
            self.best = Some(Best { step: seen.step, gold: seen.gold.clone() });
        }
        let start = self.start.get_or_insert_with(|| Start {
            lengths: seen.lengths.clone(),
            distinct_2: seen.distinct_2,
            chosen: seen.chosen,
            rejected: seen.rejected,
        });
        let mut words = start.words(seen);
        words.extend(self.guess(d));
        for (what, words) in words {
            if !self.said.iter().any(|said| said == what) {
                self.said.push(what.to_string());
                finding.warnings.push(words);
            }
        }
        finding
    }

    /// What becomes of the run.
    pub fn act(&self, action: OnAlarm) -> OnAlarm {
        if action == OnAlarm::Rollback && self.rollbacks >= ROLLBACKS { OnAlarm::Stop } else { action }
    }

    /// Of the schedule's learning rate.
    pub fn rate(&self, lever: Lever) -> f64 {
        if lever == Lever::LearningRate { 0.5_f64.powi(self.rollbacks as i32) } else { 1.0 }
    }

    /// Of the objective's beta.
    pub fn beta(&self, lever: Lever) -> f64 {
        if lever == Lever::Beta { 2_f64.powi(self.rollbacks as i32) } else { 1.0 }
    }

    /// The watch of the best evaluation after the run has gone back there from this one.
    pub fn gone_back(&self, then: Self) -> Self {
        Self { rollbacks: self.rollbacks + 1, said: self.said.clone(), ..then }
    }

    /// Where the curve so far puts the peak, if that is behind and the data are sure of it.
    fn guess(&self, d: f64) -> Option<(&'static str, String)> {
        let (_, gold) = *self.path.first()?;
        if self.path.len() < POINTS {
            return None;
        }
        let points: Vec<Point> =
            self.path.iter().skip(1).map(|(d, g)| Point { d: *d, gold: g - gold, run: 0 }).collect();
        let form = Form { curve: Curve::Log, intercept: false };
        let fit = fits(&points, RESAMPLES, 0).into_iter().find(|fit| fit.form == form)?;
        let (peak, interval) = (fit.peak?, fit.bootstrap?.peak_d);
        (interval.high < d).then(|| {
            let [low, high] = [interval.low, interval.high];
            let words = format!(
                "a curve through the gold reward so far has its peak at d = {:.2} [{low:.2}, {high:.2}], behind the present {d:.2}; early \
                 curves put it too soon, so this only warns",
                peak.d
            );
            ("curve", words)
        })
    }
}

impl Start {
    /// What has become of the policy, by what it is called.
    fn words(&self, seen: &Seen) -> Vec<(&'static str, String)> {
        let mut words = Vec::new();
        if let (Some(chosen), Some(rejected), Some(then), Some(other)) =
            (seen.chosen, seen.rejected, self.chosen, self.rejected)
        {
            let (fallen, margin) = (then - chosen, chosen - rejected - (then - other));
            if fallen > DISPLACED * then.abs() && margin > 0.0 {
                let text = format!(
                    "likelihood displacement: held-out chosen completions are {fallen:.1} nats less likely than at the start, the rejected \
                     {:.1}; the margin grows while both fall",
                    other - rejected
                );
                words.push(("displacement", text));
            }
        }
        let differences: Vec<f64> = seen.lengths.iter().zip(&self.lengths).map(|(now, then)| now - then).collect();
        if differences.len() > 1 {
            let (Estimate { mean, stderr }, then) = (Estimate::of(&differences), Estimate::of(&self.lengths).mean);
            if mean.abs() > LENGTH * then && mean.abs() > BELOW * stderr {
                let longer = if mean > 0.0 { "longer" } else { "shorter" };
                let text = format!(
                    "length drift: completions are {:.1} tokens {longer} than at the start, where they had {then:.1}",
                    mean.abs()
                );
                words.push(("length", text));
            }
        }
        if seen.distinct_2 < DISTINCT * self.distinct_2 {
            let text = format!(
                "diversity collapse: {:.0} % of the pairs of neighbouring tokens are distinct, {:.0} % at the start",
                100.0 * seen.distinct_2,
                100.0 * self.distinct_2
            );
            words.push(("diversity", text));
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Philox;

    const SAMPLES: u64 = 64;

    /// Samples of their own level, which stay, around a mean, with noise of an evaluation.
    fn seen(seed: u64, step: u64, gold: f64, kl: f64) -> Seen {
        let (own, noise) = (Philox::named(seed, "own"), Philox::named(seed, &format!("step {step}")));
        let gold = (0..SAMPLES).map(|s| Some(gold + own.normal(s) + 0.7 * noise.normal(s))).collect();
        Seen {
            step,
            kl: Estimate { mean: kl, stderr: 0.1 },
            gold,
            lengths: vec![20.0; SAMPLES as usize],
            distinct_2: 0.9,
            chosen: Some(-50.0),
            rejected: Some(-50.0),
        }
    }

    /// The evaluations of a run until something is said, or all.
    fn run(seed: u64, gold: impl Fn(f64) -> f64, steps: u64) -> (Option<(u64, String)>, Watch) {
        let mut watch = Watch::default();
        for step in 0..steps {
            let kl = 0.4 * step as f64;
            if let Some(alarm) = watch.look(&seen(seed, step, gold(kl.sqrt()), kl), None).alarm {
                return (Some((step, alarm)), watch);
            }
        }
        (None, watch)
    }

    #[test]
    fn a_hump_is_found_and_a_plateau_is_not() {
        for seed in 0..5 {
            let (alarm, watch) = run(seed, |d| d * (2.0 - d), 40);
            let (step, text) = alarm.expect("it falls from d = 1 on");
            assert!(text.contains("over-optimised") && step < 25, "{step}: {text}");
            // The best is within two standard errors of the best there is.
            let kept = watch.best.unwrap();
            let d = (0.4 * kept.step as f64).sqrt();
            assert!(d * (2.0 - d) > 1.0 - 2.0 * 1.22 / 8.0, "{d}");
        }
        // A healthy run: rises and stays. Over 40 seeds of 20 evaluations, false alarms are rare.
        let false_alarms = (0..40).filter(|seed| run(*seed, |d| d.min(1.0), 20).0.is_some()).count();
        assert!(false_alarms <= 8, "{false_alarms} of 40");
        assert_eq!((0..5).filter(|seed| run(*seed, |d| 0.5 * d, 30).0.is_some()).count(), 0);
    }

    #[test]
    fn the_budget_is_an_alarm_of_its_own_and_what_is_beyond_is_never_best() {
        let mut watch = Watch::default();
        let quiet = |step, kl| Seen { gold: Vec::new(), ..seen(1, step, 0.0, kl) };
        assert!(watch.look(&quiet(0, 0.0), Some(2.0)).best && watch.look(&quiet(5, 1.9), Some(2.0)).best);
        let finding = watch.look(&quiet(10, 2.1), Some(2.0));
        assert!(!finding.best && finding.alarm.unwrap().contains("above the budget of 2 (--kl-budget)"));
        assert_eq!(watch.best.as_ref().unwrap().step, 5);
        for (rollbacks, action) in [(0, OnAlarm::Rollback), (2, OnAlarm::Rollback), (3, OnAlarm::Stop)] {
            watch.rollbacks = rollbacks;
            assert_eq!(watch.act(OnAlarm::Rollback), action);
        }
        assert_eq!((watch.rate(Lever::LearningRate), watch.beta(Lever::LearningRate)), (0.125, 1.0));
        assert_eq!((watch.rate(Lever::Beta), watch.beta(Lever::Beta)), (1.0, 8.0));
        assert_eq!(watch.act(OnAlarm::Warn), OnAlarm::Warn);
        let back = watch.gone_back(Watch::default());
        assert_eq!((back.rollbacks, back.best), (4, None));
    }

    #[test]
    fn each_symptom_is_named_once() {
        let mut watch = Watch::default();
        watch.look(&seen(1, 0, 0.0, 0.0), None);
        let sick = Seen {
            lengths: (0..SAMPLES).map(|s| 30.0 + (s % 3) as f64).collect(),
            distinct_2: 0.5,
            chosen: Some(-60.0),
            rejected: Some(-80.0),
            ..seen(1, 1, 0.0, 0.4)
        };
        let words = watch.look(&sick, None).warnings;
        for (words, start) in words.iter().zip(["likelihood displacement", "length drift", "diversity collapse"]) {
            assert!(words.starts_with(start), "{words}");
        }
        assert_eq!((words.len(), watch.look(&sick, None).warnings), (3, vec![]));
        // A checkpoint holds it all.
        let saved = serde_json::to_string(&watch).unwrap();
        assert_eq!(serde_json::from_str::<Watch>(&saved).unwrap(), watch);
    }

    #[test]
    fn a_curve_only_warns() {
        let mut watch = Watch::default();
        let mut warnings = Vec::new();
        for step in 0..12 {
            let d = f64::from(step) / 4.0;
            let gold = vec![Some(if step == 0 { 0.0 } else { d * (0.5 - d.ln()) + 1e-3 * f64::from(step % 2) })];
            let seen = Seen { gold, ..seen(1, step as u64, 0.0, d * d) };
            let finding = watch.look(&seen, None);
            assert_eq!(finding.alarm, None);
            warnings.extend(finding.warnings);
        }
        assert!(warnings.iter().any(|words| words.contains("only warns")), "{warnings:?}");
    }
}
