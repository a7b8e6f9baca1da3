"""Makes renderings.json, tokens.json and assistants.json: what transformers 5.23 and TRL 1.16 make of the conversations below with the
templates in this folder and the tokenizer of assets/review-llama-656k.

    python tests/data/chat/make.py

The templates are written after the public descriptions of the families' formats; features.jinja is for the engine.
Needs torch, transformers, trl and datasets (CPU wheels are enough).
"""
import glob
import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.join(HERE, "..", "..", "..")
sys.path.insert(0, os.path.join(ROOT, "benches", "peers"))
import trl_tokens
from transformers import AutoTokenizer

MODEL = os.path.join(ROOT, "assets", "review-llama-656k")


def turns(*texts, system=None):
    roles = ["user", "assistant"]
    out = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
    return ([{"role": "system", "content": system}] if system is not None else []) + out


TOOL = {
    "type": "function",
    "function": {
        "name": "rate",
        "description": 'Rate <b>films</b> & "plays"',
        "parameters": {"type": "object", "properties": {"stars": {"type": "number"}}, "required": ["stars"]},
    },
}
CALL = {"type": "function", "function": {"name": "rate", "arguments": {"stars": 4.5, "why": "fun é"}}}
CALLING = [
    {"role": "user", "content": "Rate it"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": [{"ok": True}]},
    {"role": "assistant", "content": "Done."},
]
THINKING = [
    {"weight": 2, "role": "user", "content": "Hi", "z": {"k": [1, None]}, "name": "Ann"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHo", "reasoning": "hm"},
]
DATE = {"date_string": "1 May 2026"}
CONVERSATIONS = [
    (turns("Hi!"), DATE),
    (turns("Hi!", "Hello, how are you?"), DATE),
    (turns(" Which film?\n", "  A <b>funny</b> one & \"it's\" good.\n\n", "Why?", "é😀 日本"), DATE),
    (turns("Hi!", "Yes", "More", "", system=" Be brief.\n"), DATE),
    ([{"role": "assistant", "content": "I start"}], DATE),
    (THINKING, DATE),
    (CALLING, {**DATE, "tools": [TOOL]}),
]


def renderings(tokenizer):
    out = []
    for path in sorted(glob.glob(os.path.join(HERE, "*.jinja"))):
        template = open(path, encoding="utf-8").read()
        for messages, variables in CONVERSATIONS:
            for start in (False, True):
                case = {
                    "template": os.path.basename(path),
                    "messages": messages,
                    "variables": variables,
                    "add_generation_prompt": start,
                }
                options = {"chat_template": template, "tokenize": False, "add_generation_prompt": start}
                try:
                    case["text"] = tokenizer.apply_chat_template(messages, **options, **variables)
                except Exception as e:
                    case["error"] = str(e)
                out.append(case)
    return out


PROMPT = turns("A review, please.")
GOOD = [{"role": "assistant", "content": "A funny film."}]
BAD = [{"role": "assistant", "content": "Two dull hours."}]
LONG = turns("Which film?", "The new one.", "Why?", system="Be brief.")
FROM = {"user": "human", "assistant": "gpt", "system": "system"}


def older(messages):
    return {"conversations": [{"from": FROM[m["role"]], "value": m["content"]} for m in messages]}


FILES = {
    "pairs": [{"prompt": p, "chosen": GOOD, "rejected": BAD} for p in (PROMPT, LONG, turns(" \n"))],
    "implicit pairs": [
        {"chosen": PROMPT + GOOD, "rejected": PROMPT + BAD},
        {"chosen": LONG + GOOD, "rejected": LONG + BAD},
        {"chosen": PROMPT + GOOD, "rejected": PROMPT + GOOD},
    ],
    "completions": [
        {"prompt": PROMPT, "completion": GOOD},
        {"prompt": LONG, "completion": BAD},
        {"prompt": PROMPT, "completion": GOOD + turns("And?", "No.")},
    ],
    "messages": [{"messages": m} for m in (PROMPT + GOOD, LONG + BAD, turns("Hi", ""))],
    "from and value": [older(PROMPT + GOOD), older(LONG + BAD)],
    "implicit pairs of text": [
        {"chosen": "Review: good", "rejected": "Review: bad"},
        {"chosen": "Is it é fun? Yes", "rejected": "Is it é fun? No"},
        {"chosen": "same", "rejected": "same!"},
    ],
}


def tokens(tokenizer):
    out = []
    for template in ("chatml.jinja", "llama2.jinja", "zephyr.jinja"):
        tokenizer.chat_template = open(os.path.join(HERE, template), encoding="utf-8").read()
        for name, rows in FILES.items():
            for max_length in (None, 60):
                make = trl_tokens.pairs if "chosen" in rows[0] else trl_tokens.singles
                # TRL changes the messages that it is given.
                given = trl_tokens.as_rows(json.loads(json.dumps(rows)))
                case = {"name": f"{template} {name} {max_length}", "template": template, "max_length": max_length}
                out.append({**case, "rows": rows, "trl": list(make(given, tokenizer, max_length))})
    return out


def assistants(tokenizer):
    """The tokens of the assistant's turns, as SFTTrainer's assistant_only_loss has them from transformers."""
    tokenizer.chat_template = open(os.path.join(HERE, "marked.jinja"), encoding="utf-8").read()
    out = []
    for messages, _ in CONVERSATIONS:
        made = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        out.append({"messages": messages, "ids": made["input_ids"], "mask": made["assistant_masks"]})
    return out


def write(name, value):
    with open(os.path.join(HERE, name), "w", encoding="utf-8") as file:
        file.write("[\n" + ",\n".join(json.dumps(item, ensure_ascii=False) for item in value) + "\n]\n")


if __name__ == "__main__":
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    write("renderings.json", renderings(tokenizer))
    write("tokens.json", tokens(tokenizer))
    write("assistants.json", assistants(tokenizer))
