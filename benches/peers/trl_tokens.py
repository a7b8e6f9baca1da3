"""What TRL 1.16 makes of preference data: the token ids and masks of its trainers, one JSON object a row.

    python benches/peers/trl_tokens.py MODEL_DIR DATA.jsonl[.gz] [MAX_LENGTH] > theirs.jsonl
    python benches/peers/trl_tokens.py MODEL_DIR DATA.jsonl[.gz] [MAX_LENGTH] --compare target/release/cuvee [--reward]

writes {"row", "sequences": [{"ids", "first"}]}: `ids[first:]` is what TRL scores; a row that it drops is not there.
Without MAX_LENGTH nothing is cut.
Rows with chosen and rejected go through DPOTrainer's own preparation and collator, those with a label through
KTOTrainer's, others through SFTTrainer's. With --reward, pairs go through RewardTrainer's, which knows no prompt and drops
what is longer than MAX_LENGTH.
--compare runs `cuvee preview` with the same limits and counts the rows that agree and differ. Rows that TRL drops must be
skipped; of those that cuvee skips and TRL keeps, the reasons are counted.
Needs torch, transformers 5.23, trl 1.16 and datasets (CPU wheels are enough).
"""
import collections
import gzip
import json
import os
import subprocess
import sys
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="", TRL_EXPERIMENTAL_SILENCE="1")
import datasets
import transformers
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer
from trl.data_utils import maybe_extract_prompt
from trl.trainer.dpo_trainer import DataCollatorForPreference
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

datasets.disable_progress_bars()
transformers.logging.set_verbosity_error()

FORMS = [
    ["prompt", "completion", "label"],
    ["messages", "label"],
    ["prompt", "completion"],
    ["text"],
    ["messages"],
    ["conversations"],
]
ROLES = {"human": "user", "gpt": "assistant"}


def read(path):
    raw = open(path, "rb").read()
    text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def form(row):
    if "chosen" in row and "rejected" in row:
        return ["prompt", "chosen", "rejected"]
    return next(columns for columns in FORMS if all(column in row for column in columns))


def as_rows(rows):
    """Columns that the form needs. TRL renames from and value, and leaves the roles as they are; cuvee maps them."""
    columns = form(rows[0]) + ["tools", "chat_template_kwargs"]
    out = []
    for row in rows:
        row = {k: row[k] for k in columns if k in row}
        if "messages" in row and "label" in row:
            # LLaMA-Factory's rows, which TRL does not read.
            *row["prompt"], answer = row.pop("messages")
            row["completion"] = [answer]
        if "label" in row:
            row["label"] = bool(row["label"])
        for messages in row.values():
            for m in messages if isinstance(messages, list) else []:
                if "from" in m:
                    m["from"] = ROLES.get(m["from"], m["from"])
        out.append(row)
    return out


def pairs(rows, tokenizer, max_length):
    # DPOTrainer itself extracts where there is no prompt; maybe_extract_prompt also where the prompt repeats a message.
    if "prompt" in rows[0]:
        rows = [{**row, **maybe_extract_prompt(row)} for row in rows]
    data = datasets.Dataset.from_list([{**row, "row": i} for i, row in enumerate(rows)])
    args = DPOConfig(output_dir="unused", max_length=max_length, report_to=[], use_cpu=True)
    data = DPOTrainer._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), data, tokenizer, args, "train")
    collate = DataCollatorForPreference(pad_token_id=0, max_length=max_length)
    for example in data:
        batch = collate([example])
        out = []
        for ids, real, mask in zip(*(batch[k].tolist() for k in ("input_ids", "attention_mask", "completion_mask"))):
            n = sum(real)
            out.append({"ids": ids[:n], "first": mask[:n].index(1) if 1 in mask[:n] else n})
        yield {"row": example["row"], "sequences": out}


def unpaired(rows, tokenizer, max_length):
    data = datasets.Dataset.from_list([{**row, "row": i} for i, row in enumerate(rows)])
    args = KTOConfig(output_dir="unused", max_length=max_length, report_to=[], use_cpu=True)
    trainer = SimpleNamespace(_tokenizer=tokenizer, calculate_KL=True, desirable_weight=1.0, undesirable_weight=1.0)
    data = KTOTrainer._prepare_dataset(trainer, data, tokenizer, args, "train")
    collate = DataCollatorForUnpairedPreference(pad_token_id=0, max_length=max_length)
    for example in data:
        batch = collate([example])
        (mask,) = batch["completion_mask"].tolist()
        (ids,) = batch["input_ids"].tolist()
        first = mask.index(1) if 1 in mask else len(ids)
        yield {"row": example["row"], "label": example["label"], "sequences": [{"ids": ids, "first": first}]}


def rewards(rows, tokenizer, max_length):
    data = datasets.Dataset.from_list([{**row, "row": i} for i, row in enumerate(rows)])
    args = RewardConfig(output_dir="unused", max_length=max_length, report_to=[], use_cpu=True)
    data = RewardTrainer._prepare_dataset(SimpleNamespace(), data, tokenizer, args, "train")
    for example in data:
        yield {"row": example["row"], "sequences": [{"ids": example[k]} for k in ("chosen_ids", "rejected_ids")]}


def singles(rows, tokenizer, max_length):
    data = datasets.Dataset.from_list([{**row, "row": i} for i, row in enumerate(rows)])
    args = SFTConfig(output_dir="unused", max_length=max_length, report_to=[], use_cpu=True)
    trainer = SimpleNamespace(_tokenizer=tokenizer, completion_only_loss="prompt" in rows[0], chat_template=None)
    data = SFTTrainer._prepare_dataset(trainer, data, tokenizer, args, False, None, "train")
    for example in data:
        labels = example["labels"]
        first = next(i for i, label in enumerate(labels) if label != -100)
        assert all(label != -100 for label in labels[first:])
        yield {"row": example["row"], "sequences": [{"ids": example["input_ids"], "first": first}]}


def compare(theirs, cuvee, model, path, max_length, total, on_overflow):
    command = [cuvee, "preview", "--model", model, "--dataset", path, "--rows", str(total), "--json"]
    if max_length:
        command += ["--max-length", str(max_length), "--on-overflow", on_overflow]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    ours = {row["row"]: row for row in map(json.loads, done.stdout.split("\n")[:-1])}
    assert len(ours) == total, (len(ours), total)
    counts = collections.Counter()
    for i in range(total):
        mine, other = ours[i], theirs.get(i)
        if other is None:
            counts["dropped by both" if "skipped" in mine else "DROPPED BY TRL ALONE"] += 1
        elif "skipped" in mine:
            counts["skipped by cuvee alone: " + mine["skipped"]] += 1
        else:
            # Nothing predicts the first token: TRL marks it in a text and cannot score it.
            same = mine.get("label") == other.get("label") and [
                (m["ids"], m["first"]) for m in mine["sequences"]
            ] == [
                (o["ids"], max(o.get("first", m["first"]), 1)) for m, o in zip(mine["sequences"], other["sequences"])
            ]
            counts["equal" if same else "DIFFERENT"] += 1
            if not same:
                print(f"row {i}: cuvee {mine['sequences']}\n  TRL {other['sequences']}", file=sys.stderr)
    print(os.path.basename(path), max_length or "", dict(counts))


def main():
    cuvee = sys.argv[sys.argv.index("--compare") + 1] if "--compare" in sys.argv else None
    reward = "--reward" in sys.argv
    model, path, *limit = [a for a in sys.argv[1:] if a not in ("--compare", "--reward", cuvee)]
    max_length = int(limit[0]) if limit else None
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    raw = read(path)
    rows = as_rows(raw)
    if "chosen" in rows[0]:
        make = rewards if reward else pairs
    else:
        make = unpaired if "label" in rows[0] else singles
    theirs = {row["row"]: row for row in make(rows, tokenizer, max_length)}
    if cuvee:
        compare(theirs, cuvee, model, path, max_length, len(rows), "drop" if reward else "truncate")
    else:
        for row in theirs.values():
            print(json.dumps(row))


if __name__ == "__main__":
    main()
