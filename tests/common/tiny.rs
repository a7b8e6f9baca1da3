//! Tiny models, one for each thing that an architecture can do differently, read from real `config.json` files;
//! examples to run them on; and a rig that runs them on any device.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use cuvee::checkpoint::TensorSource;
use cuvee::checkpoint::peft::{self, AdapterConfig};
use cuvee::data::{self, Example, Extent, Sequence};
use cuvee::device::{Arena, DType, Device, Dry, Ledger, Philox, Tensor};
use cuvee::model::{Acts, Batch, Checkpoint, Keep, Lora, Model, Options, Role, init_random};
use cuvee::ops::Backend;
use serde_json::{Value, json};
use tempfile::TempDir;

pub const SEED: u64 = 17;

#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Size {
    /// So small that every element can be moved.
    Tiny,
    /// More than one tile of the vocabulary, sequences longer than a block of keys, no friendly dimension.
    Small,
}

impl Size {
    pub fn vocab(self) -> usize {
        if self == Self::Tiny { 11 } else { 523 }
    }

    /// What all models of this size have in common. The initial weights are large, so that no probability is uniform.
    fn common(self) -> Value {
        let [hidden, mlp] = if self == Self::Tiny { [8, 10] } else { [24, 37] };
        json!({
            "vocab_size": self.vocab(), "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_act": "silu", "rms_norm_eps": 1e-5,
            "initializer_range": if self == Self::Tiny { 0.5 } else { 0.3 },
        })
    }

    /// What each model has of its own.
    pub fn models(self) -> Vec<(&'static str, Value)> {
        let window = if self == Self::Tiny { 3 } else { 19 };
        let scaling = json!({"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
        vec![
            ("llama", json!({"model_type": "llama", "attention_bias": true, "mlp_bias": true})),
            ("mistral", json!({"model_type": "mistral", "sliding_window": window})),
            ("qwen2", json!({"model_type": "qwen2", "tie_word_embeddings": true})),
            // The head is wider than hidden / heads, one key head serves all, and only the second layer has a window.
            (
                "qwen3",
                json!({"model_type": "qwen3", "head_dim": 10, "num_key_value_heads": 1, "use_sliding_window": true,
                    "sliding_window": window, "max_window_layers": 1}),
            ),
            // Four frequencies: one stays, one is blended, two are slowed. As many key heads as heads.
            (
                "llama3",
                json!({"model_type": "llama", "head_dim": 8, "num_key_value_heads": 4, "rope_parameters": scaling}),
            ),
            ("neox", merged(self.neox(), json!({"rotary_pct": 0.7}))),
            ("neox_sequential", merged(self.neox(), json!({"rotary_pct": 1.0, "use_parallel_residual": false}))),
            ("gpt2", self.gpt2()),
        ]
    }

    /// Without the keys that GPT-NeoX does not know.
    fn neox(self) -> Value {
        json!({"model_type": "gpt_neox", "num_attention_heads": 2, "num_key_value_heads": null, "rms_norm_eps": null,
            "hidden_act": "gelu"})
    }

    /// Other names for everything.
    fn gpt2(self) -> Value {
        let Value::Object(common) = self.common() else { unreachable!("an object") };
        let positions = if self == Self::Tiny { 8 } else { 160 };
        let mut config = json!({"model_type": "gpt2", "activation_function": "gelu_new", "n_positions": positions});
        for (key, other) in [
            ("hidden_size", "n_embd"),
            ("intermediate_size", "n_inner"),
            ("num_hidden_layers", "n_layer"),
            ("num_attention_heads", "n_head"),
        ] {
            config[other] = common[key].clone();
        }
        let none = common.keys().filter(|key| !["vocab_size", "initializer_range"].contains(&key.as_str()));
        merged(none.map(|key| (key.clone(), Value::Null)).collect::<serde_json::Map<_, _>>().into(), config)
    }

    /// A pair and a group that share their prompts and a single sequence, windows and blocks exceeded.
    pub fn examples(self) -> Vec<Example> {
        let example = |row: usize, prompt: usize, completions: &[usize]| {
            let random = Philox::new(SEED, row as u64);
            let id = |at: usize| (random.u64(at as u64) % self.vocab() as u64) as u32;
            let sequence = |(i, len): (usize, &usize)| {
                let own = (0..*len).map(|t| id(1000 * (i + 1) + t));
                Sequence::new((0..prompt).map(id).chain(own).collect(), prompt)
            };
            Example { row, sequences: completions.iter().enumerate().map(sequence).collect(), ..Example::default() }
        };
        match self {
            Self::Tiny => vec![example(0, 4, &[3, 2]), example(1, 2, &[3])],
            Self::Small => vec![
                example(0, 70, &[9, 13]),
                example(1, 1, &[1]),
                example(2, 20, &[50, 1, 7]),
                example(3, 1, &[33]),
                example(4, 3, &[130]),
            ],
        }
    }
}

/// A model folder with a configuration and, until somebody saves some, no weights.
pub struct Tiny {
    pub name: &'static str,
    pub checkpoint: Checkpoint,
    /// What trains beside the weights.
    pub lora: Option<Lora>,
    /// Until it is dropped, the folder is there.
    pub dir: TempDir,
}

pub fn all(size: Size) -> Vec<Tiny> {
    size.models().into_iter().map(|(name, own)| open(size, name, own)).collect()
}

/// The configuration of a classifier with so many labels.
pub fn classifier(labels: usize) -> Value {
    let names: serde_json::Map<_, _> = (0..labels).map(|i| (i.to_string(), json!("LABEL"))).collect();
    json!({"architectures": ["AnyForSequenceClassification"], "id2label": names, "problem_type": "regression"})
}

/// Every model as a reward model.
pub fn rewards(size: Size) -> Vec<Tiny> {
    size.models().into_iter().map(|(name, own)| open(size, name, merged(own, classifier(1)))).collect()
}

/// Every model under two adapters of other ranks, one of them negative, and with one that trains, of all linear layers.
/// `share` of them is applied. All of it, 1, is as much as the weights themselves, and makes models in which rounding grows from
/// layer to layer.
pub fn adapted(size: Size, share: f64) -> Vec<Tiny> {
    let adapted = |tiny: Tiny| {
        let mut checkpoint = tiny.checkpoint.clone();
        for (seed, rank, weight) in [(1, 3, 0.7), (2, 1, -0.4)] {
            let dir = tiny.dir.path().join(format!("adapter-{seed}"));
            write_adapter(&checkpoint, &dir, rank, seed);
            checkpoint = checkpoint.with_adapter(&dir, share * weight).unwrap();
        }
        Tiny {
            checkpoint,
            lora: Some(Lora { rank: 2, alpha: share * 3.0, rslora: false, targets: Vec::new(), start: None }),
            ..tiny
        }
    };
    all(size).into_iter().map(adapted).collect()
}

/// An adapter of random numbers for every linear layer, as PEFT keeps it.
pub fn write_adapter(checkpoint: &Checkpoint, dir: &Path, rank: usize, seed: u64) {
    let mut model = checkpoint.dry();
    let mut shapes: BTreeMap<String, [usize; 2]> = BTreeMap::new();
    let in_block =
        |name: &str| [".attn.", ".self_attn.", ".attention.", ".mlp."].iter().any(|part| name.contains(part));
    let params = model.params_mut().into_iter();
    for param in params.filter(|param| param.role == Role::Matrix && in_block(&param.name)) {
        let [outputs, inputs] = param.matrix_shape();
        let module = param.stored.tensor.strip_suffix(".weight").unwrap().to_string();
        shapes.entry(module).or_insert([0, inputs])[0] += outputs;
    }
    let tensor = |name: String, shape: [usize; 2]| TensorSource {
        shape: shape.to_vec(),
        fill: Box::new({
            let random = Philox::named(seed, &name);
            move |out: &mut [f32]| {
                out.iter_mut().enumerate().for_each(|(i, x)| *x = 0.3 * random.normal(i as u64) as f32);
                Ok(())
            }
        }),
        name,
    };
    let tensors: Vec<TensorSource> = shapes
        .iter()
        .flat_map(|(module, [outputs, inputs])| {
            [tensor(peft::a_name(module), [rank, *inputs]), tensor(peft::b_name(module), [*outputs, rank])]
        })
        .collect();
    let config = AdapterConfig {
        lora_rank: rank,
        lora_alpha: 2.0,
        target_modules: shapes.into_keys().collect(),
        ..AdapterConfig::default()
    };
    peft::write(dir, &config, &tensors).unwrap();
}

pub fn open(size: Size, name: &'static str, own: Value) -> Tiny {
    let dir = tempfile::tempdir().unwrap();
    write_config(dir.path(), &merged(size.common(), own));
    let checkpoint = Checkpoint::from_config(dir.path(), &dir.path().join("config.json")).unwrap();
    Tiny { name, checkpoint, lora: None, dir }
}

pub fn write_config(dir: &Path, config: &Value) {
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
}

pub fn merged(mut base: Value, changes: Value) -> Value {
    let Value::Object(changes) = changes else { panic!("changes are an object") };
    base.as_object_mut().unwrap().extend(changes);
    base
}

impl Tiny {
    /// Memory for a training step on a device that stores `storage`, measured.
    pub fn plan_in(&self, storage: DType, largest: &Extent, keep: Keep, trained: &dyn Fn(&str) -> bool) -> Ledger {
        Dry::measure(storage, |arena| self.build(arena, largest, keep, trained))
    }

    pub fn build<D: Device>(
        &self,
        arena: &mut Arena<D>,
        largest: &Extent,
        keep: Keep,
        trained: &dyn Fn(&str) -> bool,
    ) -> (Model<D>, Acts<D>, Batch<D>) {
        let (spec, naming) = (&self.checkpoint.spec, self.checkpoint.architecture.naming);
        let options = Options { trained, lora: self.lora.as_ref(), ..Options::frozen(largest.longest) };
        let model = Model::new(arena, spec, naming, options.with_adapters(&self.checkpoint));
        let acts = Acts::new(arena, spec, largest, keep).with_low_rank(arena, model.widest_rank());
        (model, acts, Batch::new(arena, largest))
    }
}

/// A model and all that a training step needs.
pub struct Rig<B: Backend> {
    pub device: B,
    pub model: Model<B>,
    pub acts: Acts<B>,
    pub batch: Batch<B>,
}

/// What a step computes: each target's log-probability, or each sequence's score, and each trained weight's gradient.
pub struct Step {
    pub logps: Vec<f64>,
    pub grads: BTreeMap<String, Vec<f64>>,
}

impl<B: Backend> Rig<B> {
    pub fn new(device: B, tiny: &Tiny, largest: &Extent, keep: Keep) -> Self {
        Self::training(device, tiny, largest, keep, &|_| true)
    }

    /// The weights depend on the architecture alone; norms are not 1 and biases are not 0.
    pub fn training(device: B, tiny: &Tiny, largest: &Extent, keep: Keep, trained: &dyn Fn(&str) -> bool) -> Self {
        let plan = tiny.plan_in(device.storage(), largest, keep, trained);
        let bytes = plan.total() / Dry::width(DType::F32) * B::width(DType::F32);
        let mut arena = Arena::with_bytes(&device, bytes).unwrap();
        let (mut model, acts, batch) = tiny.build(&mut arena, largest, keep, trained);
        init_random(&device, &mut model, SEED).unwrap();
        for param in model.params_mut() {
            let random = Philox::named(SEED + 1, &param.name);
            let normal = |i: usize| 0.3 * random.normal(i as u64) as f32;
            let values: Vec<f32> = match param.role {
                Role::Matrix => continue,
                Role::Bias => (0..param.value.len()).map(normal).collect(),
                Role::Norm => (0..param.value.len()).map(|i| 1.0 + normal(i)).collect(),
            };
            param.write(&device, &values).unwrap();
        }
        model.fill_adapters(&device, &tiny.checkpoint.adapters).unwrap();
        for param in model.adapter_mut() {
            let random = Philox::named(SEED + 2, &param.name);
            let values: Vec<f32> = (0..param.value.len()).map(|i| 0.5 * random.normal(i as u64) as f32).collect();
            param.write(&device, &values).unwrap();
        }
        Self { device, model, acts, batch }
    }

    pub fn forward(&mut self, host: &data::Batch) -> Vec<f64> {
        self.batch.load(&self.device, host).unwrap();
        self.model.forward(&self.device, &self.batch, &mut self.acts).unwrap();
        let mut logps = vec![0.0; host.targets.len()];
        self.device.read_f64(self.acts.top.logp.top(logps.len()), &mut logps).unwrap();
        logps
    }

    /// After `forward` of the same batch.
    pub fn backward(&mut self, host: &data::Batch) {
        self.model.backward(&self.device, &self.batch, &weights(host.targets.len()), &mut self.acts, None).unwrap();
    }

    pub fn step(&mut self, host: &data::Batch) -> Step {
        self.model.zero_grads(&self.device).unwrap();
        let logps = self.forward(host);
        self.backward(host);
        Step { logps, grads: self.grads() }
    }

    /// Of a reward model and a batch that is read at the ends of its sequences.
    pub fn scores(&mut self, host: &data::Batch) -> Vec<f64> {
        self.batch.load(&self.device, host).unwrap();
        self.model.scores(&self.device, &self.batch, &mut self.acts).unwrap();
        let mut scores = vec![0.0; host.sequences.len()];
        self.device.read_f64(self.acts.top.logp.top(scores.len()), &mut scores).unwrap();
        scores
    }

    /// A step of a reward model.
    pub fn score_step(&mut self, host: &data::Batch) -> Step {
        self.model.zero_grads(&self.device).unwrap();
        let logps = self.scores(host);
        let c = weights(logps.len());
        self.model.backward_scores(&self.device, &self.batch, &c, &mut self.acts).unwrap();
        Step { logps, grads: self.grads() }
    }

    pub fn grads(&mut self) -> BTreeMap<String, Vec<f64>> {
        let Self { device, model, .. } = self;
        let trained = model.trained_mut().into_iter().filter_map(|p| Some((p.name.clone(), p.grad.as_ref()?)));
        trained.map(|(name, grad)| (name, read(device, grad))).collect()
    }
}

/// All elements; exact, whatever the device computes in.
pub fn read<D: Device>(device: &D, tensor: &Tensor<D>) -> Vec<f64> {
    let mut values = vec![0.0; tensor.len()];
    device.read_f64(tensor.view(), &mut values).unwrap();
    values
}

/// The c of a scalar `sum_t c_t logp_t`: of both signs and several sizes.
pub fn weights(targets: usize) -> Vec<f64> {
    (0..targets).map(|t| ((t * 37 + 5) % 19) as f64 / 7.0 - 1.2).collect()
}
