mod common;
mod model;
mod objectives;
mod ops;
mod tiny;
