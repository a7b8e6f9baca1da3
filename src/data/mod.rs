//! From a file of preferences to what a step trains on: rows, token sequences, prefix-tree batches.
//! Everything here is host code; it knows no device and no model.
//!
//! ```text
//! train.jsonl.gz --read_rows--> Row --Dataset::load--> Example --epoch_order, pack--> Batch
//! ```

mod batch;
mod chat;
mod conversation;
mod dataset;
mod encode;
mod lint;
mod mismatch;
mod order;
mod packing;
mod prompts;
mod records;
mod rows;
mod tokenizer;

pub use batch::{Batch, Extent, Read, Segment, Sharing, Temperature, extent_of, pack, rows_of};
pub use chat::ChatTemplate;
pub use conversation::{Content, Message};
pub use dataset::{Dataset, Example, Merge, Sequence, label_name};
pub use encode::{EncodeOptions, Overflow, Skip, encode_row};
pub use lint::Lint;
pub use mismatch::mismatched;
pub use order::epoch_order;
pub use packing::Packing;
pub use prompts::{Prompt, read_prompts};
pub use records::{Object, read_objects};
pub use rows::{Form, Parts, Row, read_rows};
pub use tokenizer::{Piece, Tokenizer};
