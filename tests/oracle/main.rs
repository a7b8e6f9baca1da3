//! Numbers of others: golden values, Hugging Face models with the log-probabilities and gradients that
//! transformers computes for them, scores of reward models, PEFT's adapters, TRL's losses and tokens, the memory that the system counts, tasks as lm-evaluation-harness judges them. One named test per file
//! or folder.

mod chat;
mod fixtures;
mod golden;
mod lora;
mod memory;
mod reward;
#[path = "../common/fixtures.rs"]
mod shared;
mod tasks;

use std::path::PathBuf;

fn main() {
    let args = libtest_mimic::Arguments::from_args();
    let root = PathBuf::from(std::env::var_os("CUVEE_TEST_ROOT").unwrap_or_else(|| ".".into()));
    let all = [
        golden::trials(&root),
        fixtures::trials(&root),
        chat::trials(&root),
        reward::trials(&root),
        lora::trials(&root),
        memory::trials(&root),
        tasks::trials(&root),
    ];
    let trials = all.into_iter().flatten().collect();
    libtest_mimic::run(&args, trials).exit();
}
