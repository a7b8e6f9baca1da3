"""cuvee beside TRL on SmolLM2-135M-Instruct, alternating in one run: seconds, memory, losses and gradient norms.

    python benches/peers/compare_smollm2.py CUVEE MODEL_DIR PAIRS.jsonl OUT_DIR [--steps 5] [--modes live precomputed]
        [--lora-rank N]

Each round runs `CUVEE train` with an empty reference cache (so that scoring the reference is part of it) and then one mode of
trl_smollm2.py, with the same pairs in the same order. Prints a table; OUT_DIR keeps the logs of both.

cuvee's time is that of the whole command: reading, scoring, training, and writing the model. TRL's is trainer.train()
alone, or with the construction of the trainer where that scores the reference.
"""
import argparse
import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

parser = argparse.ArgumentParser()
parser.add_argument("cuvee")
parser.add_argument("model")
parser.add_argument("pairs")
parser.add_argument("out")
parser.add_argument("--steps", type=int, default=5)
parser.add_argument("--lora-rank", type=int, help="an adapter of both; its start is random, so losses and norms differ")
parser.add_argument("--modes", nargs="+", default=["live", "precomputed"])
a = parser.parse_args()
out = pathlib.Path(a.out)
out.mkdir(parents=True, exist_ok=True)
lines = lambda path: [json.loads(line) for line in open(path)]


def cuvee(name):
    for folder in ("run", "cache"):
        shutil.rmtree(out / folder, ignore_errors=True)
    flags = {
        "objective": "sigmoid", "beta": 0.1, "learning-rate": 1e-6, "per-device-train-batch-size": 4, "max-length": 512,
        "on-overflow": "truncate", "max-steps": a.steps, "model": a.model, "dataset": a.pairs,
        "output-dir": out / "run", "cache-dir": out / "cache",
    }
    if a.lora_rank:
        flags["lora-rank"] = a.lora_rank
    command = [a.cuvee, "train", "--no-shuffle"] + [str(x) for k, v in flags.items() for x in (f"--{k}", v)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=open(out / f"{name}.log", "w"))
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    assert status == 0, open(out / f"{name}.log").read()
    steps = lines(out / "run" / "metrics.jsonl")
    return steps, wall, sum(s["step_time"] for s in steps), usage.ru_maxrss / 2**20


def trl(mode):
    script = pathlib.Path(__file__).with_name("trl_smollm2.py")
    command = [sys.executable, script, a.model, a.pairs, out / f"{mode}.jsonl", "--steps", str(a.steps), "--mode", mode]
    command += ["--lora-rank", str(a.lora_rank)] if a.lora_rank else []
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return lines(out / f"{mode}.jsonl"), json.loads(result.stdout.splitlines()[-1])


print("| TRL | s a step | GiB | cuvee: s a step, whole command | steps alone | GiB | speed | memory |\n|---|---|---|---|---|---|---|---|")
for mode in a.modes:
    ours, wall, steps, memory = cuvee(f"cuvee-{mode}")
    theirs, t = trl(mode)
    seconds = t["train_s"] + (t["construction_s"] if mode == "precomputed" else 0)
    n = a.steps
    print(
        f"| {mode} | {seconds / n:.1f} | {t['peak_gib']:.1f} | {wall / n:.1f} | {steps / n:.1f} | {memory:.2f} "
        f"| {seconds / wall:.1f}x, steps {t['steps_s'] / steps:.1f}x | 1/{t['peak_gib'] / memory:.1f} |", flush=True,
    )
    if mode == "live":
        off = lambda key: max(abs(x[key] / y[key] - 1) for x, y in zip(ours, theirs))
        print(f"largest relative difference: loss {off('loss'):.1e}, grad_norm {off('grad_norm'):.1e}", file=sys.stderr)
        for x, y in zip(ours, theirs):
            print(f"{x['step']}: loss {x['loss']:.9f} {y['loss']:.9f}  grad_norm {x['grad_norm']:.5f} {y['grad_norm']:.5f}", file=sys.stderr)
