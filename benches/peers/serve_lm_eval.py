"""lm-evaluation-harness (`local-completions`) against `cuvee serve`, unchanged, and its own backend `hf` on the same items.

    python benches/peers/serve_lm_eval.py CUVEE MODEL_DIR OUT_DIR [--items 24] [--max-length 512]

Multiple choice (log-likelihoods by `echo`), perplexity of texts, and generation. Prints the largest difference of a
log-likelihood, and how many items and texts differ; exits with 1 where a difference is above 1e-4 (relative, above 1) or an item
differs. Needs lm_eval[api] 0.4.13 with torch and transformers.
"""
import argparse
import gzip
import json
import os
import pathlib
import sys

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
import lm_eval
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from serving import server

parser = argparse.ArgumentParser()
parser.add_argument("cuvee")
parser.add_argument("model")
parser.add_argument("out")
parser.add_argument("--items", type=int, default=24)
parser.add_argument("--max-length", type=int, default=512)
a = parser.parse_args()
out = pathlib.Path(a.out).resolve()
out.mkdir(parents=True, exist_ok=True)
films = pathlib.Path(__file__).parents[2] / "assets/film-reviews"


def rows(name):
    with gzip.open(films / name, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines][: a.items]


words = [{"prompt": f"Review: {start}", "word": "."} for start in ("This is one of the", "The film is", "It's", "I", "A good")]
choice = {"output_type": "multiple_choice", "doc_to_text": "{{query}}", "doc_to_choice": "choices", "doc_to_target": "gold"}
rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}", "metric_list": [{"metric": "word_perplexity"}]}
until = {"output_type": "generate_until", "doc_to_text": "{{prompt}}", "doc_to_target": "{{word}}", "metric_list": [{"metric": "exact_match"}]}
until["generation_kwargs"] = {"until": [".", "!"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 32}
tasks = {
    "cloze": (rows("cloze-heldout.jsonl.gz"), choice | {"metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}),
    "sentences": ([{"text": row["text"]} for row in rows("sentences-heldout.jsonl.gz")], rolling),
    "words": (words, until),
}
for name, (items, config) in tasks.items():
    path = out / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in items), encoding="utf-8")
    data = {"task": f"x_{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
    (out / f"{name}.yaml").write_text(yaml.safe_dump(data | config))


def evaluate(model, **given):
    how = {"task_manager": TaskManager(include_path=str(out)), "bootstrap_iters": 0, "log_samples": True}
    return lm_eval.simple_evaluate(model=model, tasks=[f"x_{name}" for name in tasks], **how, **given)


with server(a.cuvee, a.model, "--name", "base", "--max-context", str(a.max_length + 64)) as (_, address):
    given = f"model=base,base_url={address}/v1/completions,tokenizer={a.model},max_length={a.max_length},num_concurrent=8"
    ours = evaluate("local-completions", model_args=given)
theirs = evaluate(HFLM(pretrained=a.model, dtype="float32", device="cpu", batch_size=1, max_length=a.max_length))
worst, differ = 0.0, 0
for name in tasks:
    samples = [sorted(found["samples"][f"x_{name}"], key=lambda sample: sample["doc_id"]) for found in (ours, theirs)]
    gaps, items = [], 0
    for mine, other in zip(*samples, strict=True):
        match name:
            case "cloze":
                gaps += [(x[0], y[0]) for x, y in zip(mine["filtered_resps"], other["filtered_resps"], strict=True)]
                greedy = [[x[1] for x in sample["filtered_resps"]] for sample in (mine, other)]
                items += (mine["acc"], mine["acc_norm"]) != (other["acc"], other["acc_norm"]) or greedy[0] != greedy[1]
            case "sentences":
                gaps.append((mine["word_perplexity"][0], other["word_perplexity"][0]))
            case "words":
                items += mine["resps"] != other["resps"]
    gap = max((abs(x - y) / max(1.0, abs(y)) for x, y in gaps), default=0.0)
    print(f"{name}: {len(samples[0])} items, {len(gaps)} log-likelihoods, largest difference {gap:.1e}; {items} items differ")
    worst, differ = max(worst, gap), differ + items
sys.exit(worst > 1e-4 or differ > 0)
