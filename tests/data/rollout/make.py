"""What transformers' logits processors leave of some logits: processors.json, which the tests of src/rollout read.

    python make.py

Needs torch and transformers 5.23 (CPU wheels are enough). The order of processors is that of
`GenerationMixin._get_logits_processor`, which makes the list itself from a generation config.
"""
import json
import math
import os
import pathlib

os.environ.update(HF_HUB_OFFLINE="1", CUDA_VISIBLE_DEVICES="")
import torch
import transformers

VOCAB = 40
CASES = [
    {},
    {"temperature": 0.6},
    {"top_k": 7},
    {"top_p": 0.7},
    {"min_p": 0.2},
    {"repetition_penalty": 1.8},
    {"repetition_penalty": 0.7, "temperature": 1.4},
    {"no_repeat_ngram_size": 1},
    {"no_repeat_ngram_size": 2},
    {"no_repeat_ngram_size": 3, "repetition_penalty": 1.2},
    {"min_new_tokens": 9},
    {"min_new_tokens": 4},
    {"temperature": 1.3, "top_k": 12, "top_p": 0.8},
    {"temperature": 0.8, "top_p": 0.9, "min_p": 0.1},
    {"temperature": 2.0, "top_k": 20, "top_p": 0.95, "min_p": 0.05, "repetition_penalty": 1.5,
     "no_repeat_ngram_size": 2, "min_new_tokens": 8},
]
EOS = [3, 11]
PROMPT, COMPLETION = [5, 9, 5, 30, 2, 7, 5, 9], [30, 2, 8, 5, 9]


def main():
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    generator = torch.Generator().manual_seed(5)
    cases = []
    for case in CASES:
        logits = (3 * torch.randn(1, VOCAB, generator=generator)).float()
        config = transformers.GenerationConfig(**{"do_sample": True, "top_k": 0, "eos_token_id": EOS, **case})
        model._prepare_special_tokens(config, device="cpu")
        ids = torch.tensor([PROMPT + COMPLETION])
        processors = model._get_logits_processor(config, input_ids_seq_length=len(PROMPT), device="cpu")
        logps = torch.log_softmax(processors(ids, logits.clone()).double(), -1)[0]
        kept = [None if math.isinf(logp) else logp for logp in logps.tolist()]
        cases.append({"options": case, "logits": logits[0].tolist(), "logps": kept})
    header = {"transformers": transformers.__version__, "torch": torch.__version__}
    out = {"made_with": header, "eos": EOS, "prompt": PROMPT, "completion": COMPLETION}
    path = pathlib.Path(__file__).parent / "processors.json"
    lines = ",\n".join(map(json.dumps, cases))
    path.write_text(f'{json.dumps(out)[:-1]},\n"cases": [\n{lines}\n]}}\n')


main()
