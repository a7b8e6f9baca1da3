"""The Parquet files of this folder, and the rows that they hold as JSON lines. Run from the root of the repository; needs pyarrow."""
import gzip
import json
import pathlib

import pyarrow
import pyarrow.parquet

here = pathlib.Path(__file__).parent


def write(name, rows, **how):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), here / f"{name}.parquet", **how)


with gzip.open("assets/film-reviews/heldout.jsonl.gz", "rt") as file:
    pairs = [json.loads(line) for line in file][:60]
write("pairs-snappy", pairs, compression="snappy", row_group_size=25)
write("pairs-lz4", pairs[:2], compression="lz4")

# What one row has, all rows of a file have: null where it had nothing.
call = {"function": {"name": "search", "arguments": {"query": "films"}}}
chats = [
    {"messages": [{"role": "user", "content": "Which film?"}, {"role": "assistant", "content": "The funny one."}], "id": 7},
    {"messages": [{"role": "user", "content": "Größer? 日本"}, {"role": "assistant", "content": "", "tool_calls": [call]}], "id": 8},
]
write("chats-zstd", chats, compression="zstd")
write("chats-gzip", chats, compression="gzip", use_dictionary=False, data_page_version="2.0")
(here / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
# Text as bytes, an image, and a date that no calendar has.
raw = pyarrow.table({"text": pyarrow.array([b"gr\xc3\xbcn"]), "image": pyarrow.array([b"\xff\xd8"])})
pyarrow.parquet.write_table(raw, here / "bytes.parquet")
dates = pyarrow.table({"text": ["a"], "at": pyarrow.array([2**63 - 1], pyarrow.timestamp("ms"))})
pyarrow.parquet.write_table(dates, here / "dates.parquet")
no_text = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
pyarrow.parquet.write_table(no_text, here / "empty.parquet")
