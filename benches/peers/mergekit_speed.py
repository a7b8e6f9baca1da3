"""cuvee merge beside mergekit, whole commands, alternating: seconds, largest resident memory, and a copy of the same bytes.

    python benches/peers/mergekit_speed.py CUVEE MERGEKIT_YAML BASE MODEL [MODEL..] --out DIR [--rounds 3] [--methods linear ties]

MERGEKIT_YAML is mergekit's command. Each round runs, for every method and for each of 2.. models, cuvee, then mergekit on
the same recipe, then `cp` of as many bytes as the merged model has, each followed by a sync of what it wrote. Inputs are read once before the
first round, so that all find them in memory. Prints medians.
"""
import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

parser = argparse.ArgumentParser()
parser.add_argument("cuvee")
parser.add_argument("mergekit")
parser.add_argument("base")
parser.add_argument("models", nargs="+")
parser.add_argument("--out", required=True)
parser.add_argument("--rounds", type=int, default=3)
parser.add_argument("--methods", nargs="+", default=["linear", "task_arithmetic", "slerp", "ties", "dare_ties", "breadcrumbs", "della", "model_stock"])
parser.add_argument("--dtype", default="bfloat16")
a = parser.parse_args()
out = pathlib.Path(a.out)
out.mkdir(parents=True, exist_ok=True)
env = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}


def timed(command):
    """Seconds, and MB of the largest resident memory, as the system counts it for this child."""
    start = time.perf_counter()
    child = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    message = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"{command}: {message.decode()[-2000:]}")
    return time.perf_counter() - start, usage.ru_maxrss / 1e3


def recipe(method, models):
    parameters = {"weight": 0.5}
    if method not in ("linear", "task_arithmetic"):
        parameters["density"] = 0.5
    if method in ("slerp", "model_stock"):
        parameters = {}
    listed = [{"model": m, "parameters": parameters} if parameters else {"model": m} for m in models]
    text = {"merge_method": method, "models": listed, "dtype": a.dtype}
    if method != "linear":
        text["base_model"] = a.base
    if method == "slerp":
        text["models"] = [{"model": a.base}, {"model": models[0]}]
        text["parameters"] = {"t": 0.5}
    return text


cases = [(m, n) for m in a.methods for n in range(2, len(a.models) + 1) if m != "slerp" or n == 2]
for folder in [a.base, *a.models]:
    (pathlib.Path(folder) / "model.safetensors").read_bytes()
seconds, memory = {}, {}
for round_ in range(a.rounds):
    for method, n in cases:
        path = out / "recipe.yaml"
        path.write_text(json.dumps(recipe(method, a.models[:n])))
        for who in ("cuvee", "mergekit", "cp"):
            target = out / who
            shutil.rmtree(target, ignore_errors=True)
            start = time.perf_counter()
            if who == "cuvee":
                _, peak = timed([a.cuvee, "merge", "--config", path, "--output-dir", target])
            elif who == "mergekit":
                _, peak = timed([a.mergekit, path, target, "--no-copy-tokenizer", "--quiet"])
            else:
                _, peak = timed(["cp", "-r", out / "cuvee", target])
            # cuvee's files are on the disk when it ends.
            if who != "cuvee":
                subprocess.run(["sync", "-f", str(target)], check=True)
            seconds.setdefault((method, n, who), []).append(time.perf_counter() - start)
            memory.setdefault((method, n, who), []).append(peak)
size = sum(f.stat().st_size for f in (out / "cuvee").iterdir()) / 1e6
print(f"{size:.0f} MB written, medians of {a.rounds} rounds")
print(f"{'method':18} {'models':>6} {'cuvee s':>8} {'mergekit s':>10} {'times':>6} {'cp s':>6} {'MB/s written':>12} {'cuvee MB':>8} {'mergekit MB':>11}")
for method, n in cases:
    ours, theirs, copy = (statistics.median(seconds[method, n, who]) for who in ("cuvee", "mergekit", "cp"))
    peaks = [max(memory[method, n, who]) for who in ("cuvee", "mergekit")]
    print(f"{method:18} {n:6} {ours:8.2f} {theirs:10.2f} {theirs / ours:6.1f} {copy:6.2f} {size / ours:12.0f} {peaks[0]:8.0f} {peaks[1]:11.0f}", flush=True)
