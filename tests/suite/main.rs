mod common;
mod objectives;
mod ops;
