mod common;
mod model;
mod objectives;
mod ops;
mod step;
mod tiny;
