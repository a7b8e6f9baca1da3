//! Files in and out: Hugging Face weights, their companions, and the life of an output folder.
//!
//! Everything written here appears whole or not at all: a temporary name beside the target, a sync, a rename,
//! and a sync of the parent folder. A crash leaves the older file and at most a `*.tmp`.

pub mod atomic;
pub mod hf;
pub mod json;
pub mod peft;
pub mod run_dir;
pub mod save;
pub mod stream;
pub mod weights;

pub use atomic::{write_dir, write_file};
pub use save::{SaveDtype, TensorSource, save_safetensors};
pub use stream::{Layout, Sink, stream_model};
pub use weights::Weights;
