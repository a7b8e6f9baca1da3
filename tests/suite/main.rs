mod anomalies;
mod cache;
mod cli;
#[path = "../common/mod.rs"]
mod common;
mod exactness;
mod lora;
mod model;
mod multi_ref;
mod objectives;
mod ops;
mod peft;
mod program;
mod references;
mod reward;
mod step;
mod tiny;
mod token_kl;
