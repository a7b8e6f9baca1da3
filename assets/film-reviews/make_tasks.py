"""Makes the tasks of `cuvee eval` from the pairs beside this file: python3 make_tasks.py

The rules are in ../README.md. The same pairs give the same bytes.
"""

import gzip
import json
import random
from pathlib import Path

HERE = Path(__file__).parent
SEED = 0
CHOICES = 4
# The wrong endings of a cloze item are drawn from this many endings of the nearest length.
NEAREST = 20


def read(name):
    with gzip.open(HERE / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def write(name, rows):
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (HERE / f"{name}.jsonl.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    print(f"{name}: {len(rows)} rows")


def sentences(rows, sides):
    """Each once, in the order of the rows."""
    return list(dict.fromkeys(row["prompt"] + row[side] for row in rows for side in sides))


def prompts(texts):
    """The first three words as a prompt; `Review:` is no word."""
    split = (text.split(" ") for text in texts)
    return [{"prompt": " ".join(words[:4]), "completion": " " + " ".join(words[4:])} for words in split if len(words) >= 7]


def each_prompt_once(rows):
    first = {}
    for row in rows:
        first.setdefault(row["prompt"], row)
    return list(first.values())


def cloze(texts):
    halves = []
    for text in texts:
        head, *words = text.split(" ")
        if len(words) >= 8:
            half = len(words) // 2
            halves.append((" ".join([head, *words[:half]]), " ".join(words[half:])))
    draw, rows = random.Random(SEED), []
    for query, ending in halves:
        others = sorted({other for _, other in halves} - {ending}, key=lambda other: (abs(len(other) - len(ending)), other))
        choices = draw.sample(others[:NEAREST], CHOICES - 1)
        gold = draw.randrange(CHOICES)
        choices.insert(gold, ending)
        rows.append({"query": query, "choices": choices, "gold": gold})
    return rows


def swapped(rows, share):
    """So many completions, drawn, go round: each to the next of these rows."""
    drawn = sorted(random.Random(SEED).sample(range(len(rows)), round(share * len(rows))))
    after = {row: rows[next]["completion"] for row, next in zip(drawn, drawn[1:] + drawn[:1])}
    return [row | {"completion": after.get(i, row["completion"])} for i, row in enumerate(rows)]


both = ["chosen", "rejected"]
train, heldout = read("train"), sentences(read("heldout"), both)
write("sentences-train", [{"text": text} for text in sentences(train, both)])
write("sentences-heldout", [{"text": text} for text in heldout])
opened = prompts(sentences(train, ["chosen"]))
write("prompts-train", opened)
write("prompts-train-30-swapped", swapped(opened, 0.3))
each = each_prompt_once(prompts(heldout))
write("prompts-heldout", each)
write("prompts-heldout-every-8th", each[::8])
write("cloze-heldout", cloze(heldout))
