"""Completions of SmolLM2-135M-Instruct by cuvee and by transformers' generate, in turns: tokens a second.

    python benches/peers/rollout_smollm2.py CUVEE MODEL_DIR [--prompts 16] [--samples 8] [--new-tokens 64] [--rounds 3] [--their-dtype auto]

Both complete the same prompts as often, from the whole distribution at temperature 1, in f32 with 2 threads; no completion ends
before its length, so that both generate the same number of tokens. transformers has the prompts in one batch, padded on the
left, and computes in f32, or with `--their-dtype auto` as it does unless told otherwise: in the file's type. Its time is that of `generate`, cuvee's the one that it reports: neither has the loading of the model in it.
`--rows 1 8 32 128` measures cuvee alone instead, with so many completions at a time.

Needs torch and transformers 5.23 (CPU wheels are enough).
"""
import argparse
import json
import os
import pathlib
import re
import subprocess
import tempfile
import time

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

THREADS = 2
OPENINGS = ["The film was", "What is the capital of France, and why do people visit it?", "Write a poem about the sea.",
            "It begins as a comedy, and then the second half turns into something that nobody in the room expected"]
SUBJECTS = ["in winter", "for a child", "in three sentences", "as seen by a critic"]


def ours(cuvee, model, folder, a, *more):
    flags = ["--threads", THREADS, "--samples", a.samples, "--max-new-tokens", a.new_tokens, "--min-new-tokens", a.new_tokens]
    files = ["--prompts", folder / "prompts.jsonl", "--out", folder / "out.jsonl", "--device", "cpu"]
    line = [cuvee, "generate", "--model", model, *files, *flags, *more]
    text = subprocess.run(list(map(str, line)), check=True, capture_output=True, text=True).stderr
    tokens, seconds = re.search(r"(\d+) tokens in ([\d.]+) s", text).groups()
    return int(tokens), float(seconds)


def theirs(model, batch, a):
    started = time.perf_counter()
    with torch.no_grad():
        out = model.generate(
            **batch, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=a.samples,
            max_new_tokens=a.new_tokens, min_new_tokens=a.new_tokens, pad_token_id=model.config.eos_token_id)
    tokens = out.shape[0] * (out.shape[1] - batch["input_ids"].shape[1])
    return tokens, time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("cuvee")
    parser.add_argument("model")
    for name, default in [("prompts", 16), ("samples", 8), ("new-tokens", 64), ("rounds", 3)]:
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rows", type=int, nargs="*")
    parser.add_argument("--their-dtype", choices=["float32", "auto"], default="float32")
    a = parser.parse_args()
    torch.set_num_threads(THREADS)
    texts = [f"{opening} {subject}" for subject in SUBJECTS for opening in OPENINGS][:a.prompts]
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        if a.rows:
            for rows in a.rows:
                tokens, seconds = min((ours(a.cuvee, a.model, folder, a, "--max-running", rows) for _ in range(a.rounds)),
                                      key=lambda run: run[1])
                print(f"{rows:4} at a time: {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} tokens/s", flush=True)
            return
        tokenizer = AutoTokenizer.from_pretrained(a.model, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(a.model, dtype=a.their_dtype).eval()
        batch = tokenizer(texts, return_tensors="pt", padding=True)
        for turn in range(a.rounds):
            (n, cuvee_s), (m, their_s) = ours(a.cuvee, a.model, folder, a), theirs(model, batch, a)
            assert n == m == len(texts) * a.samples * a.new_tokens, (n, m)
            print(f"{turn + 1}: cuvee {cuvee_s:.2f} s, {n / cuvee_s:.0f} tokens/s; transformers {their_s:.2f} s, "
                  f"{m / their_s:.0f} tokens/s; {their_s / cuvee_s:.2f} times as fast", flush=True)


main()
