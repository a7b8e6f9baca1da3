"""cuvee merge beside mergekit on real checkpoints, method by method: the largest difference of any weight.

    python benches/peers/mergekit_parity.py CUVEE BASE MODEL MODEL [MODEL..] --out DIR [--methods linear ties]

BASE and the MODELs are folders of one architecture. Both programs read the same YAML, compute and write f32. Two things of
mergekit are replaced so that there is something to compare: its random masks, by cuvee's (Philox4x32-10, here in numpy),
and its sorts, by stable ones, since which of several equal magnitudes it keeps is otherwise left to the sort; `--plain` leaves
the sorts alone and counts the weights that differ.

Written for mergekit 0.1.5, whose `rescale: true` restores the L1 norm.
"""
import argparse
import json
import os
import pathlib
import shutil
import subprocess

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import numpy as np
import torch
from blake3 import blake3
from mergekit import sparsify
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.merge_methods import generalized_task_arithmetic as gta
from mergekit.options import MergeOptions
from safetensors.torch import load_file

parser = argparse.ArgumentParser()
parser.add_argument("cuvee")
parser.add_argument("base")
parser.add_argument("models", nargs="+")
parser.add_argument("--out", required=True)
parser.add_argument("--seed", type=int, default=7)
parser.add_argument("--plain", action="store_true")
parser.add_argument("--methods", nargs="+", help="only cases of these")
a = parser.parse_args()
out = pathlib.Path(a.out)
out.mkdir(parents=True, exist_ok=True)


def words(seed, name, n):
    """The first n words of the stream of that name."""
    stream = int.from_bytes(blake3(name.encode()).digest()[:8], "little")
    low, mask = np.uint64(0xFFFFFFFF), lambda x: x & np.uint64(0xFFFFFFFF)
    counter = np.arange((n + 3) // 4, dtype=np.uint64)
    x = [mask(counter), counter >> np.uint64(32)]
    x += [np.full_like(counter, stream & 0xFFFFFFFF), np.full_like(counter, stream >> 32)]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        p, q = x[0] * np.uint64(0xD2511F53), x[2] * np.uint64(0xCD9E8D57)
        x = [(q >> np.uint64(32)) ^ x[1] ^ np.uint64(key[0]), q & low,
             (p >> np.uint64(32)) ^ x[3] ^ np.uint64(key[1]), p & low]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(x, 1).reshape(-1)[:n]


# What is being merged: set before mergekit asks for masks, which it does model by model.
tensor, model = None, 0
original = gta.GeneralizedTaskArithmeticMerge.merge_group


def merge_group(self, group, /, **parameters):
    global tensor, model
    tensor, model = group.metadata.name, 0
    return original(self, group, **parameters)


def bernoulli(probabilities):
    global model
    drawn = words(a.seed, f"merge/{model}/{tensor}", probabilities.numel())
    model += 1
    limits = probabilities.double().numpy().reshape(-1) * 2.0**32
    return torch.from_numpy((drawn < limits).astype(np.float32)).reshape(probabilities.shape)


gta.GeneralizedTaskArithmeticMerge.merge_group = merge_group
torch.bernoulli = bernoulli
if not a.plain:
    argsort, sort = torch.argsort, torch.sort
    torch.argsort = lambda x, dim=-1, descending=False: argsort(x, dim=dim, descending=descending, stable=True)
    torch.sort = lambda x, dim=-1, descending=False: sort(x, dim=dim, descending=descending, stable=True)
    # A method of tensors too.
    torch.Tensor.argsort = torch.argsort

weights = [0.5, 0.3, 0.7][: len(a.models)]
of = lambda **more: [{"model": m, "parameters": {"weight": w, **more}} for m, w in zip(a.models, weights)]
bare = [{"model": m} for m in a.models]
base = {"base_model": a.base, "dtype": "float32"}
gradient = [{"filter": "self_attn", "value": [0, 0.5, 1]}, {"filter": "mlp", "value": [1, 0.5, 0]}, {"value": 0.5}]
cases = {
    "linear": {"merge_method": "linear", "models": of(), "dtype": "float32"},
    "linear, not normalized": {"merge_method": "linear", "models": of(), "parameters": {"normalize": False}, "dtype": "float32"},
    "task_arithmetic": {"merge_method": "task_arithmetic", "models": of(), "parameters": {"lambda": 0.8}, **base},
    "slerp": {"merge_method": "slerp", "models": [{"model": a.base}, {"model": a.models[0]}], "parameters": {"t": 0.3}, **base},
    "slerp, gradients and filters": {"merge_method": "slerp", "models": [{"model": a.base}, {"model": a.models[0]}], "parameters": {"t": gradient}, **base},
    "ties": {"merge_method": "ties", "models": of(density=0.5), **base},
    "ties, int8_mask, not normalized": {"merge_method": "ties", "models": of(density=0.2), "parameters": {"normalize": False, "int8_mask": True}, **base},
    "ties, rescaled": {"merge_method": "ties", "models": of(density=0.3), "parameters": {"rescale": True}, **base},
    "dare_linear": {"merge_method": "dare_linear", "models": of(density=0.4), **base},
    "dare_linear, not rescaled": {"merge_method": "dare_linear", "models": of(density=0.4), "parameters": {"rescale": False}, **base},
    "dare_ties": {"merge_method": "dare_ties", "models": of(density=0.4), **base},
    "breadcrumbs": {"merge_method": "breadcrumbs", "models": of(density=0.6, gamma=0.05), **base},
    "breadcrumbs_ties": {"merge_method": "breadcrumbs_ties", "models": of(density=0.6, gamma=0.05), **base},
    "della": {"merge_method": "della", "models": of(density=0.5, epsilon=0.2), **base},
    "della_linear": {"merge_method": "della_linear", "models": of(density=0.5, epsilon=0.2), **base},
    "model_stock": {"merge_method": "model_stock", "models": bare, **base},
    "model_stock, filter_wise": {"merge_method": "model_stock", "models": bare, "parameters": {"filter_wise": True}, **base},
}
# YAML is a superset of JSON.
worst = 0.0
for name, recipe in cases.items():
    if recipe["merge_method"] == "model_stock" and len(a.models) < 2:
        continue
    if a.methods and recipe["merge_method"] not in a.methods:
        continue
    path = out / "recipe.yaml"
    path.write_text(json.dumps(recipe, indent=1))
    for folder in ("ours", "theirs"):
        shutil.rmtree(out / folder, ignore_errors=True)
    subprocess.run([a.cuvee, "merge", "--config", path, "--seed", str(a.seed), "--output-dir", out / "ours"],
                   check=True, capture_output=True)
    run_merge(MergeConfiguration.model_validate(recipe), str(out / "theirs"), MergeOptions(copy_tokenizer=False, quiet=True))
    ours, theirs = load_file(out / "ours/model.safetensors"), {}
    for file in sorted((out / "theirs").glob("*.safetensors")):
        theirs |= load_file(file)
    assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
    largest, far, total = 0.0, 0, 0
    for key, x in ours.items():
        d = (x - theirs[key].float()).abs()
        largest, far, total = max(largest, float(d.max())), far + int((d > 1e-6).sum()), total + d.numel()
    worst = max(worst, largest)
    print(f"{name:34} largest difference {largest:.2e}, {far} of {total} weights beyond 1e-6", flush=True)
print(f"worst {worst:.2e}")
