"""Makes lexicon.tsv from the ratings of the training sentences: python3 assets/film-reviews/lexicon.py

rating of a word = (sum of the ratings of the sentences that it is in) / (their number + PRIOR), for words in LEAST or more
sentences. Reads train.jsonl.gz alone; heldout.jsonl.gz is read to say how well the list orders pairs that it never saw.
"""

import collections
import gzip
import json
import pathlib
import re

LEAST = 3
PRIOR = 5
HERE = pathlib.Path(__file__).parent


def rows(name):
    with gzip.open(HERE / name, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def words(text):
    """As src/rewards/text.rs."""
    parts = (part.strip("'’-").replace("’", "'").lower() for part in re.split(r"[^\w'’-]+|_", text))
    return [part for part in parts if part]


sentences = {}
for row in rows("train.jsonl.gz"):
    sentences[row["ids"][0]] = (row["chosen"], row["chosen_rating"])
    sentences[row["ids"][1]] = (row["rejected"], row["rejected_rating"])

total, count = collections.Counter(), collections.Counter()
for text, rating in sentences.values():
    for word in set(words(text)):
        total[word] += rating
        count[word] += 1
ratings = {word: total[word] / (n + PRIOR) for word, n in count.items() if n >= LEAST}

with open(HERE / "lexicon.tsv", "w", encoding="utf-8") as out:
    out.write("# word, rating, training sentences that it is in; made by lexicon.py, for the licence see ../README.md\n")
    for word in sorted(ratings):
        out.write(f"{word}\t{ratings[word]:.3f}\t{count[word]}\n")


def score(text):
    rated = [ratings[word] for word in words(text) if word in ratings]
    return sum(rated) / (len(rated) + 5) if rated else 0.0


pairs = rows("heldout.jsonl.gz")
right = sum(score(pair["chosen"]) > score(pair["rejected"]) for pair in pairs)
print(f"{len(sentences)} sentences, {len(ratings)} words, {right} of {len(pairs)} held-out pairs in order")
