"""Greedy continuations by transformers on the CPU, in f32: what `cuvee generate --temperature 0` must say, token for token,
plain and with what keeps a text from repeating itself.

    python benches/peers/greedy.py OUT.json MODEL_FOLDER...

writes for each model prompts (token ids), the tokens that follow (past any end-of-sequence), and by how much logit
each of them led the second best: where the lead is within rounding, two implementations may part.
Needs torch and transformers 5.23 (CPU wheels are enough). tests/data/fixtures/greedy.json was made with it.
"""
import json
import os
import sys

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
import torch
import transformers

NEW_TOKENS = 24
TEXTS = [
    "Once upon a time, there was",
    "The film was",
    "What is the capital of France?",
    "It begins as a comedy, and then the",
]
# For models without a tokenizer: lengths 1, 2, 7 and 30.
IDS = [[5], [3, 200], [17, 4, 99, 250, 8, 31, 77], [(7 * i + 3) % 311 for i in range(30)]]


OPTIONS = [{}, {"repetition_penalty": 1.3}, {"repetition_penalty": 1.1, "no_repeat_ngram_size": 2}]


def processors(options):
    kinds = {
        "repetition_penalty": transformers.RepetitionPenaltyLogitsProcessor,
        "no_repeat_ngram_size": transformers.NoRepeatNGramLogitsProcessor,
    }
    return transformers.LogitsProcessorList(kinds[name](value) for name, value in options.items())


@torch.no_grad()
def continuation(model, prompt, options):
    ids, leads, process = list(prompt), [], processors(options)
    for _ in range(NEW_TOKENS):
        tokens = torch.tensor([ids])
        logits = process(tokens, model(tokens, use_cache=False).logits[:, -1])[0]
        best = logits.topk(2)
        leads.append(round(float(best.values[0] - best.values[1]), 6))
        ids.append(int(best.indices[0]))
    return {"prompt": list(prompt), **options, "new": ids[len(prompt):], "leads": leads}


def main(out, folders):
    models = {}
    for folder in folders:
        folder = folder.rstrip("/")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        prompts = IDS
        if os.path.exists(os.path.join(folder, "tokenizer.json")):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            prompts = [tokenizer(text).input_ids for text in TEXTS]
        models[os.path.basename(folder)] = [
            continuation(model, prompt, options) for options in OPTIONS for prompt in prompts]
    header = {"transformers": transformers.__version__, "torch": torch.__version__}
    with open(out, "w") as file:
        lines = [f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, runs)) + "\n]" for name, runs in models.items()]
        file.write(f'{{"made_with": {json.dumps(header)},\n"models": {{\n' + ",\n".join(lines) + "\n}}\n")


main(sys.argv[1], sys.argv[2:])
