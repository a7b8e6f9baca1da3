"""The quickstart with TRL's DPOTrainer on the CPU: same model, pairs, order and settings, in f32.

    python benches/peers/trl_quickstart.py OUT.jsonl [STEPS]

writes one line a step with the names of cuvee's metrics.jsonl, and prints the wall time of training. Compare with
    cuvee train recipes/quickstart.toml --no-shuffle --max-steps STEPS
Needs torch, transformers 5.23, trl 1.16 and datasets (CPU wheels are enough).
"""
import gzip
import json
import os
import sys
import tempfile
import time

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TRL_EXPERIMENTAL_SILENCE="1")
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

OUT, STEPS = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 100
ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "assets")
torch.set_num_threads(os.cpu_count())


class Sequential(DPOTrainer):
    def _get_train_sampler(self, dataset=None):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Timed(TrainerCallback):
    def __init__(self):
        self.times, self.start = [], None

    def on_step_begin(self, *a, **k):
        self.start = time.perf_counter()

    def on_step_end(self, *a, **k):
        self.times.append(time.perf_counter() - self.start)


with gzip.open(os.path.join(ROOT, "film-reviews", "train.jsonl.gz"), "rt", encoding="utf-8") as f:
    rows = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in map(json.loads, f)]
model_dir = os.path.join(ROOT, "review-llama-656k")
load = lambda: AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
timed = Timed()
with tempfile.TemporaryDirectory() as d:
    args = DPOConfig(
        output_dir=d, max_steps=STEPS, per_device_train_batch_size=16, learning_rate=5e-4, warmup_steps=-(-STEPS // 10),
        lr_scheduler_type="linear", max_grad_norm=1.0, beta=0.1, loss_type=["sigmoid"], logging_steps=1, report_to=[],
        use_cpu=True, bf16=False, fp16=False, save_strategy="no", gradient_checkpointing=False, seed=42,
        disable_tqdm=True,
    )
    trainer = Sequential(
        model=load(), ref_model=load(), args=args, train_dataset=Dataset.from_list(rows[: 16 * STEPS]),
        processing_class=AutoTokenizer.from_pretrained(model_dir), callbacks=[timed],
    )
    started = time.perf_counter()
    trainer.train()
    wall = time.perf_counter() - started
    with open(OUT, "w") as f:
        for line, seconds in zip((l for l in trainer.state.log_history if "loss" in l), timed.times):
            f.write(json.dumps({**line, "step_time": seconds}) + "\n")
print(f"{STEPS} steps in {wall:.1f} s")
