"""Adapters both ways: PEFT's in cuvee and cuvee's in PEFT, compared by the log-probabilities of completions.

    python benches/peers/peft_logps.py CUVEE MODEL_DIR PAIRS.jsonl OUT_DIR [--rows 8]

PEFT makes two adapters with random B (all-linear, other ranks, one rank-stabilized); `CUVEE logps --adapter` reads them, alone
and with weights 0.3 and 0.7. `CUVEE train --lora-rank` trains one, which PEFT loads. Prints, of each, the largest difference of
a completion's log-probability divided by its number of tokens; both compute in f32.

Needs torch, transformers 5.23, peft 0.21 (CPU wheels are enough).
"""
import argparse
import json
import os
import pathlib
import subprocess

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

parser = argparse.ArgumentParser()
parser.add_argument("cuvee")
parser.add_argument("model")
parser.add_argument("pairs")
parser.add_argument("out")
parser.add_argument("--rows", type=int, default=8)
a = parser.parse_args()
out = pathlib.Path(a.out)
out.mkdir(parents=True, exist_ok=True)
rows = out / "rows.jsonl"
rows.write_text("".join(open(a.pairs, encoding="utf-8").readlines()[: a.rows]), encoding="utf-8")
data = ["--model", a.model, "--dataset", str(rows), "--max-length", "128", "--on-overflow", "truncate"]


def cuvee(command, *flags):
    return subprocess.run([a.cuvee, command, *flags], check=True, capture_output=True, text=True).stdout


def ours(*adapters):
    cuvee("logps", *data, "--out", str(out / "logps.jsonl"), *(x for name in adapters for x in ("--adapter", name)))
    lines = [json.loads(line) for line in open(out / "logps.jsonl")]
    return [line[f"logps_{side}"] for line in lines for side in ("chosen", "rejected")]


sequences = [s for line in cuvee("preview", *data, "--rows", str(a.rows), "--json").splitlines() for s in json.loads(line)["sequences"]]
base = lambda: AutoModelForCausalLM.from_pretrained(a.model, dtype=torch.float32)


@torch.no_grad()
def theirs(model):
    def of(sequence):
        ids = torch.tensor(sequence["ids"])
        logps = model(ids[None]).logits[0].double().log_softmax(-1)[:-1].gather(-1, ids[1:, None])[:, 0]
        return logps[sequence["first"] - 1 :].sum().item()

    return [of(s) for s in sequences]


def report(what, ours, theirs):
    tokens = [len(s["ids"]) - s["first"] for s in sequences]
    off = max(abs(x - y) / n for x, y, n in zip(ours, theirs, tokens))
    print(f"{what}: {off:.1e} nats a token, {len(ours)} completions")


report("without adapters", ours(), theirs(base()))
for name, options in [("one", dict(r=8, lora_alpha=16)), ("two", dict(r=4, lora_alpha=3, use_rslora=True))]:
    torch.manual_seed(len(name + str(options)))
    model = get_peft_model(base(), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", **options))
    for key, p in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(p, std=0.01)
    model.save_pretrained(out / name)
    report(f"PEFT's {name} in cuvee", ours(str(out / name)), theirs(model))
model = PeftModel.from_pretrained(base(), out / "one", adapter_name="one")
model.load_adapter(out / "two", adapter_name="two")
model.add_weighted_adapter(["one", "two"], [0.3, 0.7], combination_type="cat", adapter_name="sum")
model.set_adapter("sum")
report("both of PEFT's, 0.3 and 0.7", ours(f"{out}/one=0.3", f"{out}/two=0.7"), theirs(model))
run = out / "run"
cuvee("train", "--objective", "sigmoid", "--beta", "0.1", *data, "--lora-rank", "8", "--learning-rate", "1e-3",
      "--per-device-train-batch-size", "2", "--max-steps", "3", "--output-dir", str(run), "--cache-dir", str(out / "cache"))
report("cuvee's in PEFT", ours(str(run)), theirs(PeftModel.from_pretrained(base(), run)))
report("without it", ours(), theirs(base()))
