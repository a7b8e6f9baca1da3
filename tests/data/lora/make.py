"""What PEFT computes with the adapters of tests/data/peft, for tests: log-probabilities, and gradients of A and B.

    python tests/data/lora/make.py tests/data/peft tests/data/lora/expected.safetensors

PEFT 0.21, transformers 5, torch 2, in float64: CPU, no network.
"""
import pathlib
import sys

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

folder, out = pathlib.Path(sys.argv[1]), sys.argv[2]
torch.manual_seed(3)
ids = torch.randint(0, 11, (3, 9))
expected = {"input_ids": ids}


def load(base, **adapters):
    model = AutoModelForCausalLM.from_pretrained(folder / base).double()
    names = list(adapters)
    model = PeftModel.from_pretrained(model, folder / names[0], adapter_name=names[0], is_trainable=True)
    for name in names[1:]:
        model.load_adapter(folder / name, adapter_name=name)
    if adapters != {names[0]: 1.0}:
        # The concatenation is exact: A side by side, weights in B.
        model.add_weighted_adapter(names, list(adapters.values()), combination_type="cat", adapter_name="sum")
        model.set_adapter("sum")
    return model.double()


def logps(model):
    """Of every token but the first, `[rows, length - 1]`."""
    all_logps = model(ids).logits.log_softmax(-1)
    return all_logps[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]


for name, base, adapters in [("a", "base", {"a": 1.0}), ("b", "base", {"b": 1.0}), ("c", "base", {"c": 1.0}),
                             ("c and d", "base", {"c": 0.3, "d": 0.7}), ("conv", "gpt2", {"conv": 1.0})]:
    model = load(base, **adapters)
    logp = logps(model)
    expected[f"logps {name}"] = logp.detach().float()
    if name == "c":
        (-logp.mean()).backward()
        for key, p in model.named_parameters():
            if p.grad is not None:
                expected[f"grad {key.replace('.c.', '.')}"] = p.grad.float()
save_file({k: v.contiguous() for k, v in expected.items()}, out)
print(len(expected), "tensors")
