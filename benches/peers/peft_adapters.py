"""Adapters: what cuvee makes of PEFT's, beside what PEFT makes of them itself, and whether PEFT loads what cuvee writes.

    python benches/peers/peft_adapters.py target/release/cuvee MODEL [TARGET..]

MODEL is a Hugging Face folder, TARGETs are names of linear layers [default: all]; PEFT's svd takes minutes for all of
SmolLM2's. Two adapters with random matrices are made by PEFT, then merged by both (cat, linear, svd, into the base). Prints the largest difference of a weight's delta and of log-probabilities, and what each took. PEFT 0.21, torch 2, CPU.
"""
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

cuvee, base = sys.argv[1:3]
targets = sys.argv[3:] or "all-linear"
torch.manual_seed(3)
tmp = Path(tempfile.mkdtemp())
WEIGHTS = [0.3, 0.7]


def load():
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def make(name, **options):
    model = get_peft_model(load(), LoraConfig(task_type="CAUSAL_LM", target_modules=targets, **options))
    for key, p in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(p, std=0.02)
    model.save_pretrained(tmp / name)


def deltas(model, name):
    for key, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and name in module.lora_A:
            yield key, module.get_delta_weight(name).detach()


def run(what, *args):
    start = time.time()
    subprocess.run([cuvee, "merge", what, *map(str, args)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.time() - start


def read(folder):
    """With PEFT, whose warnings are errors here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # transformers about itself.
        warnings.simplefilter("ignore", FutureWarning)
        return PeftModel.from_pretrained(load(), folder)


def logps(model):
    ids = torch.arange(1, 65)[None]
    with torch.no_grad():
        return torch.log_softmax(model(ids).logits.double(), -1)


make("a", r=8, lora_alpha=16)
make("b", r=8, lora_alpha=8, use_rslora=True)
both = ["--adapter", f"{tmp}/a={WEIGHTS[0]}", "--adapter", f"{tmp}/b={WEIGHTS[1]}"]
peft = PeftModel.from_pretrained(load(), tmp / "a", adapter_name="a")
peft.load_adapter(tmp / "b", adapter_name="b")
for kind, options in [("cat", {}), ("linear", {}), ("svd", {"svd_rank": 8})]:
    start = time.time()
    peft.add_weighted_adapter(["a", "b"], WEIGHTS, combination_type=kind, adapter_name=kind, **options)
    theirs = time.time() - start
    ours = run("adapters", *both, "--method", kind, "--output-dir", tmp / kind)
    loaded = read(tmp / kind)
    expected, found = dict(deltas(peft, kind)), dict(deltas(loaded, "default"))
    assert expected.keys() == found.keys()
    off = max((expected[k] - found[k]).abs().max().item() for k in expected)
    size = max(x.abs().max().item() for x in expected.values())
    peft.set_adapter(kind)
    far = (logps(peft) - logps(loaded)).abs().max().item()
    print(f"{kind:7} delta {off:.1e} of {size:.1e}, log-probs {far:.1e}; PEFT {theirs:.2f} s in memory, cuvee {ours:.2f} s from disk to disk")

start = time.time()
whole = PeftModel.from_pretrained(load(), tmp / "cat").merge_and_unload()
whole.save_pretrained(tmp / "theirs")
theirs = time.time() - start
ours = run("adapters", *both, "--method", "delta", "--model", base, "--dtype", "f32", "--output-dir", tmp / "whole")
loaded = AutoModelForCausalLM.from_pretrained(tmp / "whole", dtype=torch.float32)
state = loaded.state_dict()
off = max((x - state[k]).abs().max().item() for k, x in whole.state_dict().items())
print(f"delta   weights {off:.1e}, log-probs {(logps(whole) - logps(loaded)).abs().max().item():.1e}; PEFT {theirs:.2f} s, cuvee {ours:.2f} s")

ours = run("extract", "--model", tmp / "whole", "--base-model", base, "--rank", 16, "--output-dir", tmp / "found")
loaded = read(tmp / "found")
expected, found = dict(deltas(peft, "cat")), dict(deltas(loaded, "default"))
off = max(((expected[k] - found[k]).norm() / expected[k].norm()).item() for k in expected)
print(f"extract rank 16 of rank 16: relative error {off:.1e} at most, log-probs {(logps(whole) - logps(loaded)).abs().max().item():.1e}; {ours:.2f} s")
