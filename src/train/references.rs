//! The references of a run: which there are, what each of them scores, and what must fit for that.

use super::settings::Settings;
use super::task::{Task, check_positions, check_vocabulary, start};
use crate::data::{Dataset, EncodeOptions, Example, Extent, Tokenizer};
use crate::device::{DType, Dry};
use crate::error::{Error, Result};
use crate::model::{Checkpoint, Init, RefHeads};
use crate::objectives::Objective;
use crate::progress::say;
use crate::references::{Asked, Reference};

/// A reference and, where its tokenizer is another, the texts as its tokens.
pub struct TaskReference {
    pub reference: Reference,
    pub own: Option<OwnTokens>,
}

/// A reference that is asked about completions that nobody has seen before.
pub struct FreshReference {
    pub checkpoint: Checkpoint,
    pub init: Init,
    /// Its own, where it is another than the policy's.
    pub tokenizer: Option<Tokenizer>,
    /// It is the policy without the adapter that trains.
    pub is_policy: bool,
}

impl FreshReference {
    pub fn asked(&self, largest: Extent) -> Asked<'_> {
        Asked { checkpoint: &self.checkpoint, init: self.init, largest, own_tokens: self.tokenizer.is_some() }
    }
}

/// The examples of a run under another tokenizer, in the order of the policy's.
pub struct OwnTokens {
    pub train: Vec<Example>,
    pub eval: Vec<Example>,
}

impl TaskReference {
    /// What it scores: the training examples and those held out.
    pub fn examples<'a>(&'a self, task: &'a Task) -> (&'a [Example], &'a [Example]) {
        match &self.own {
            Some(own) => (&own.train, &own.eval),
            None => (&task.train.examples, task.eval.as_ref().map_or(&[], |eval| &eval.examples)),
        }
    }
}

/// The references to be scored for an objective: those named, or else the policy as it starts.
pub fn references(settings: &Settings, objective: &dyn Objective) -> Result<Vec<Reference>> {
    if *objective.needs().refs.end() == 0 || settings.references.moving.is_some() {
        return Ok(Vec::new());
    }
    if settings.references.models.is_empty() {
        return Ok(vec![Reference::model(start(settings)?, settings.init)]);
    }
    settings.references.models.iter().map(|path| Reference::open(path)).collect()
}

/// What a reference that follows the policy starts as, where it is named. It must have the policy's weights to move to.
pub fn moving_start(settings: &Settings, checkpoint: &Checkpoint) -> Result<Option<Checkpoint>> {
    let (Some(_), Some(dir)) = (settings.references.moving, settings.references.models.first()) else {
        return Ok(None);
    };
    let start = Checkpoint::open(dir)?;
    if start.spec == checkpoint.spec && start.architecture.model_type == checkpoint.architecture.model_type {
        return Ok(Some(start));
    }
    let detail = format!("{} has other shapes than --model, so it cannot follow it; leave it out", dir.display());
    Err(Error::option("--ref-model", detail))
}

/// What evaluations compare with, if not the first reference. One that follows the policy would say that nothing was learnt: there it
/// is what that one started as.
pub fn anchor(settings: &Settings, held_out: bool) -> Result<Option<Reference>> {
    let follows = settings.references.moving.is_some() && held_out;
    let named = follows.then(|| settings.references.models.first()).flatten();
    match settings.anchor.as_ref().or(named) {
        Some(path) => Reference::open(path).map(Some),
        None => follows.then(|| Ok(Reference::model(start(settings)?, settings.init))).transpose(),
    }
}

/// The references whose distance from the policy is measured: the anchor, or else the first, and the others.
pub fn fresh_references(
    settings: &Settings,
    references: &[TaskReference],
    anchor: Option<&Reference>,
    tokenizer: &Tokenizer,
) -> Result<Vec<FreshReference>> {
    if settings.kl_samples == 0 {
        return Ok(Vec::new());
    }
    let of = |reference: &Reference| fresh_reference("--kl-samples", reference, tokenizer);
    let is_policy = policy_is_reference(settings);
    let own = |reference: &TaskReference| Ok(FreshReference { is_policy, ..of(&reference.reference)? });
    let fresh = anchor.into_iter().map(of).chain(references.iter().map(own)).collect::<Result<Vec<_>>>()?;
    if fresh.is_empty() && settings.rollouts.is_none() {
        let detail = "measures the distance from a reference, and there is none; give --eval-anchor, or drop it";
        return Err(Error::option("--kl-samples", detail));
    }
    Ok(fresh)
}

/// The reference is the policy without the adapter that trains.
fn policy_is_reference(settings: &Settings) -> bool {
    let drawn = settings.lora.as_ref().is_some_and(|lora| lora.start.is_none());
    drawn && settings.references.models.is_empty()
}

/// A reference that can be asked about new completions, as `flag` wants it.
fn fresh_reference(flag: &str, reference: &Reference, tokenizer: &Tokenizer) -> Result<FreshReference> {
    let (Some(checkpoint), Some(init)) = (reference.checkpoint(), reference.init()) else {
        let path = reference.path().display();
        let detail = format!("asks references about new completions, and {path} holds only what was asked before");
        return Err(Error::option(flag, detail));
    };
    let checkpoint = checkpoint.clone();
    let own = !tokenizer.shares_vocabulary(&checkpoint.dir)?;
    let tokenizer = own.then(|| Tokenizer::load(&checkpoint.dir)).transpose()?;
    Ok(FreshReference { checkpoint, init, tokenizer, is_policy: false })
}

/// The references that are asked about completions which are trained on; none where the data's are.
pub fn references_of_samples(
    settings: &Settings,
    references: &[TaskReference],
    tokenizer: &Tokenizer,
) -> Result<Vec<FreshReference>> {
    if settings.rollouts.is_none() {
        return Ok(Vec::new());
    }
    let is_policy = policy_is_reference(settings);
    let of = |TaskReference { reference, .. }: &TaskReference| {
        let fresh = fresh_reference("--reward", reference, tokenizer)?;
        if fresh.tokenizer.is_some() {
            let dir = fresh.checkpoint.dir.display();
            let detail = format!("{dir} has another vocabulary than --model; it cannot be asked about sampled tokens");
            return Err(Error::option("--ref-model", detail));
        }
        Ok(FreshReference { is_policy, ..fresh })
    };
    references.iter().map(of).collect()
}

/// The references of a run with what each of them scores.
pub fn task_references(
    settings: &Settings,
    objective: &dyn Objective,
    tokenizer: &Tokenizer,
    train: &Dataset,
    eval: Option<&Dataset>,
) -> Result<Vec<TaskReference>> {
    let needs = objective.needs();
    let of = |reference: Reference| {
        let Some(checkpoint) = reference.checkpoint() else { return Ok(TaskReference { reference, own: None }) };
        let Some(own_train) = own_tokens(train, tokenizer, checkpoint)? else {
            eval.map(|eval| own_tokens(eval, tokenizer, checkpoint)).transpose()?;
            return Ok(TaskReference { reference, own: None });
        };
        let per_token = [
            (needs.ref_token_logps, "log-probabilities of each token"),
            (needs.token_kl, "distributions over the policy's tokens"),
            (needs.mismatched, "completions put under other prompts token by token"),
        ];
        if let Some((_, what)) = per_token.iter().find(|(needed, _)| *needed) {
            let (dir, name) = (checkpoint.dir.display(), objective.name());
            let detail = format!(
                "{dir} has another tokenizer than --model, so only whole completions can be compared; {name} as it is set up here reads {what}"
            );
            return Err(Error::option("--ref-model", detail));
        }
        let eval = eval.map(|eval| own_tokens(eval, tokenizer, checkpoint)).transpose()?.flatten();
        let own = OwnTokens { train: own_train.examples, eval: eval.map(|eval| eval.examples).unwrap_or_default() };
        say(format_args!("{}: scores the texts as tokens of its own", checkpoint.dir.display()));
        Ok(TaskReference { own: Some(own), reference })
    };
    references(settings, objective)?.into_iter().map(of).collect()
}

/// The rows of a data set as the tokenizer and the chat template of a reference write them; `None` where its tokens mean
/// the same as the policy's.
pub fn own_tokens(dataset: &Dataset, policy: &Tokenizer, reference: &Checkpoint) -> Result<Option<Dataset>> {
    if policy.shares_vocabulary(&reference.dir)? {
        check_vocabulary(reference, [dataset])?;
        return check_positions(reference, [dataset]).map(|()| None);
    }
    let dir = reference.dir.display();
    if dataset.truncated > 0 {
        let detail = format!(
            "{} rows of {} are cut, and {dir}, whose tokenizer is another, cannot be asked about a text that ends within it; use --on-overflow drop",
            dataset.truncated,
            dataset.path.display()
        );
        return Err(Error::option("--on-overflow", detail));
    }
    let mut theirs = Dataset::load(
        &dataset.path,
        &Tokenizer::load(&reference.dir)?,
        &EncodeOptions { assistant_only: dataset.options.assistant_only, ..EncodeOptions::default() },
    )?;
    check_vocabulary(reference, [&theirs])?;
    check_positions(reference, [&theirs])?;
    let mut examples = std::mem::take(&mut theirs.examples);
    let of = |example: &Example| {
        let Ok(at) = examples.binary_search_by_key(&example.row, |theirs| theirs.row) else {
            let skip = theirs.skipped.iter().find(|(row, _)| *row == example.row).map(|(_, skip)| skip.to_string());
            let (at, why) = (theirs.place(example.row), skip.unwrap_or_default());
            let detail = format!("{at} of {} has no tokens that {dir} could score: {why}", dataset.path.display());
            return Err(Error::option("--ref-model", detail));
        };
        let mut sequences = std::mem::take(&mut examples[at].sequences);
        sequences.truncate(example.sequences.len());
        Ok(Example { sequences, ..example.clone() })
    };
    theirs.examples = dataset.examples.iter().map(of).collect::<Result<_>>()?;
    Ok(Some(theirs))
}

/// Distributions can be compared where references have weights and the policy's vocabulary.
pub fn check_compared(references: &[TaskReference], policy: &Checkpoint) -> Result<()> {
    let weights = |TaskReference { reference, .. }: &'_ TaskReference| match reference.checkpoint() {
        Some(_) => Ok(()),
        None => {
            let path = reference.path().display();
            let detail = format!(
                "compares whole distributions, and {path} holds the data's tokens alone; give the model, or --kl-estimator k3"
            );
            Err(Error::option("--kl-penalty", detail))
        }
    };
    references.iter().try_for_each(weights)?;
    let checkpoints: Vec<&Checkpoint> = references.iter().filter_map(|r| r.reference.checkpoint()).collect();
    RefHeads::new(&mut Dry::arena(DType::F32), &policy.spec, &checkpoints).map(|_| ())
}

/// The anchor scores held-out completions as the policy's tokens.
pub fn check_anchor(checkpoint: &Checkpoint, tokenizer: &Tokenizer, eval: Option<&Dataset>) -> Result<()> {
    if !tokenizer.shares_vocabulary(&checkpoint.dir)? {
        let dir = checkpoint.dir.display();
        return Err(Error::option("--eval-anchor", format!("{dir} has another vocabulary than --model")));
    }
    check_vocabulary(checkpoint, eval)?;
    check_positions(checkpoint, eval)
}
