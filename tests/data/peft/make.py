"""Adapters that PEFT wrote, for tests: a tiny llama, three adapters with different targets, ranks, alphas and patterns, and
what PEFT's `add_weighted_adapter` and `merge_and_unload` make of them.

    python tests/data/peft/make.py tests/data/peft

PEFT 0.21, transformers 5, torch 2: CPU, no network.
"""
import pathlib
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

out = pathlib.Path(sys.argv[1])
torch.manual_seed(7)
llama = LlamaConfig(hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
                    vocab_size=11, tie_word_embeddings=True, max_position_embeddings=64)
gpt2 = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=16)


def base(config, name):
    model = AutoModelForCausalLM.from_config(config).float()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(out / name)
    return name


def adapter(base_name, name, **options):
    model = AutoModelForCausalLM.from_pretrained(out / base_name)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    for key, p in model.named_parameters():
        if "lora_" in key:
            torch.nn.init.normal_(p, std=0.5)
    for config in model.peft_config.values():
        config.base_model_name_or_path = base_name
    model.save_pretrained(out / name)
    (out / name / "README.md").unlink(missing_ok=True)


def deltas(model, name):
    """B A scaled, by adapter and module."""
    for key, module in model.base_model.model.named_modules():
        if hasattr(module, "lora_A") and name in module.lora_A:
            a, b = module.lora_A[name].weight.double(), module.lora_B[name].weight.double()
            yield f"{name} {key}", (module.scaling[name] * b @ a).detach().float()


base(llama, "base")
base(gpt2, "gpt2")
adapter("base", "a", r=2, lora_alpha=4, target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={"down_proj": 3, "layers.1.self_attn.q_proj": 1}, alpha_pattern={r"layers\.[01]\.mlp\..*": 6})
adapter("base", "b", r=4, lora_alpha=5, use_rslora=True, target_modules=r".*\.1\.self_attn\.[qo]_proj")
adapter("base", "c", r=2, lora_alpha=3, target_modules="all-linear")
adapter("base", "d", r=2, lora_alpha=3, target_modules="all-linear")
adapter("gpt2", "conv", r=2, lora_alpha=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)

expected = {}
model = AutoModelForCausalLM.from_pretrained(out / "base")
model = PeftModel.from_pretrained(model, out / "a", adapter_name="a")
for name in "bcd":
    model.load_adapter(out / name, adapter_name=name)
for name in "abcd":
    expected.update(deltas(model, name))
# PEFT merges adapters of the same targets only; `linear` also needs one rank.
for kind, options in [("linear", {}), ("cat", {}), ("svd", {"svd_rank": 2})]:
    model.add_weighted_adapter(["c", "d"], [0.3, 0.7], combination_type=kind, adapter_name=kind, **options)
    expected.update(deltas(model, kind))
merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out / "base"), out / "a").merge_and_unload()
save_file({k: v.contiguous() for k, v in merged.state_dict().items() if k != "lm_head.weight"}, out / "a_merged.safetensors")
conv = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(out / "gpt2"), out / "conv").merge_and_unload()
save_file({k: v.contiguous() for k, v in conv.state_dict().items() if k != "lm_head.weight"}, out / "conv_merged.safetensors")
save_file(expected, out / "deltas.safetensors")
for folder in out.iterdir():
    if folder.is_dir():
        (folder / "generation_config.json").unlink(missing_ok=True)
