#!/usr/bin/env python3
"""Writes maps.json: device maps of OPT-6.7B and Llama-2-7B on empty (meta) weights, by the libraries themselves.

Two sets of rules are recorded, because they differ:
  accelerate    accelerate.utils.get_balanced_memory + accelerate.infer_auto_device_map
  transformers  transformers.integrations.accelerate._get_device_map (what from_pretrained(device_map=...) calls)

Forms: fp16; awq and gptq (4 bit, group 128; transformers' quantizer puts gptqmodel's own linear classes in place);
bnb4 (Linear4bit in place by transformers' quantizer; a quantized weight counts 0.5 byte per element, and every
max_memory is multiplied by 0.90 as the quantizer does). All four are made by the libraries on meta tensors: nothing is
downloaded and no GPU is needed. "refused" says that the bitsandbytes quantizer raises on the map (cpu or disk in it).

Made with torch 2.15.0, transformers 5.24.0, accelerate 1.15.0, bitsandbytes 0.50.2, gptqmodel 7.7.0, optimum 2.3.0:
  python3 tests/testdata/plan/make_maps.py tests/testdata/plan/maps.json
"""
import json
import re
import sys

import accelerate
import bitsandbytes
import gptqmodel
import torch
import transformers
from accelerate import infer_auto_device_map
from accelerate.utils import get_balanced_memory
from accelerate.utils.dataclasses import CustomDtype
from transformers import (AutoModelForCausalLM, AwqConfig, BitsAndBytesConfig, GPTQConfig, LlamaConfig,
                          OPTConfig)
from transformers.integrations.accelerate import _get_device_map
from transformers.initialization import no_tie_weights
from transformers.modeling_utils import local_torch_dtype
from transformers.quantizers.auto import AutoHfQuantizer

CONFIGS = {
    "opt-6.7b": OPTConfig(vocab_size=50272, hidden_size=4096, num_hidden_layers=32, ffn_dim=16384,
                          num_attention_heads=32, max_position_embeddings=2048, word_embed_proj_dim=4096,
                          dtype="float16"),
    "llama-2-7b": LlamaConfig(vocab_size=32000, hidden_size=4096, intermediate_size=11008,
                              num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32,
                              max_position_embeddings=4096, rms_norm_eps=1e-5, tie_word_embeddings=False,
                              dtype="float16"),
}
# The sets are tight for fp16, for 4 bit, and for neither.
MEMORY = [
    {0: "80GiB"},
    {0: "10GiB", 1: "10GiB", "cpu": "64GiB"},
    {0: "8GiB", 1: "8GiB", "cpu": "10GiB"},
    {0: "24GiB", 1: "24GiB"},
    {0: "6GiB", 1: "8GiB", 2: "24GiB", "cpu": "64GiB"},
    {0: "20GB", 1: "20GB", 2: "20GB", 3: "20GB"},
    {0: "2GiB", 1: "3GiB", "cpu": "2GiB"},
    {0: "1500MiB", 1: "1500MiB", 2: "1500MiB", "cpu": "8GiB"},
    {0: "500MiB", 1: "4GiB", "cpu": "30GiB"},
    {"cpu": "30GiB"},
]
MODES = ["sequential", "auto", "balanced_low_0"]


def quant_config(form):
    if form == "awq":
        return AwqConfig(bits=4, group_size=128, zero_point=True, version="gemm")
    if form == "gptq":
        return GPTQConfig(bits=4, group_size=128, desc_act=False, sym=True)
    if form == "bnb4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    return None


def empty_model(config, form):
    """The model on meta tensors as from_pretrained makes it, and its quantizer (None for fp16)."""
    config = type(config)(**config.to_dict())
    quant = quant_config(form)
    with torch.device("meta"), local_torch_dtype(torch.float16):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
        quantizer = None
        if quant is not None:
            quantizer = AutoHfQuantizer.from_config(quant, pre_quantized=True)
            quantizer.preprocess_model(model=model, dtype=torch.float16, device_map={"": "cpu"},
                                       checkpoint_files=None, use_kernels=False)
    model.tie_weights()
    return model, quantizer


def by_accelerate(model, quantizer, mode, max_memory):
    special = None
    if quantizer is not None and quantizer.quantized_element_size is not None:
        special = {n: CustomDtype.INT4 for n, _ in model.named_parameters()
                   if quantizer.param_needs_quantization(model, n)}
    budgets = dict(max_memory)
    if mode != "sequential":
        budgets = get_balanced_memory(model, budgets, list(model._no_split_modules), special_dtypes=special,
                                      low_zero=mode == "balanced_low_0")
    else:
        budgets = accelerate.utils.get_max_memory(budgets)
    if quantizer is not None:
        budgets = quantizer.adjust_max_memory(budgets)
    return infer_auto_device_map(model, budgets, list(model._no_split_modules), special_dtypes=special)


def by_transformers(model, quantizer, mode, max_memory):
    """(map, text of the quantizer's refusal or None)"""
    if quantizer is None:
        return _get_device_map(model, mode, dict(max_memory), None), None
    validate, refused = quantizer.validate_environment, None
    quantizer.validate_environment = lambda *args, **kwargs: None
    result = _get_device_map(model, mode, dict(max_memory), quantizer)
    quantizer.validate_environment = validate
    try:
        validate(device_map=result)
    except ValueError as error:
        refused = " ".join(str(error).split())
    return result, refused


def compact(device_map):
    """{"model.layers.0": 0, "model.layers.1": 0} -> {"model.layers.0-1": "0"}"""
    runs = []
    layers = [(int(m.group(2)), m.group(1), d) for k, d in device_map.items()
              if (m := re.fullmatch(r"(.*layers)\.(\d+)", k))]
    out = {k: str(d) for k, d in device_map.items() if not re.fullmatch(r".*layers\.\d+", k)}
    for index, prefix, device in sorted(layers):
        if runs and runs[-1][2] == str(device) and runs[-1][1] + 1 == index:
            runs[-1][1] = index
        else:
            runs.append([index, index, str(device), prefix])
    out.update({f"{prefix}.{a}-{b}": d for a, b, d, prefix in runs})
    return out


DTYPES = {torch.float16: "F16", torch.float32: "F32", torch.int32: "I32", torch.uint8: "U8"}


def stored(name, tensor, four_bit):
    """[name, dtype, shape] of the tensors that a checkpoint file holds for this one."""
    if not four_bit:
        return [[name, DTYPES[tensor.dtype], list(tensor.shape)]]
    n = tensor.numel()
    return [[name, "U8", [n // 2, 1]], [name + ".absmax", "F32", [n // 64]], [name + ".quant_map", "F32", [16]],
            [name + ".quant_state.bitsandbytes__nf4", "U8", [88]]]


def checkpoint(model, quantizer):
    """Tensors of layer 0, and of everything outside the layers, as a checkpoint file holds them."""
    layer, outside = [], []
    tensors = list(model.named_parameters()) + [(n, b) for n, b in model.named_buffers() if "rotary" not in n]
    for name, tensor in tensors:
        four_bit = (quantizer is not None and quantizer.quantized_element_size is not None
                    and quantizer.param_needs_quantization(model, name))
        if ".layers.0." in name:
            layer += stored(name, tensor, four_bit)
        elif ".layers." not in name:
            outside += stored(name, tensor, four_bit)
    return {"layer": layer, "outside": outside}


def main(path):
    versions = {m.__name__: m.__version__ for m in (torch, transformers, accelerate, bitsandbytes, gptqmodel)}
    out = {"versions": versions, "checkpoints": {}, "cases": []}
    for name, config in CONFIGS.items():
        for form in ["fp16", "bnb4", "awq", "gptq"]:
            model, quantizer = empty_model(config, form)
            out["checkpoints"][f"{name}/{form}"] = checkpoint(model, quantizer)
            for max_memory in MEMORY:
                for mode in MODES:
                    a = compact(by_accelerate(model, quantizer, mode, max_memory))
                    t, refused = by_transformers(model, quantizer, mode, max_memory)
                    t = compact(t)
                    case = {"model": name, "form": form, "mode": mode, "accelerate": a,
                            "max_memory": ",".join(f"{d}={v}" for d, v in max_memory.items())}
                    if t != a:
                        case["transformers"] = t
                    if refused:
                        case["refused"] = refused[:60]
                    out["cases"].append(case)
    with open(path, "w") as f:
        lines = ",\n".join(json.dumps(c) for c in out.pop("cases"))
        checkpoints = ",\n".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in out.pop("checkpoints").items())
        f.write(f'{{"versions": {json.dumps(out["versions"])},\n"checkpoints": {{\n{checkpoints}}},\n"cases": [\n{lines}]}}\n')


if __name__ == "__main__":
    main(sys.argv[1])
