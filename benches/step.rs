//! Time of a whole optimizer step of DPO with a scored reference: forward, loss, backward, clipping, AdamW. Elements per
//! second are FLOP/s of the products and of attention's visible pairs, a multiply-add being two.
//!
//! `cargo bench --bench step`; the group `peak` of `cargo bench --bench ops` is the yardstick.

use std::path::Path;
use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use cuvee::data::{Batch as HostBatch, Example, Packing, Read, Sequence, Sharing};
use cuvee::device::{Cpu, DType, Dry};
use cuvee::model::{Acts, Batch, Checkpoint, Keep, Model, Options, init_random};
use cuvee::objectives::{Choice, Params};
use cuvee::optim::{self, Hyper};
use cuvee::train::{Blueprint, StepBatch, step};

const HYPER: Hyper = Hyper { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0, max_grad_norm: 1.0 };

/// A model by its configuration, with random weights, and the pairs of a step.
struct Case {
    name: &'static str,
    config: &'static str,
    vocab: u32,
    pairs: usize,
    /// Tokens of a prompt and of each of its two completions.
    pair: [usize; 2],
}

const CASES: [Case; 2] = [
    Case {
        name: "quickstart",
        config: r#"{"model_type": "llama", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2,
            "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 2048, "tie_word_embeddings": true}"#,
        vocab: 2048,
        pairs: 16,
        pair: [4, 30],
    },
    Case {
        name: "smollm2-135m",
        config: r#"{"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
            "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": true}"#,
        vocab: 49_152,
        pairs: 4,
        pair: [128, 64],
    },
];

impl Case {
    fn examples(&self) -> Vec<Example> {
        let [prompt, completion] = self.pair;
        let ids = |of: usize, len: usize| (0..len).map(move |i| (of * 7919 + i * 104_729) as u32);
        let sequence = |pair: usize, side: usize| {
            let ids = ids(pair, prompt).chain(ids(1000 + 2 * pair + side, completion)).map(|id| id % self.vocab);
            Sequence { ids: ids.collect(), first: prompt }
        };
        (0..self.pairs)
            .map(|row| Example { row, sequences: vec![sequence(row, 0), sequence(row, 1)], ..Example::default() })
            .collect()
    }

    fn checkpoint(&self) -> Checkpoint {
        let file = tempfile::Builder::new().suffix(".json").tempfile().expect("a temporary file");
        std::fs::write(file.path(), self.config).expect("written");
        Checkpoint::from_config(Path::new("."), file.path()).expect("a configuration of ours")
    }
}

/// FLOPs of forward and backward.
fn flops(checkpoint: &Checkpoint, host: &HostBatch) -> u64 {
    let (dry, mut arena, size) = (Dry::default(), Dry::arena(DType::F32), host.extent());
    let options = Options::train_all(size.longest);
    let mut model = Model::new(&mut arena, &checkpoint.spec, checkpoint.architecture.naming, options);
    let mut acts = Acts::new(&mut arena, &checkpoint.spec, &size, Keep::Everything);
    let mut batch = Batch::new(&mut arena, &size);
    batch.load(&dry, host).expect("it fits");
    model.forward(&dry, &batch, &mut acts).expect("counted");
    model.backward(&dry, &batch, &vec![0.0; size.targets], &mut acts, None).expect("counted");
    dry.flops()
}

fn steps(c: &mut Criterion) {
    let mut group = c.benchmark_group("step");
    group.sample_size(10).warm_up_time(Duration::from_secs(2));
    for case in &CASES {
        let (cpu, checkpoint, examples) = (Cpu::new(0).expect("threads start"), case.checkpoint(), case.examples());
        let examples: Vec<&Example> = examples.iter().collect();
        let packing = Packing { budget: 2048, sharing: Sharing::On, read: Read::Completions };
        let host = HostBatch::new(examples.iter().copied(), packing.sharing);
        let largest = host.extent();
        let (optimizer, positions) = (optim::find("adamw").expect("registered"), largest.longest);
        let keep = Keep::Everything;
        let blueprint = Blueprint { checkpoint: &checkpoint, optimizer, hyper: HYPER, largest, positions, keep };
        let mut policy = blueprint.build(&cpu).expect("memory");
        init_random(&cpu, &mut policy.model, 1).expect("filled");
        let objective = Choice::one("sigmoid", Params::from_iter([("beta", 0.1)])).build().expect("registered");
        let scored = vec![[-1.0, -2.0]; examples.len()];
        let ref_logps = vec![scored.iter().map(|sums| sums.as_slice()).collect::<Vec<_>>()];
        let mut count = 0;
        group.throughput(Throughput::Elements(flops(&checkpoint, &host)));
        group.bench_function(format!("{} {} tokens", case.name, largest.rows), |b| {
            b.iter(|| {
                count += 1;
                let batch = StepBatch { examples: &examples, ref_logps: &ref_logps };
                step(&cpu, &mut policy, objective.as_ref(), packing, &batch, count, 1e-6).expect("a finite step")
            });
        });
    }
    group.finish();
}

criterion_group!(benches, steps);
criterion_main!(benches);
