#!/usr/bin/env python3
"""Writes a large synthetic Llama checkpoint, to measure the loader's peak memory. Needs nothing but Python.

usage: make_big_checkpoint.py OUTDIR [gptq|bnb|fp16] [GB]        default: gptq 4

The tensors have the shapes of Llama-2-7B (hidden 4096, ffn 11008, vocabulary 32000), the layers as many as it takes to
reach the size; shards of about 1 GB with an index. Codes are random bytes, scales 1.0, zeros 8, so every value is
legal; the model says nothing sensible.
"""
import json
import os
import struct
import sys

HIDDEN, FFN, VOCAB, GROUP = 4096, 11008, 32000, 128
SHARD_BYTES = 1 << 30
ITEM = {"F16": 2, "F32": 4, "I32": 4, "U8": 1}
RANDOM = os.urandom(1 << 22)
NF4 = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
       -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
       0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
       0.7229568362236023, 1.0]


def constant(pattern):
    """Content that repeats `pattern`."""
    return lambda size: (pattern * (size // len(pattern) + 1))[:size]


def codes(size):
    return (RANDOM * (size // len(RANDOM) + 1))[:size]


HALF_ONE = constant(struct.pack("<e", 1.0))


def plain(name, *shape):
    return [(name, "F16", list(shape), HALF_ONE)]


def gptq(base, n, k):
    return [(base + ".qweight", "I32", [k // 8, n], codes),
            (base + ".qzeros", "I32", [k // GROUP, n // 8], constant(b"\x77")),
            (base + ".scales", "F16", [k // GROUP, n], HALF_ONE)]


def bnb(base, n, k):
    blocks = n * k // 64
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [n, k],
                        "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}).encode()
    dynamic = b"".join(struct.pack("<f", (i - 127) / 128) for i in range(256))
    weight = base + ".weight"
    return [(weight, "U8", [n * k // 2, 1], codes),
            (weight + ".absmax", "U8", [blocks], constant(b"\x80")),
            (weight + ".nested_absmax", "F32", [-(-blocks // 256)], constant(struct.pack("<f", 0.25))),
            (weight + ".nested_quant_map", "F32", [256], constant(dynamic)),
            (weight + ".quant_map", "F32", [16], constant(struct.pack("<16f", *NF4))),
            (weight + ".quant_state.bitsandbytes__nf4", "U8", [len(state)], constant(state))]


def fp16(base, n, k):
    return plain(base + ".weight", n, k)


def layer(i, linear):
    p = f"model.layers.{i}."
    out = plain(p + "input_layernorm.weight", HIDDEN) + plain(p + "post_attention_layernorm.weight", HIDDEN)
    for name in "qkvo":
        out += linear(p + f"self_attn.{name}_proj", HIDDEN, HIDDEN)
    out += linear(p + "mlp.gate_proj", FFN, HIDDEN) + linear(p + "mlp.up_proj", FFN, HIDDEN)
    return out + linear(p + "mlp.down_proj", HIDDEN, FFN)


def size_of(tensor):
    size = ITEM[tensor[1]]
    for dim in tensor[2]:
        size *= dim
    return size


def write_shard(path, tensors):
    header, at = {}, 0
    for tensor in tensors:
        end = at + size_of(tensor)
        header[tensor[0]] = {"dtype": tensor[1], "shape": tensor[2], "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors:
            f.write(tensor[3](size_of(tensor)))


def main():
    out = sys.argv[1]
    method = sys.argv[2] if len(sys.argv) > 2 else "gptq"
    target = float(sys.argv[3] if len(sys.argv) > 3 else 4) * 1e9
    linear = {"gptq": gptq, "bnb": bnb, "fp16": fp16}[method]
    os.makedirs(out, exist_ok=True)
    tensors = plain("model.embed_tokens.weight", VOCAB, HIDDEN)
    tail = plain("model.norm.weight", HIDDEN) + plain("lm_head.weight", VOCAB, HIDDEN)
    total, layers = sum(map(size_of, tensors + tail)), 0
    while total < target:
        more = layer(layers, linear)
        tensors, total, layers = tensors + more, total + sum(map(size_of, more)), layers + 1
    shards = [[]]
    for tensor in tensors + tail:
        if sum(map(size_of, shards[-1])) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    index = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        write_shard(os.path.join(out, name), shard)
        index.update({tensor[0]: name for tensor in shard})
    with open(os.path.join(out, "model.safetensors.index.json"), "w") as f:
        json.dump({"metadata": {"total_size": total}, "weight_map": index}, f)
    config = {"model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN, "vocab_size": VOCAB,
              "num_hidden_layers": layers, "num_attention_heads": 32, "rms_norm_eps": 1e-5,
              "tie_word_embeddings": False, "torch_dtype": "float16"}
    if method == "gptq":
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": True}
    if method == "bnb":
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    with open(os.path.join(out, "config.json"), "w") as f:
        json.dump(config, f, indent=1)
    print(f"{out}: {method}, {layers} layers, {total / 1e9:.2f} GB in {len(shards)} files")


if __name__ == "__main__":
    main()
