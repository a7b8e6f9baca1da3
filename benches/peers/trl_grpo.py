"""A GRPO run of cuvee, step by step through TRL's GRPOTrainer: the same completions and rewards, hence the same numbers.

    python benches/peers/trl_grpo.py RUN [--time]

RUN is the folder of a run with `--objective grpo` (or dapo, dr_grpo, bnpo), f32, `--num-iterations` 1 or more. TRL starts from the
same model and is given, batch by batch, the prompts, tokens and rewards of RUN/rollouts.jsonl instead of sampling; both then
compute log-probabilities, advantages, loss, gradient and update by themselves. Prints both losses, gradient norms and KLs of every
step, and the largest differences; then that of the weights after the last step. With `--time` TRL samples for itself, as many
tokens, and the seconds of its steps are printed beside cuvee's.

Needs torch, transformers 5.23, trl 1.16 and datasets (CPU wheels are enough).
"""
import argparse
import json
import os
import pathlib
import statistics
import tempfile
import time
import tomllib

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TRL_EXPERIMENTAL_SILENCE="1")
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

parser = argparse.ArgumentParser()
parser.add_argument("run", type=pathlib.Path)
parser.add_argument("--time", action="store_true")
a = parser.parse_args()
torch.set_num_threads(os.cpu_count())
recipe = tomllib.loads((a.run / "recipe.toml").read_text())
model_dir = (a.run / recipe["model"]).resolve()
steps, group, iterations = recipe["max_steps"], recipe["num_generations"], recipe.get("num_iterations", 1)
rollouts = [json.loads(line) for line in open(a.run / "rollouts.jsonl", encoding="utf-8")]
batch = recipe["per_device_train_batch_size"] * group
assert len(rollouts) == batch * steps // iterations, "the run has other completions than its recipe asks for"
weights = {}
for table in tomllib.loads(pathlib.Path(a.run / recipe["reward"][0].partition("=")[0]).resolve().read_text())["reward"]:
    weights[table.get("name", table["kind"])] = table.get("weight", 1.0)
tokenizer = AutoTokenizer.from_pretrained(model_dir)
tokenizer.padding_side = "left"
if tokenizer.pad_token is None:
    tokenizer.pad_token = tokenizer.eos_token
calls = [0]


def replay(prompts, trainer):
    rows = rollouts[calls[0] * batch:][:batch]
    calls[0] += 1
    assert [row["prompt"] for row in rows] == list(prompts)
    ids = [row["completion_ids"] for row in rows]
    # Not read: nothing here comes from another engine.
    return {"prompt_ids": tokenizer(list(prompts))["input_ids"], "completion_ids": ids, "logprobs": [[0.0] * len(i) for i in ids],
            "reward": [sum(weights[name] * said for name, said in row["rewards"].items()) for row in rows]}


class Steps(TrainerCallback):
    def __init__(self):
        self.logs, self.times = [], []

    def on_step_begin(self, *args, **kwargs):
        self.began = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        self.times.append(time.perf_counter() - self.began)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.logs.append(logs)


class Ordered(GRPOTrainer):
    def _prepare_inputs(self, inputs):
        # Sampling and scoring happen here, before the step as the callback sees it.
        self.prepared = time.perf_counter()
        out = super()._prepare_inputs(inputs)
        waits.append(time.perf_counter() - self.prepared)
        return out


def clip(parameters, max_norm, *args, **kwargs):
    """torch sums squares in f32, which makes a norm of this many numbers 1e-5 too small."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = torch.stack([grad.double().square().sum() for grad in grads]).sum().sqrt()
    torch.nn.utils.clip_grads_with_norm_([p for p in trainer.model.parameters() if p.grad is not None], max_norm, norm)
    return norm


torch.nn.utils.clip_grad_norm_ = clip
waits, seen = [], Steps()
given = lambda prompts, completions, reward=None, **kwargs: reward
rules = lambda prompts, completions, **kwargs: [-abs(len(text) - 80.0) for text in completions]
forms = {"grpo": "grpo", "dapo": "dapo", "dr_grpo": "dr_grpo", "bnpo": "bnpo"}
prompts = [rollouts[i]["prompt"] for i in range(0, len(rollouts), group)]
with tempfile.TemporaryDirectory() as folder:
    config = GRPOConfig(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=batch, num_generations=group, num_iterations=iterations,
        max_completion_length=recipe["max_completion_length"], learning_rate=recipe["learning_rate"],
        lr_scheduler_type=recipe.get("lr_scheduler_type", "constant"), warmup_steps=round(recipe.get("warmup_ratio", 0.0) * steps),
        max_grad_norm=recipe.get("max_grad_norm", 1.0), beta=recipe.get("beta", 0.0), loss_type=forms[recipe["objective"]],
        weight_decay=recipe.get("weight_decay", 0.0), temperature=recipe.get("rollout_temperature", 1.0), top_p=1.0, top_k=0, shuffle_dataset=False, logging_steps=1,
        report_to=[], use_cpu=True, bf16=False, fp16=False, save_strategy="no", gradient_checkpointing=False, seed=42,
        disable_tqdm=True, use_bias_correction_kl=False, top_entropy_quantile=recipe.get("top_entropy_quantile", 1.0),
        # Dr. GRPO is its paper's in cuvee; in TRL only the normaliser changes with loss_type.
        scale_rewards=recipe.get("scale_rewards", "none" if recipe["objective"] == "dr_grpo" else "group"),
    )
    trainer = Ordered(
        model=AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), args=config, processing_class=tokenizer,
        reward_funcs=[rules if a.time else given], train_dataset=Dataset.from_list([{"prompt": text} for text in prompts]),
        callbacks=[seen], rollout_func=None if a.time else replay,
    )
    trainer.train()

ours = [json.loads(line) for line in open(a.run / "metrics.jsonl")]
if a.time:
    # The first step allocates.
    theirs = statistics.median(seen.times[1:])
    mine = statistics.median(line["step_time"] for line in ours[1:])
    length = statistics.mean(line["completions/mean_length"] for line in seen.logs)
    own = statistics.mean(line["completions/mean_length"] for line in ours)
    print(f"a step of {batch} completions: cuvee {mine:.3f} s ({own:.1f} tokens each), TRL {theirs:.3f} s ({length:.1f} tokens "
          f"each, {statistics.median(waits[1:]):.3f} s of it sampling and scoring): {theirs / mine:.2f} times")
    raise SystemExit
worst = {"loss": 0.0, "grad_norm": 0.0, "kl": 0.0, "reward": 0.0, "entropy": 0.0}
for line, log in zip(ours, seen.logs):
    shown = []
    for name in worst:
        if name in line and name in log:
            x, y = line[name], float(log[name])
            worst[name] = max(worst[name], abs(x - y) / max(1.0, abs(y)))
            shown.append(f"{name} {x:.7f} {y:.7f}")
    print(f"step {line['step']:3}: " + ", ".join(shown))
print("largest difference, relative above 1: " + ", ".join(f"{name} {value:.1e}" for name, value in worst.items()))
trained, start = load_file(a.run / "model.safetensors"), load_file(model_dir / "model.safetensors")
state = trainer.model.state_dict()
far = max(float((trained[name] - state[name]).abs().max()) for name in trained)
moved = max(float((trained[name] - start[name].float()).abs().max()) for name in trained)
print(f"weights: largest difference {far:.1e}, where training moved the farthest one by {moved:.1e}")
