"""Makes the folders beside it: tiny reward models of every family, and in scores.json what transformers 5.23 makes of
some sequences, padded on the right.

    python tests/data/reward/make.py

`llama` has the vocabulary of assets/review-llama-656k; its sequences are the texts beside them, tokenized as TRL 1.16's
RewardTrainer does it. The padding token is EOS there, so that the score is read before it. `gpt2` has no padding token:
transformers then takes its sequences one by one. Needs torch and transformers (CPU wheels are enough).
"""
import json
import os
import random

import torch
import transformers
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

HERE = os.path.dirname(os.path.abspath(__file__))
TOKENIZER = os.path.join(HERE, "..", "..", "..", "assets", "review-llama-656k")

COMMON = dict(
    hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    vocab_size=41, initializer_range=0.5, pad_token_id=3, bos_token_id=None, eos_token_id=None,
)
GPT = {"hidden_size": "n_embd", "intermediate_size": "n_inner", "num_hidden_layers": "n_layer"}
FAMILIES = {
    "llama": dict(model_type="llama", vocab_size=2048, pad_token_id=0, bos_token_id=0, eos_token_id=0),
    "mistral": dict(model_type="mistral", sliding_window=4),
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=True),
    "qwen3": dict(model_type="qwen3", head_dim=6),
    "neox": dict(model_type="gpt_neox", rotary_pct=0.5, num_key_value_heads=None),
    "gpt2": dict(model_type="gpt2", n_positions=16, pad_token_id=None),
}
PROMPTS = ["Review:", "Review: the film", "The plot is thin,"]
COMPLETIONS = [" a fine film.", " was dull and far too long", " but it is funny.\n"]


def config(own):
    keys = {**COMMON, **own}
    if keys["model_type"] == "gpt2":
        keys = {GPT.get(key, key): value for key, value in keys.items()}
        keys["n_head"] = keys.pop("num_attention_heads")
        del keys["num_key_value_heads"]
    keys = {key: value for key, value in keys.items() if not (key == "num_key_value_heads" and value is None)}
    return AutoConfig.for_model(keys.pop("model_type"), num_labels=1, **keys)


def sequences(name, config):
    if name == "llama":
        tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
        pairs = [(prompt, completion) for prompt in PROMPTS for completion in COMPLETIONS]
        return [{"prompt": p, "completion": c, "ids": tokenizer(p + c + tokenizer.eos_token)["input_ids"]} for p, c in pairs]
    draw = random.Random(1)
    # One ends in what pads.
    rows = [[draw.randrange(4, config.vocab_size) for _ in range(n)] for n in (2, 5, 11, 16, 9)]
    rows[2][-2:] = [3, 3]
    return [{"ids": ids} for ids in rows]


def scores(model, rows):
    pad = model.config.pad_token_id
    with torch.no_grad():
        if pad is None:
            return [model(input_ids=torch.tensor([row])).logits.item() for row in rows]
        longest = max(map(len, rows))
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        return model(input_ids=ids, attention_mask=mask).logits[:, 0].tolist()


def main():
    transformers.logging.set_verbosity_error()
    for name, own in FAMILIES.items():
        torch.manual_seed(7)
        model = AutoModelForSequenceClassification.from_config(config(own), dtype=torch.float32).eval()
        for key, weight in model.named_parameters():
            # Norms and biases that do something; the numbers are exact in half precision, which the files have.
            if weight.dim() == 1:
                torch.nn.init.normal_(weight, mean=float(key.endswith("weight")), std=0.3)
            weight.data = weight.data.half().float()
        rows = sequences(name, model.config)
        for row, score in zip(rows, scores(model, [row["ids"] for row in rows])):
            row["score"] = score
        folder = os.path.join(HERE, name)
        model.half().save_pretrained(folder)
        with open(os.path.join(folder, "scores.json"), "w") as file:
            file.write("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")


main()
