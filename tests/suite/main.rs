mod anomalies;
mod cli;
mod exactness;
mod objectives;
mod program;
