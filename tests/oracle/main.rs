//! Numbers of others: golden values, Hugging Face models with the log-probabilities and gradients that
//! transformers computes for them, TRL's losses and tokens. One named test per file or folder.

mod chat;
mod fixtures;
mod golden;

use std::path::PathBuf;

fn main() {
    let args = libtest_mimic::Arguments::from_args();
    let root = PathBuf::from(std::env::var_os("CUVEE_TEST_ROOT").unwrap_or_else(|| ".".into()));
    let trials = golden::trials(&root).into_iter().chain(fixtures::trials(&root)).chain(chat::trials(&root)).collect();
    libtest_mimic::run(&args, trials).exit();
}
