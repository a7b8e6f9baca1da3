//! From a file of preferences to what a step trains on: rows, token sequences, prefix-tree batches.
//! Everything here is host code; it knows no device and no model.
//!
//! ```text
//! train.jsonl.gz --read_rows--> Row --Dataset::load--> Example --epoch_order, pack--> Batch
//! ```

mod batch;
mod dataset;
mod jsonl;
mod order;
mod packing;
mod tokenizer;

pub use batch::{Batch, Extent, Segment, Sharing, extent_of, pack, rows_of};
pub use dataset::{Dataset, EncodeOptions, Example, Merge, Overflow, Sequence, Skip};
pub use jsonl::{Form, Row, read_rows};
pub use order::epoch_order;
pub use packing::Packing;
pub use tokenizer::Tokenizer;
