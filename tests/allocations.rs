//! Once a step has run, running it again takes no memory: what the kernels need was planned, and is kept. Only the host's
//! bookkeeping, small vectors of a few numbers per sequence, may come and go.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use cuvee::data::{Batch as HostBatch, Example, Sequence, Sharing};
use cuvee::device::{Arena, Cpu, DType, Dry};
use cuvee::model::{Acts, Batch, Checkpoint, Keep, Model, Options, init_random};

/// Counts what is asked for.
struct Counting;

static BYTES: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        BYTES.fetch_add(layout.size(), Ordering::Relaxed);
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        // SAFETY: as asked by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: as asked by the caller.
        unsafe { System.dealloc(start, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 1031, "tie_word_embeddings": true}"#;

/// Threads of this process.
fn threads() -> usize {
    std::fs::read_dir("/proc/self/task").map_or(0, |tasks| tasks.count())
}

#[test]
fn a_pass_takes_no_memory_and_starts_no_thread() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.json");
    std::fs::write(&config, CONFIG).unwrap();
    let checkpoint = Checkpoint::from_config(folder.path(), &config).unwrap();
    let sequence = |from: u32, len: u32| Sequence::new((0..40).chain(from..from + len).collect(), 40);
    let pair =
        |row: usize| Example { row, sequences: vec![sequence(100, 70), sequence(300, 90)], ..Example::default() };
    let host = HostBatch::new(&[pair(0), pair(1), pair(2)], Sharing::On);

    let (cpu, size) = (Cpu::new(2).unwrap(), host.extent());
    let (spec, naming, options) = (&checkpoint.spec, checkpoint.architecture.naming, Options::train_all(size.longest));
    let mut dry = Dry::arena(DType::F32);
    Model::new(&mut dry, spec, naming, options);
    Acts::<Dry>::new(&mut dry, spec, &size, Keep::Inputs);
    Batch::<Dry>::new(&mut dry, &size);
    let mut arena = Arena::new(&cpu, &dry.ledger()).unwrap();
    let mut model = Model::new(&mut arena, spec, naming, options);
    let mut acts = Acts::new(&mut arena, spec, &size, Keep::Inputs);
    let mut batch = Batch::new(&mut arena, &size);
    init_random(&cpu, &mut model, 1).unwrap();
    batch.load(&cpu, &host).unwrap();
    let dlogp = vec![0.1; size.targets];
    let mut pass = || {
        model.forward(&cpu, &batch, &mut acts).unwrap();
        model.backward(&cpu, &batch, &dlogp, &mut acts, None).unwrap();
    };
    // Which thread takes which task is chance: give each the chance to grow its scratch.
    (0..20).for_each(|_| pass());
    let before = threads();
    BYTES.store(0, Ordering::Relaxed);
    LARGEST.store(0, Ordering::Relaxed);
    (0..5).for_each(|_| pass());
    let (bytes, largest) = (BYTES.load(Ordering::Relaxed) / 5, LARGEST.load(Ordering::Relaxed));
    println!("{bytes} bytes a pass, the largest piece {largest}");
    // rayon's queue of jobs from outside takes a block of some hundred bytes for every few dozen of them.
    assert!(bytes < 8 << 10 && largest < 2 << 10, "{bytes} bytes a pass, the largest piece {largest}");
    assert_eq!(threads(), before);
}
