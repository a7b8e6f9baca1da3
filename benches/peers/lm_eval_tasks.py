"""The tasks of `cuvee eval` against lm-evaluation-harness, item by item.

    python benches/peers/lm_eval_tasks.py CUVEE MODEL_DIR OUT_DIR [--items 48] [--max-length N] [--gsm8k FILE] [--tokens 128] [--golden FILE]

Both read the same rows: cloze items and sentences of assets/film-reviews, items that are awkward on purpose (a context longer
than the window, none at all, one that ends in spaces, other scripts, choices that start alike), texts longer than the window, words to
guess, and questions {"prompt", "solution"}, those of --gsm8k or a few of our own, asked as the harness's gsm8k task is without
examples, with both of its filters. The harness's tasks are written as YAML to OUT_DIR. Prints the largest difference of a log-likelihood, of each metric, and whether every
exact match and every text agrees; exits with 1 where one is above 1e-4 (relative, for log-likelihoods above 1) or any item differs.

Needs lm_eval 0.4.13 with torch and transformers (CPU wheels are enough).
"""
import argparse
import gzip
import json
import os
import pathlib
import subprocess
import sys

os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TOKENIZERS_PARALLELISM="false")
import lm_eval
import yaml
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

parser = argparse.ArgumentParser()
parser.add_argument("cuvee")
parser.add_argument("model")
parser.add_argument("out")
parser.add_argument("--items", type=int, default=48)
parser.add_argument("--max-length", type=int)
parser.add_argument("--gsm8k")
parser.add_argument("--tokens", type=int, default=128)
parser.add_argument("--golden", help="write the rows and what the harness says of them, for tests/oracle")
a = parser.parse_args()
out = pathlib.Path(a.out)
out.mkdir(parents=True, exist_ok=True)
films = pathlib.Path(__file__).parents[2] / "assets/film-reviews"


def rows(path, n):
    opened = gzip.open(path, "rt", encoding="utf-8") if str(path).endswith(".gz") else open(path, encoding="utf-8")
    with opened as lines:
        return [json.loads(line) for line in lines][:n]


texts = [row["text"] for row in rows(films / "sentences-heldout.jsonl.gz", 400)]
long = " ".join(texts[:20])
awkward = [
    {"query": long + " " + long, "choices": ["good", "bad film", "a film that is neither"], "gold": 1},
    {"query": "", "choices": ["A film.", "Review: a film."], "gold": 0},
    {"query": "Review: it ends in spaces   ", "choices": ["here", " and here", "here too"], "gold": 2},
    {"query": "Un café – 映画はとても 🎬", "choices": ["déjà vu", "とても良い", "🎬🎬"], "gold": 0},
    {"query": "Review: the same start", "choices": ["the same start", "the same start again", "the"], "gold": 1},
    {"query": "Review: a\n\n", "choices": ["b", "c\n", "\td"], "gold": 0},
]
tasks = {
    "cloze": rows(films / "cloze-heldout.jsonl.gz", a.items),
    "awkward": awkward,
    "sentences": [{"text": text} for text in texts[: a.items]],
    "texts": [{"text": text} for text in [long, long * 3, "é", " two  words ", "日本語 \u00a0 x\n", "a" * 300]],
}
rolling = {"output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}"}
rolling["metric_list"] = [{"metric": m} for m in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
choice = {"output_type": "multiple_choice", "doc_to_text": "{{query}}", "doc_to_choice": "choices", "doc_to_target": "gold"}
choice["metric_list"] = [{"metric": "acc"}, {"metric": "acc_norm"}]
# What tasks/gsm8k/gsm8k.yaml says, without examples.
until = ["Question:", "</s>", "<|im_end|>"]
ignored = [",", "\\$", "(?s).*#### ", "\\.$"]
filters = {"strict": ("#### (\\-?[0-9\\.\\,]+)", 0), "flexible": ("(-?[$0-9.,]{2,})|(-?[0-9]+)", -1)}
config = {"cloze": choice, "awkward": choice, "sentences": rolling, "texts": rolling}
ours = {name: f"{name}={out / name}.jsonl" for name in tasks}
questions = rows(a.gsm8k, a.items) if a.gsm8k else [
    {"prompt": "Ann sees 3 films on Monday and 4 on Tuesday. How many does she see?", "solution": "3 + 4 = 7 films.\n#### 7"},
    {"prompt": "A ticket costs $12. What do 100 cost?", "solution": "100 * 12 = $1,200.\n#### 1,200"},
]
guesses = {"Review: This is one of the": "most", "Review: The film is": "A", "Review: It's": "a", "Review: I": "was"}
words = [{"prompt": prompt, "solution": word} for prompt, word in guesses.items()]
written = {name: (questions, "Question: {{prompt}}\nAnswer:", until, *how) for name, how in filters.items()}
written["words"] = (words, "{{prompt}}", ["."], "\\w+", 0)
for name, (asked, prompt, stops, regex, select) in written.items():
    tasks[name] = asked
    config[name] = {
        "output_type": "generate_until",
        "doc_to_text": prompt,
        "doc_to_target": "{{solution}}",
        "metric_list": [{"metric": "exact_match", "ignore_case": True, "ignore_punctuation": False, "regexes_to_ignore": ignored}],
        "generation_kwargs": {"until": stops, "do_sample": False, "temperature": 0.0, "max_gen_toks": a.tokens},
        "filter_list": [{"name": "f", "filter": [{"function": "regex", "regex_pattern": regex, "group_select": select}, {"function": "take_first"}]}],
    }
    said = {"data": f"{name}.jsonl", "kind": "exact_match", "prompt": prompt, "target": "{{solution}}", "max_new_tokens": a.tokens}
    said |= {"until": stops, "ignore_case": True, "regexes_to_ignore": ignored}
    keys = "".join(f"{key} = {json.dumps(value)}\n" for key, value in said.items())
    (out / f"{name}.toml").write_text(f"{keys}filter = {{ regex = {json.dumps(regex)}, group_select = {select} }}\n")
    ours[name] = f"{name}={out / name}.toml"
for name, items in tasks.items():
    (out / f"{name}.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in items), encoding="utf-8")
    data = {"task": f"x_{name}", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(out / f"{name}.jsonl")}}, "test_split": "test"}
    (out / f"{name}.yaml").write_text(yaml.safe_dump(data | config[name]))

limit = {"max_length": a.max_length} if a.max_length else {}
model = HFLM(pretrained=a.model, dtype="float32", device="cpu", batch_size=1, **limit)
theirs = lm_eval.simple_evaluate(
    model=model, tasks=[f"x_{name}" for name in tasks], task_manager=TaskManager(include_path=str(out)), bootstrap_iters=0, log_samples=True
)
command = [a.cuvee, "eval", "--model", a.model, "--json", "--log-samples", str(out / "samples.jsonl")]
command += ["--max-length", str(a.max_length)] if a.max_length else []
done = subprocess.run(command + [x for task in ours.values() for x in ("--task", task)], check=True, capture_output=True, text=True)
ours = json.loads(done.stdout)["models"][0]["tasks"]
(out / "ours.json").write_text(done.stdout)
log = [json.loads(line) for line in open(out / "samples.jsonl", encoding="utf-8")]
worst, differ, golden = 0.0, 0, {}
for name in tasks:
    said = [line for line in log if line["task"] == name]
    samples = sorted(theirs["samples"][f"x_{name}"], key=lambda sample: sample["doc_id"])
    assert len(said) == len(samples) == len(tasks[name]), name
    lls, items, texts, kept = [], 0, 0, []
    for mine, sample in zip(said, samples):
        match mine["kind"]:
            case "choice":
                lls += [(x, y[0]) for x, y in zip(mine["logps"], sample["filtered_resps"], strict=True)]
                items += (mine["acc"], mine["acc_norm"]) != (sample["acc"], sample["acc_norm"])
                kept.append({"logps": [y[0] for y in sample["filtered_resps"]], "acc": sample["acc"], "acc_norm": sample["acc_norm"]})
            case "perplexity":
                ll, words = sample["word_perplexity"]
                lls.append((mine["logp"], ll))
                items += (mine["words"], mine["bytes"]) != (words, sample["byte_perplexity"][1])
                kept.append({"logp": ll, "words": words, "bytes": sample["byte_perplexity"][1]})
            case "exact_match":
                items += mine["exact_match"] != bool(sample["exact_match"]) or mine["answer"] != sample["filtered_resps"][0]
                texts += mine["completion"] != sample["resps"][0][0]
                kept.append({"completion": sample["resps"][0][0], "answer": sample["filtered_resps"][0], "exact_match": bool(sample["exact_match"])})
    gap = max((abs(x - y) / max(1.0, abs(y)) for x, y in lls), default=0.0)
    metrics = {key: value for key, value in ours[name].items() if isinstance(value, float) and not key.endswith("_stderr")}
    results = {key.split(",")[0]: value for key, value in theirs["results"][f"x_{name}"].items()}
    gaps = {key: abs(value - results[key]) / max(1.0, abs(results[key])) for key, value in metrics.items() if key in results}
    print(f"{name}: {len(said)} items, {len(lls)} log-likelihoods, largest difference {gap:.1e}; {items} items and {texts} texts differ")
    print("   ", ", ".join(f"{key} {metrics[key]:.6f} (theirs {results[key]:.6f})" for key in gaps))
    toml = out / f"{name}.toml"
    golden[name] = {"rows": tasks[name], "toml": toml.read_text() if toml.exists() else None, "items": kept, "metrics": {key: results[key] for key in gaps}}
    worst, differ = max([worst, gap, *gaps.values()]), differ + items + texts
if a.golden:
    about = f"lm_eval {lm_eval.__version__}, {pathlib.Path(a.model).name}, by benches/peers/lm_eval_tasks.py"
    text = json.dumps({"about": about, "max_length": a.max_length, "tasks": golden}, ensure_ascii=False, indent=1)
    pathlib.Path(a.golden).write_text(text + "\n", encoding="utf-8")
sys.exit(worst > 1e-4 or differ > 0)
