//! Flags about references, and what they come to.

use std::path::PathBuf;

use clap::{ArgMatches, Args, ValueEnum};
use serde::{Serialize, Serializer};

use super::args::{above_zero_to_one, positive, steps};
use super::{is_given, needs};
use crate::objectives::kl::{Estimator, KlPenaltyOptions};
use crate::objectives::mrpo::{Blend, Level, Mean, RefClip, Weighting, Window};
use crate::objectives::ref_weights::Rule;
use crate::train::{Moving, References};
use crate::{Error, Result};

#[derive(Debug, Clone, PartialEq, Args, Serialize)]
#[command(next_help_heading = "References")]
pub struct RefArgs {
    /// Frozen reference: a model's folder, or a cache file of its log-probabilities that was made elsewhere (see `cuvee
    /// cache ls`). Repeat the flag for several, the first of which is the anchor. One with another tokenizer scores the texts
    /// as tokens of its own [default: the model before training]
    #[arg(long, value_name = "DIR|FILE.logps")]
    pub ref_model: Vec<PathBuf>,
    /// Of several references, what the policy is held to: their geometric mean (which solves the problem with a KL term for
    /// each), harmonic mean (MRPO as published), arithmetic mean (with --f-divergence-type forward_kl the solution for
    /// forward KLs), or each on its own with the losses added (multi-dpo) [default: geometric]
    #[arg(long, value_name = "MEAN")]
    pub ref_mean: Option<MeanArg>,
    /// How much each of several references counts, in their order: numbers such as 0.7,0.3 that sum to 1, or who decides:
    /// uniform; arwc (each pair's gaps, arXiv:2405.16388); of arXiv:2512.10040 validation-discrimination and
    /// validation-accuracy (of --eval-dataset), sliding-window:N (of the last N pairs trained on) and thompson (of all)
    /// [default: uniform]
    #[arg(long, value_name = "W,W..|RULE", value_parser = ref_weights)]
    pub ref_weights: Option<WeightsArg>,
    /// Keep log-probabilities of the other references within this share of the anchor's: MRPO's trust region (CTRO); 0.1 in the
    /// paper's code [default: off]
    #[arg(long, value_name = "F", value_parser = positive)]
    pub ref_clip: Option<f64>,
    /// Who divides --ref-clip between the completions of a pair, the less likely of which gets more: the mean of all
    /// references, or the anchor alone; fixed = all of it for both [default: mean-refs]
    #[arg(long, value_name = "WHO")]
    pub ref_clip_window: Option<WindowArg>,
    /// Take the mean of references over whole completions or of each token's probabilities [default: sequence]
    #[arg(long, value_name = "LEVEL")]
    pub ref_level: Option<LevelArg>,
    /// Swap the weights of two references in the harmonic mean, as MRPO's released code does
    #[arg(long)]
    pub official_k2_swap: bool,
    /// Let the reference follow the policy every N steps (TR-DPO); it is then in memory and runs in every step
    #[arg(long, alias = "ref-model-sync-steps", value_name = "N", value_parser = steps)]
    pub ref_sync_steps: Option<u64>,
    /// How far: the policy's share in what the reference becomes; 1 = a copy, 0.6 in TRL [default: 1]
    #[arg(long, alias = "ref-model-mixup-alpha", value_name = "F", value_parser = above_zero_to_one)]
    pub ref_mixup: Option<f64>,
    /// Add this many times the mean KL divergence of a token's distribution from the references' to any objective; references
    /// count as --ref-weights says [default: off]
    #[arg(long, value_name = "F", value_parser = positive)]
    pub kl_penalty: Option<f64>,
    /// How that divergence is known: over the whole vocabulary (exact), or from the completion's own tokens: k2, whose gradient
    /// pulls to the geometric mean of the references, or k3, to the arithmetic [default: exact]
    #[arg(long, value_name = "exact|k2|k3", value_parser = estimator)]
    pub kl_estimator: Option<EstimatorArg>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MeanArg {
    Geometric,
    Harmonic,
    Arithmetic,
    MultiDpo,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum WindowArg {
    MeanRefs,
    Anchor,
    Fixed,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum LevelArg {
    Sequence,
    Token,
}

/// `--kl-estimator` as it was typed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EstimatorArg(Estimator);

impl Serialize for EstimatorArg {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&format!("{:?}", self.0).to_lowercase())
    }
}

fn estimator(text: &str) -> Result<EstimatorArg, String> {
    match text.parse() {
        Ok(estimator) => Ok(EstimatorArg(estimator)),
        Err(Error::Option { detail, .. }) => Err(detail),
        Err(other) => Err(other.to_string()),
    }
}

/// `--ref-weights` as it was typed.
#[derive(Debug, Clone, PartialEq)]
pub enum WeightsArg {
    Given(Vec<f64>),
    Rule(&'static str),
    Window(u64),
}

const UNIFORM: &str = "uniform";
const ARWC: &str = "arwc";
const DISCRIMINATION: &str = "validation-discrimination";
const ACCURACY: &str = "validation-accuracy";
const WINDOW: &str = "sliding-window:";
const THOMPSON: &str = "thompson";

impl Serialize for WeightsArg {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Rule(rule) => serializer.serialize_str(rule),
            Self::Window(pairs) => serializer.collect_str(&format_args!("{WINDOW}{pairs}")),
            Self::Given(weights) => {
                let weights: Vec<String> = weights.iter().map(f64::to_string).collect();
                serializer.serialize_str(&weights.join(","))
            }
        }
    }
}

fn ref_weights(text: &str) -> Result<WeightsArg, String> {
    let rules = [UNIFORM, ARWC, DISCRIMINATION, ACCURACY, THOMPSON];
    if let Some(rule) = rules.into_iter().find(|rule| *rule == text) {
        return Ok(WeightsArg::Rule(rule));
    }
    if let Some(pairs) = text.strip_prefix(WINDOW) {
        return steps(pairs).map(WeightsArg::Window);
    }
    let weight = |text: &str| text.trim().parse::<f64>().ok().filter(|w| w.is_finite() && *w >= 0.0);
    let weights: Option<Vec<f64>> = text.split(',').map(weight).collect();
    match weights {
        Some(weights) if (weights.iter().sum::<f64>() - 1.0).abs() < 1e-6 => Ok(WeightsArg::Given(weights)),
        Some(weights) => Err(format!("expected numbers that sum to 1, these sum to {}", weights.iter().sum::<f64>())),
        None => Err(format!("expected numbers such as 0.7,0.3, or one of {}, {WINDOW}N", rules.join(", "))),
    }
}

impl RefArgs {
    /// What no single flag can know.
    pub(super) fn check(&self, flags: &ArgMatches) -> Result<()> {
        needs(flags, "ref_clip_window", "ref_clip", "say how far references may be from the anchor")?;
        needs(flags, "ref_mixup", "ref_sync_steps", "say when the reference moves")?;
        needs(flags, "kl_estimator", "kl_penalty", "say how strong the penalty is")?;
        let given = |option: &str| is_given(flags, option);
        let flag = |option: &str| format!("--{}", option.replace('_', "-"));
        let several = ["ref_mean", "ref_clip", "ref_level", "ref_weights"].into_iter().find(|option| given(option));
        if let Some(option) = several.or(self.official_k2_swap.then_some("official_k2_swap"))
            && self.ref_model.len() < 2
        {
            return Err(Error::option(flag(option), "is about several references; repeat --ref-model, or drop it"));
        }
        let rule = |rule| self.ref_weights == Some(WeightsArg::Rule(rule));
        if rule(DISCRIMINATION) || rule(ACCURACY) {
            needs(flags, "ref_weights", "eval_dataset", "its pairs are what this rule looks at")?;
        }
        if let Some(WeightsArg::Given(weights)) = &self.ref_weights
            && weights.len() != self.ref_model.len()
        {
            let detail =
                format!("{} numbers for {} references; give one for each", weights.len(), self.ref_model.len());
            return Err(Error::option("--ref-weights", detail));
        }
        let numbers = matches!(self.ref_weights, None | Some(WeightsArg::Given(_)) | Some(WeightsArg::Rule(UNIFORM)));
        if self.kl_penalty.is_some() && !numbers {
            let detail =
                "its references count alike in every step; give --ref-weights as numbers, or drop one of the two";
            return Err(Error::option("--kl-penalty", detail));
        }
        if self.ref_sync_steps.is_some() && self.ref_model.len() > 1 {
            return Err(Error::option(
                "--ref-sync-steps",
                "moves one reference; give one --ref-model to start from, or none",
            ));
        }
        if self.ref_sync_steps.is_some() && self.kl_penalty.is_some() {
            return Err(Error::option("--kl-penalty", "needs frozen references, and --ref-sync-steps moves; drop one"));
        }
        Ok(())
    }

    pub fn references(&self, seed: u64) -> References {
        let clip = self.ref_clip.map(|eps_max| RefClip {
            eps_max,
            window: match self.ref_clip_window {
                None | Some(WindowArg::MeanRefs) => Window::MeanRefs,
                Some(WindowArg::Anchor) => Window::Anchor,
                Some(WindowArg::Fixed) => Window::Fixed,
            },
        });
        let blend = Blend {
            mean: match self.ref_mean {
                None | Some(MeanArg::Geometric) => Mean::Geometric,
                Some(MeanArg::Harmonic) => Mean::Harmonic,
                Some(MeanArg::Arithmetic) => Mean::Arithmetic,
                Some(MeanArg::MultiDpo) => Mean::MultiDpo,
            },
            weights: match self.ref_weights {
                Some(WeightsArg::Rule(ARWC)) => Weighting::Arwc,
                _ => Weighting::Step,
            },
            clip,
            level: match self.ref_level {
                Some(LevelArg::Token) => Level::Token,
                _ => Level::Sequence,
            },
            official_k2_swap: self.official_k2_swap,
        };
        let rule = match &self.ref_weights {
            Some(WeightsArg::Given(weights)) => Rule::Fixed(weights.clone()),
            Some(WeightsArg::Rule(DISCRIMINATION)) => Rule::ValidationDiscrimination,
            Some(WeightsArg::Rule(ACCURACY)) => Rule::ValidationAccuracy,
            Some(WeightsArg::Window(pairs)) => Rule::SlidingWindow { pairs: *pairs as usize },
            Some(WeightsArg::Rule(THOMPSON)) => Rule::Thompson { seed },
            _ => Rule::Uniform,
        };
        let moving = self.ref_sync_steps.map(|every| Moving { every, mixup: self.ref_mixup.unwrap_or(1.0) });
        References { models: self.ref_model.clone(), blend, rule, moving }
    }

    pub fn kl_penalty(&self) -> Option<KlPenaltyOptions> {
        self.kl_penalty.map(|weight| KlPenaltyOptions {
            weight,
            ref_weights: match &self.ref_weights {
                Some(WeightsArg::Given(weights)) => weights.clone(),
                _ => vec![1.0 / self.ref_model.len().max(1) as f64; self.ref_model.len().max(1)],
            },
            estimator: self.kl_estimator.map_or(Estimator::Exact, |EstimatorArg(estimator)| estimator),
        })
    }
}
