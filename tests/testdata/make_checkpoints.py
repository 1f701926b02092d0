#!/usr/bin/env python3
"""Makes the small checkpoints under checkpoints/ and the golden results beside them, with the real libraries.

Every step runs in the Python environment that holds its library (versions in README.md):

  make_checkpoints.py base WORK        transformers: random OPT and Llama models in fp16 / bf16 / fp32
  make_checkpoints.py bnb WORK         bitsandbytes: NF4 and FP4, plain and nested
  make_checkpoints.py gptq WORK        gptqmodel: GPTQ v1 / v2, symmetric and not, act-order; AWQ
  make_checkpoints.py awq WORK         autoawq: AWQ GEMM
  make_checkpoints.py golden WORK      transformers: a float32 run on the weights as the library dequantizes them

WORK is a scratch folder; each writer leaves NAME/dequantized.safetensors there, the library's own idea of the weights.
"golden" copies the finished checkpoints into checkpoints/NAME and adds golden.json and golden_logits.bin:
  golden.json        prompt ids, 64 greedy ids (teacher-forced from then on), the gap between the two best logits at
                     each of them, and the positions whose logits are stored
  golden_logits.bin  float32 [positions, vocab], little-endian
"""
import json
import os
import random
import shutil
import sys

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
os.environ["HF_HUB_OFFLINE"] = "1"
import torch

torch.set_num_threads(1)

VOCAB, LAYERS, PROMPT, STEPS = 512, 2, 24, 64
LLAMA = dict(vocab_size=VOCAB, hidden_size=128, intermediate_size=256, num_hidden_layers=LAYERS, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
             tie_word_embeddings=False, rms_norm_eps=1e-5)
OPT = dict(vocab_size=VOCAB, hidden_size=128, ffn_dim=256, num_hidden_layers=LAYERS, num_attention_heads=4,
           max_position_embeddings=256, word_embed_proj_dim=128, bos_token_id=2, eos_token_id=2, pad_token_id=1)
SMALL = dict(LLAMA, vocab_size=VOCAB, hidden_size=64, intermediate_size=128, num_hidden_layers=1)

# name -> (family, config, dtype, save_pretrained arguments)
BASES = {
    "llama-fp16": ("llama", LLAMA, "float16", {}),
    "llama-bf16-sharded": ("llama", SMALL, "bfloat16", dict(max_shard_size="60KB")),
    "llama-tied-fp32": ("llama", dict(SMALL, tie_word_embeddings=True), "float32", {}),
    "llama-biases": ("llama", dict(SMALL, attention_bias=True, mlp_bias=True), "float16", {}),
    "llama-rope-linear": ("llama", dict(SMALL, rope_scaling=dict(rope_type="linear", factor=2.0)), "float16", {}),
    "llama-rope-dynamic": ("llama", dict(SMALL, max_position_embeddings=32,
                                         rope_scaling=dict(rope_type="dynamic", factor=4.0)), "float16", {}),
    "llama-rope-llama3": ("llama", dict(SMALL, rope_theta=500000.0, rope_scaling=dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
        original_max_position_embeddings=64)), "float16", {}),
    "llama-head-dim": ("llama", dict(SMALL, head_dim=32), "float16", {}),  # head_dim != hidden / heads
    "opt-fp16": ("opt", OPT, "float16", {}),
    "opt-350m-style": ("opt", dict(OPT, num_hidden_layers=1, word_embed_proj_dim=64, do_layer_norm_before=False), "float16", {}),
}
BNB = {  # name -> (base, BitsAndBytesConfig arguments)
    "llama-nf4": ("llama-fp16", dict(bnb_4bit_quant_type="nf4")),
    "llama-nf4-nested": ("llama-fp16", dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)),
    "llama-fp4": ("llama-fp16", dict(bnb_4bit_quant_type="fp4")),
    "llama-fp4-nested": ("llama-fp16", dict(bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True)),
    "opt-nf4-nested": ("opt-fp16", dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)),
    "opt-350m-style-nf4": ("opt-350m-style", dict(bnb_4bit_quant_type="nf4")),
}
GPTQ = {  # name -> (base, format, group, sym, act-order)
    "llama-gptq-v1-g128": ("llama-fp16", "gptq", 128, True, False),
    "llama-gptq-v1-g32-asym-act": ("llama-fp16", "gptq", 32, False, True),
    "llama-gptq-v2-g64-asym": ("llama-fp16", "gptq_v2", 64, False, False),
    "llama-gptq-v2-g64-act": ("llama-fp16", "gptq_v2", 64, True, True),
    "llama-gptq-v1-channel-act": ("llama-fp16", "gptq", -1, True, True),
    "opt-gptq-v1-g32-act": ("opt-fp16", "gptq", 32, True, True),
    "opt-gptq-v1-g64-asym": ("opt-fp16", "gptq", 64, False, False),
    "llama-awq-gptqmodel-g64": ("llama-fp16", "gemm", 64, False, False),
}
AWQ = {  # name -> (base, group)
    "llama-awq-g128": ("llama-fp16", 128),
    "llama-awq-g32": ("llama-fp16", 32),
    "opt-awq-g64": ("opt-fp16", 64),
}


def tokenizer(folder):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast
    tk = Tokenizer(models.BPE())
    tk.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tk.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=["<pad>", "<s>", "</s>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    text = ["the quick brown fox jumps over the lazy dog. The capital of France is Paris. ",
            "hello world, this is a small corpus for a tiny tokenizer with numbers 0123456789"]
    tk.train_from_iterator(text * 40, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tk, bos_token="<s>", eos_token="</s>", pad_token="<pad>").save_pretrained(folder)


def randomize(model, seed):
    """Weights for which errors show: no zero bias, no unit norm, logits with a spread of about 4. A tied head would repeat
    the input token for ever, so there the table is small and what comes before the head is large."""
    g = torch.Generator().manual_seed(seed)
    tied = model.config.tie_word_embeddings
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if "norm" in name and name.endswith("weight"):
                last = tied and (name in ("model.norm.weight", "model.decoder.final_layer_norm.weight"))
                p.copy_((8 if last else 1) * (1 + 0.2 * noise))
            elif p.dim() == 1:
                p.copy_(0.2 * noise)
            elif "embed" in name or "lm_head" in name:
                p.copy_((0.04 if tied and "positions" not in name else 0.3) * noise)
            else:
                p.copy_(noise * (8 if "project_out" in name else 1.2) / p.shape[1] ** 0.5)


def base(work):
    from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM
    classes = dict(llama=(LlamaConfig, LlamaForCausalLM), opt=(OPTConfig, OPTForCausalLM))
    for seed, (name, (family, config, dtype, save)) in enumerate(BASES.items()):
        config_class, model_class = classes[family]
        model = model_class(config_class(**config))
        randomize(model, 1234 + seed)
        model.to(getattr(torch, dtype)).save_pretrained(f"{work}/{name}", **save)
        tokenizer(f"{work}/{name}")
        deq = {k: v.float().contiguous() for k, v in model.state_dict().items()}
        save_dequantized(work, name, deq)
        print("base", name)


def save_dequantized(work, name, state):
    from safetensors.torch import save_file
    save_file({k: v.clone() for k, v in state.items()}, f"{work}/{name}/dequantized.safetensors")


def bnb(work):
    import bitsandbytes
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    for name, (source, arguments) in BNB.items():
        q = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **arguments)
        model = AutoModelForCausalLM.from_pretrained(f"{work}/{source}", quantization_config=q, dtype=torch.float16,
                                                     device_map={"": "cpu"})
        model.save_pretrained(f"{work}/{name}")  # Before any forward: it repacks the weights in place.
        state = {}
        for key, module in model.named_modules():
            for leaf, p in list(module.named_parameters(recurse=False)):
                full = f"{key}.{leaf}"
                if isinstance(module, bitsandbytes.nn.Linear4bit) and leaf == "weight":
                    p.quant_state.dtype = torch.float32  # Keep the library's float32 product, not its fp16 rounding.
                    p = bitsandbytes.functional.dequantize_4bit(p.data, p.quant_state)
                state[full] = p.detach().float().contiguous()
        save_dequantized(work, name, state)
        print("bnb", name)


def gptq(work, only=None):
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.quantization.config import FORMAT, AWQConfig, GPTQConfig
    random.seed(0)
    calibration = [dict(input_ids=[random.randrange(3, VOCAB) for _ in range(128)], attention_mask=[1] * 128)
                   for _ in range(16)]
    for name, (source, fmt, group, sym, act) in GPTQ.items():
        if only and name not in only:
            continue
        common = dict(bits=4, group_size=group, sym=sym, device="cpu", lm_head=False)
        if fmt.startswith("gptq"):
            q = GPTQConfig(format=FORMAT(fmt), act_group_aware=False, desc_act=act, **common)
        else:
            q = AWQConfig(format=FORMAT(fmt), **common)
        folder = f"{work}/{name}"
        model = GPTQModel.load(f"{work}/{source}", q, dtype=torch.float16)
        model.quantize(calibration, batch_size=4)
        model.save(folder)
        del model
        backend = BACKEND.GPTQ_TORCH if fmt.startswith("gptq") else BACKEND.AWQ_TORCH
        model = GPTQModel.load(folder, device="cpu", backend=backend, dtype=torch.float16).model
        state = {}
        for key, module in model.named_modules():
            if hasattr(module, "qweight"):
                w = dequantize(module, fmt).float()
                state[f"{key}.weight"] = w.contiguous()
                if module.bias is not None:
                    state[f"{key}.bias"] = module.bias.detach().float()
            else:
                for leaf, p in module.named_parameters(recurse=False):
                    state[f"{key}.{leaf}"] = p.detach().float().contiguous()
        save_dequantized(work, name, state)
        print("gptq", name, flush=True)


def dequantize(module, fmt):
    """[out, in], by the library's own function."""
    if fmt.startswith("gptq"):
        w = module.dequantize_weight().detach()
    else:
        from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
        w = dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, module.group_size).detach()
    return w.T if tuple(w.shape) == (module.in_features, module.out_features) else w


def awq(work, only=None):
    from awq import AutoAWQForCausalLM
    from awq.utils.packing_utils import dequantize_gemm
    from transformers import AutoTokenizer
    from transformers.models.opt.modeling_opt import OPTModel
    OPTModel.rotary_emb = lambda self, *a, **k: None  # autoawq asks every architecture for it.
    random.seed(0)
    calibration = [[random.randrange(3, VOCAB) for _ in range(128)] for _ in range(16)]
    for name, (source, group) in AWQ.items():
        if only and name not in only:
            continue
        from safetensors.torch import load_file
        old = transformers4_copy(work, source)
        tok = AutoTokenizer.from_pretrained(old)
        model = AutoAWQForCausalLM.from_pretrained(old, device_map="cpu", torch_dtype=torch.float16,
                                                   low_cpu_mem_usage=True, use_cache=False)
        model.quantize(tok, quant_config=dict(zero_point=True, q_group_size=group, w_bit=4, version="GEMM"),
                       calib_data=calibration, max_calib_samples=16, max_calib_seq_len=128)
        folder = f"{work}/{name}"
        model.save_quantized(folder, safetensors=True)
        tok.save_pretrained(folder)
        state = {}
        file = load_file(f"{folder}/model.safetensors")
        for key, value in file.items():
            stem, leaf = key.rsplit(".", 1)
            if leaf == "qweight":
                w = dequantize_gemm(value, file[f"{stem}.qzeros"], file[f"{stem}.scales"], 4, group)
                state[f"{stem}.weight"] = w.T.float().contiguous()
            elif leaf not in ("qzeros", "scales"):
                state[key] = value.float().contiguous()
        save_dequantized(work, name, state)
        print("awq", name, flush=True)


def transformers4_copy(work, source):
    """The same model with the keys that transformers 4 reads."""
    folder = f"{work}/{source}-t4"
    shutil.copytree(f"{work}/{source}", folder, dirs_exist_ok=True)
    config = json.load(open(f"{folder}/config.json"))
    config["torch_dtype"] = config.pop("dtype", "float16")
    rope = config.pop("rope_parameters", None)
    if rope:
        config["rope_theta"] = rope["rope_theta"]
    json.dump(config, open(f"{folder}/config.json", "w"))
    t = json.load(open(f"{folder}/tokenizer_config.json"))
    t["tokenizer_class"] = "PreTrainedTokenizerFast"
    json.dump(t, open(f"{folder}/tokenizer_config.json", "w"))
    return folder


def golden(work):
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM
    here = os.path.join(os.path.dirname(os.path.abspath(__file__)), "checkpoints")
    for name in [*BASES, *BNB, *GPTQ, *AWQ]:
        folder = f"{work}/{name}"
        config = AutoConfig.from_pretrained(folder)
        if hasattr(config, "quantization_config"):
            del config.quantization_config
        config.dtype = torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
        state = load_file(f"{folder}/dequantized.safetensors")
        state = {k if k.startswith(("model.", "lm_head")) else f"model.{k}": v for k, v in state.items()}
        missing, unexpected = model.load_state_dict(state, strict=False)
        tied = [k for k in missing if k == "lm_head.weight"]
        if tied:
            with torch.no_grad():
                model.lm_head.weight.copy_(model.get_input_embeddings().weight)
        assert not [k for k in missing if k not in tied and "inv_freq" not in k], missing
        assert not unexpected, unexpected
        target = f"{here}/{name}"
        shutil.rmtree(target, ignore_errors=True)
        skip = ("dequantized.safetensors", "quant_log.csv", "tokenizer.json", "tokenizer_config.json",
                "special_tokens_map.json", "README.md", "chat_template.jinja", "vocab.json", "merges.txt")
        keep = ("tokenizer.json", "tokenizer_config.json") if name in ("llama-fp16", "llama-gptq-v1-g128") else ()
        shutil.copytree(folder, target, ignore=lambda d, files: [f for f in files if f in skip and f not in keep])
        write_golden(model, name, target)
        print("golden", name, flush=True)


def write_golden(model, name, target):
    g = torch.Generator().manual_seed(99)
    ids = torch.randint(3, VOCAB, (1, PROMPT), generator=g)
    prompt = ids[0].tolist()
    rows, greedy, gaps = [], [], []
    with torch.no_grad():
        out = model(ids, use_cache=True)
        rows.extend(out.logits[0])
        for step in range(STEPS):
            best = rows[-1].topk(2)
            greedy.append(int(best.indices[0]))
            gaps.append(float(best.values[0] - best.values[1]))
            if step + 1 < STEPS:
                out = model(torch.tensor([[greedy[-1]]]), past_key_values=out.past_key_values, use_cache=True)
                rows.append(out.logits[0, -1])
    positions = [0, 7, PROMPT - 1, PROMPT + 20, PROMPT + STEPS - 2]
    torch.stack([rows[p] for p in positions]).numpy().astype("<f4").tofile(f"{target}/golden_logits.bin")
    result = dict(prompt_ids=prompt, greedy_ids=greedy, gaps=[round(x, 5) for x in gaps], logit_positions=positions,
                  logit_spread=float(torch.stack(rows).std()))
    json.dump(result, open(f"{target}/golden.json", "w"))


if __name__ == "__main__":
    command, work = sys.argv[1], sys.argv[2]
    os.makedirs(work, exist_ok=True)
    commands = dict(base=base, bnb=bnb, gptq=gptq, awq=awq, golden=golden)
    arguments = [sys.argv[3].split(",")] if len(sys.argv) > 3 else []  # gptq and awq: these names only
    commands[command](work, *arguments)
