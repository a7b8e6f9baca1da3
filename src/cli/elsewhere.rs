//! What users of other trainers type, and what it is here. clap's own guess, the nearest spelling, would mislead.

use clap::error::{ContextKind, ContextValue, ErrorKind};

use crate::error::Error;

const ELSEWHERE: &[(&[&str], &str)] = &[
    (&["lr"], "give --learning-rate"),
    (&["bf16", "fp16", "tf32"], "give --dtype bf16"),
    (&["torch-dtype"], "give --dtype"),
    (&["use-peft", "lora", "peft"], "--lora-rank N trains an adapter"),
    (&["lora-dropout"], "adapters have no dropout here; leave it out"),
    (&["optim"], "give --optimizer"),
    (&["dataset-name", "dataset-path", "train-file", "data"], "data is a file: give --dataset FILE"),
    (&["dataset-train-split", "dataset-test-split"], "a split is a file: give --dataset FILE and --eval-dataset FILE"),
    (&["eval-strategy", "evaluation-strategy"], "give --eval-steps N"),
    (&["save-strategy"], "give --save-steps N"),
    (
        &["load-best-model-at-end", "metric-for-best-model"],
        "--gold-reward with --on-alarm stop ends with the best checkpoint, --stop-when where a number is reached",
    ),
    (
        &["report-to", "logging-dir", "run-name", "wandb", "wandb-project"],
        "nothing is sent anywhere; metrics.jsonl, evaluations.jsonl and curves.svg are in the output folder",
    ),
    (&["logging-steps", "logging-strategy"], "every step is in metrics.jsonl; leave it out"),
    (
        &["push-to-hub", "hub-model-id"],
        "the output folder is a Hugging Face folder, which `hf upload` sends; leave it out",
    ),
    (&["packing", "padding-free"], "no batch is padded here; leave it out"),
    (
        &["precompute-ref-log-probs", "precompute-ref-batch-size"],
        "references are scored once, into a cache, in any case; leave it out",
    ),
    (&["completion-only-loss"], "of a row with a prompt the completion alone is scored in any case; leave it out"),
    (&["use-vllm", "vllm-mode", "use-transformers-paged"], "completions are sampled by cuvee itself; leave it out"),
    (&["reward-weights"], "a weight stands behind its reward: --reward FILE=WEIGHT"),
    (&["use-liger-kernel", "attn-implementation"], "the kernels are cuvee's own; leave it out"),
    (&["dataset-num-proc", "dataloader-num-workers"], "give --threads"),
    (&["deepspeed", "fsdp", "num-processes"], "cuvee computes on one GPU; leave it out"),
];

/// What to do instead, where `error` is about one of these flags.
pub fn answer(error: &clap::Error) -> Option<Error> {
    if error.kind() != ErrorKind::UnknownArgument {
        return None;
    }
    let Some(ContextValue::String(flag)) = error.get(ContextKind::InvalidArg) else { return None };
    let name = flag.trim_start_matches('-').split('=').next().unwrap_or_default();
    let (_, answer) = ELSEWHERE.iter().find(|(names, _)| names.contains(&name))?;
    Some(Error::option(format!("--{name}"), format!("is no flag of cuvee; {answer}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(flag: &str) -> String {
        let line = ["cuvee", "train", "--model", "m", flag].map(std::ffi::OsString::from);
        match super::super::parse(line).unwrap_err() {
            super::super::Failure::Error(error) => error.to_string(),
            super::super::Failure::Clap(error) => error.to_string(),
        }
    }

    #[test]
    fn other_trainers_flags_are_answered_and_none_is_ours() {
        for name in ELSEWHERE.iter().flat_map(|(names, _)| *names) {
            let message = refused(&format!("--{name}"));
            assert!(message.starts_with(&format!("--{name}: is no flag of cuvee; ")), "{message}");
        }
        assert!(refused("--report_to=wandb").starts_with("--report-to: is no flag"));
        assert!(refused("--lora-rnak").contains("--lora-rank"));
    }
}
