mod anomalies;
mod cli;
#[path = "../common/mod.rs"]
mod common;
mod exactness;
mod model;
mod objectives;
mod ops;
mod program;
mod step;
mod tiny;
mod token_kl;
