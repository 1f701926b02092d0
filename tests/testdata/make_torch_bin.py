#!/usr/bin/env python3
"""Writes tests/testdata/torch_bin: small checkpoints in PyTorch's .bin files, made by torch itself.

usage: make_torch_bin.py       (torch, safetensors and transformers; no GPU, no network; deterministic)

llama/   config.json, model.safetensors, and the same tensors as single/pytorch_model.bin and as
         sharded/pytorch_model-0000X-of-00003.bin with pytorch_model.bin.index.json
opt/     config.json, model.safetensors without the tied lm_head, single/pytorch_model.bin: the whole
         state_dict() with its _metadata, lm_head sharing the embedding's storage, as OPT is published
kinds.bin: one tensor of each type, views with an offset, a parameter, a scalar, an empty tensor
strided.bin: a transposed view, which does not lie in one piece
"""
import json
import pathlib

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

OUT = pathlib.Path(__file__).parent / "torch_bin"


def random_model(model):
    """Random norms and biases, too: a tensor that is lost or swapped shows."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model.half().eval()


def llama():
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, num_key_value_heads=1, intermediate_size=48,
                         vocab_size=40, num_hidden_layers=2, max_position_embeddings=64,
                         tie_word_embeddings=False, torch_dtype="float16")
    state = random_model(LlamaForCausalLM(config)).state_dict()
    folder = OUT / "llama"
    for sub in ("single", "sharded"):
        (folder / sub).mkdir(parents=True, exist_ok=True)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    save_file(dict(state), folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(state, folder / "single/pytorch_model.bin")
    names = list(state)
    weight_map = {}
    for i in range(3):
        file = f"pytorch_model-{i + 1:05}-of-00003.bin"
        part = names[i * len(names) // 3:(i + 1) * len(names) // 3]
        torch.save({name: state[name].clone() for name in part}, folder / "sharded" / file)
        weight_map.update({name: file for name in part})
    total = sum(t.numel() * t.element_size() for t in state.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "sharded/pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2) + "\n")


def opt():
    config = OPTConfig(hidden_size=16, num_attention_heads=2, ffn_dim=32, vocab_size=24, num_hidden_layers=1,
                       max_position_embeddings=32, word_embed_proj_dim=16, torch_dtype="float16")
    state = random_model(OPTForCausalLM(config)).state_dict()
    folder = OUT / "opt"
    (folder / "single").mkdir(parents=True, exist_ok=True)
    config.architectures = ["OPTForCausalLM"]
    config.save_pretrained(folder)
    save_file({n: t for n, t in state.items() if n != "lm_head.weight"}, folder / "model.safetensors",
              metadata={"format": "pt"})
    torch.save(state, folder / "single/pytorch_model.bin")


def kinds():
    base = torch.arange(24, dtype=torch.float32)
    tensors = {"base": base, "view": base[4:16].view(3, 4), "row": base.view(4, 6)[2], "again": base,
               "column_of_one": base[:3].view(3, 1).t(), "parameter": torch.nn.Parameter(torch.ones(2, 3)),
               "scalar": torch.tensor(7.0), "empty": torch.zeros(0, 4)}
    for dtype in (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int32, torch.int16, torch.int8,
                  torch.uint8, torch.bool):
        tensors[str(dtype)] = torch.tensor([[1, 0, 3], [4, 5, 6]]).to(dtype)
    torch.save(tensors, OUT / "kinds.bin")
    torch.save({"t": torch.arange(6, dtype=torch.float32).view(2, 3).t()}, OUT / "strided.bin")


OUT.mkdir(exist_ok=True)
llama()
opt()
kinds()
