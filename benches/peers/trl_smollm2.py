"""DPO of SmolLM2-135M-Instruct with TRL's DPOTrainer: losses, gradient norms, seconds and memory of each step.

    python benches/peers/trl_smollm2.py MODEL_DIR PAIRS.jsonl OUT.jsonl [--steps 5] [--mode live|precomputed|bf16]
        [--device cpu|cuda] [--liger] [--lora-rank N]

live         f32, the reference runs in every step (TRL's default)
precomputed  f32, the reference is scored before training (precompute_ref_log_probs)
bf16         as live, weights and arithmetic in bfloat16

With --lora-rank PEFT adapts every linear layer, alpha twice the rank, and the reference is the model without the adapter.

Each step trains on the next 4 rows of PAIRS (prompt, chosen, rejected as text), beta 0.1, learning rate 1e-6 falling
linearly, at most 512 tokens, no dropout. The same with cuvee:

    cuvee train --objective sigmoid --beta 0.1 --learning-rate 1e-6 --per-device-train-batch-size 4 --max-length 512 \
        --on-overflow truncate --no-shuffle --max-steps 5 --model MODEL_DIR --dataset PAIRS.jsonl --output-dir OUT

Needs torch, transformers 5.23, trl 1.16 and datasets (CPU wheels are enough).
"""
import argparse
import json
import os
import resource
import sys
import tempfile
import time

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1")
if "cuda" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer

parser = argparse.ArgumentParser()
parser.add_argument("model")
parser.add_argument("pairs")
parser.add_argument("out")
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--mode", choices=["live", "precomputed", "bf16"], default="live")
parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
parser.add_argument("--lora-rank", type=int)
parser.add_argument("--liger", action="store_true", help="with Liger's kernels, on a GPU")
a = parser.parse_args()
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


with open(a.pairs, encoding="utf-8") as f:
    rows = [{k: r[k] for k in ("prompt", "chosen", "rejected")} for r in map(json.loads, f)]
dtype = torch.bfloat16 if a.mode == "bf16" else torch.float32
load = lambda: AutoModelForCausalLM.from_pretrained(a.model, dtype=dtype)
lora = None
if a.lora_rank:
    from peft import LoraConfig

    lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=a.lora_rank, lora_alpha=2 * a.lora_rank)
timed = Timed()
with tempfile.TemporaryDirectory() as d:
    args = DPOConfig(
        output_dir=d, max_steps=a.steps, per_device_train_batch_size=4, learning_rate=1e-6, lr_scheduler_type="linear",
        max_grad_norm=1.0, beta=0.1, loss_type=["sigmoid"], max_length=512, logging_steps=1, report_to=[], use_cpu=a.device == "cpu",
        use_liger_kernel=a.liger,
        bf16=False, fp16=False, save_strategy="no", gradient_checkpointing=False, seed=42, disable_tqdm=True,
        precompute_ref_log_probs=a.mode == "precomputed",
    )
    built = time.perf_counter()
    trainer = Sequential(
        model=load(), ref_model=None if lora else load(), peft_config=lora, args=args, train_dataset=Dataset.from_list(rows[: 4 * a.steps]),
        processing_class=AutoTokenizer.from_pretrained(a.model), callbacks=[timed],
    )
    started = time.perf_counter()
    trainer.train()
    wall = time.perf_counter() - started
    with open(a.out, "w") as f:
        for line, seconds in zip((l for l in trainer.state.log_history if "loss" in l), timed.times):
            f.write(json.dumps({**line, "step_time": seconds}) + "\n")
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
print(json.dumps({
    "mode": a.mode, "steps": a.steps, "construction_s": started - built, "train_s": wall, "steps_s": sum(timed.times),
    "peak_gib": peak,
}))
