#!/usr/bin/env python3
"""Checks that folders of `sluice convert` are what transformers, bitsandbytes, gptqmodel and autoawq take them for.

usage: check_convert.py run SLUICE MODEL.gguf TEXT WORK     transformers 5.24, bitsandbytes 0.50.2, gptqmodel 7.7.0
       check_convert.py autoawq WORK                        autoawq 0.2.9 (an environment of its own), after run

SLUICE is build/bin/sluice, TEXT is tests/testdata/text/perplexity.txt, WORK a scratch folder. Both append their tables to
WORK/results.txt (the libraries' own logs go to standard output); results.txt beside this script keeps them. For every folder:

  loaded as   class of the linears after AutoModelForCausalLM.from_pretrained(folder)
  weights     the largest difference between the library's own dequantized weights and Sluice's (`sluice convert folder
              --to fp32`), over all linears. gptqmodel and autoawq round theirs to float16, so Sluice's are rounded too.
  logits      the largest difference between the library's own quantized run and a float32 run on Sluice's weights, for a
              prompt, beside the spread (standard deviation) of the logits. Kernels compute in float16 or bfloat16.
  perplexity  of the text: that float32 run by transformers, and `sluice eval`
  greedy      24 tokens of Sluice (`sluice up --once`) against those of the float32 run
"""
import glob
import json
import math
import os
import subprocess
import sys

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
import torch

torch.set_num_threads(1)
PROMPT = "The capital of France is"
HERE = os.path.dirname(os.path.abspath(__file__))
CASES = {  # name -> flags
    "fp16": "--to fp16", "nf4": "--to nf4", "nf4-double": "--to nf4 --double-quant", "fp4": "--to fp4",
    "fp4-double": "--to fp4 --double-quant", "gptq-g64": "--to gptq --group-size 64",
    "gptq-g64-asym": "--to gptq --group-size 64 --asymmetric", "gptq-g32": "--to gptq --group-size 32",
    "gptq-row": "--to gptq --group-size -1", "awq-g64": "--to awq --group-size 64", "awq-g32": "--to awq --group-size 32",
}
SMALL = ["llama-fp16", "llama-tied-fp32", "llama-biases", "opt-fp16", "opt-350m-style"]  # of testdata/checkpoints
SMALL_CASES = ["nf4", "fp4-double", "gptq-g32", "gptq-g64-asym", "awq-g32"]


def say(work, line):
    print(line, flush=True)
    with open(f"{work}/results.txt", "a") as file:
        file.write(line + "\n")


def convert(sluice, source, flags, target):
    if not os.path.exists(target):
        subprocess.run([sluice, "convert", source, *flags.split(), "--output", target], check=True,
                       stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return target


def load(folder):
    from transformers import AutoModelForCausalLM, GPTQConfig
    arguments = dict(dtype=torch.float16, device_map={"": "cpu"})
    if folder.endswith("gptq-row"):  # The kernel that gptqmodel picks on a CPU knows groups of 32 to 256 only
        arguments["quantization_config"] = GPTQConfig(bits=4, backend="gptq_torch")
    return AutoModelForCausalLM.from_pretrained(folder, **arguments).eval()


def library_weights(model):
    """Name of each quantized linear -> (its weight [out, in] by the library's own function, rounded to float16)."""
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            if "awq" in type(module).__name__.lower():
                from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
                w = dequantize_gemm(module.qweight, module.qzeros, module.scales, 4, module.group_size)
            else:
                w = module.dequantize_weight()
            w = w.detach()
            yield name, (w.T if tuple(w.shape) == (module.in_features, module.out_features) else w), True
        elif hasattr(getattr(module, "weight", None), "quant_state"):
            import bitsandbytes
            state = module.weight.quant_state
            state.dtype = torch.float32
            yield name, bitsandbytes.functional.dequantize_4bit(module.weight.data, state), False
            state.dtype = torch.float16


def largest(difference):
    value = difference.abs().max().item()
    return math.inf if math.isnan(value) else value  # max() would pass over a NaN


def weight_difference(model, reference):
    """Largest difference, and the number of linears. Before any forward: kernels repack their weights."""
    worst, count, classes = 0.0, 0, set()
    own = dict(reference.named_parameters())
    for name, weight, rounded in library_weights(model):
        mine = own[f"{name}.weight"].detach()
        mine = mine.half().float() if rounded else mine
        worst = max(worst, largest(weight.float() - mine))
        count += 1
        classes.add(type(model.get_submodule(name)).__name__)
    return worst, count, "/".join(sorted(classes)) or "Linear"


def perplexity(model, ids):
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids[None]).logits[0].double(), -1)
    return math.exp(-logprobs[:-1].gather(1, ids[1:, None]).mean().item())


def float32_run(sluice, folder):
    from transformers import AutoModelForCausalLM
    plain = convert(sluice, folder, "--to fp32", folder + "-as-fp32")
    return AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32, attn_implementation="eager").eval()


def sluice_greedy(sluice, folder, count):
    out = subprocess.run([sluice, "up", "--model", folder, "--workers", "1", "--port", "0", "--admin-port", "0", "--once",
                          PROMPT, "--max-tokens", str(count)], check=True, capture_output=True, text=True)
    return out.stdout.rstrip("\n")


def check(sluice, folder, ids):
    model = load(folder)
    reference = float32_run(sluice, folder)
    difference, count, kind = weight_difference(model, reference)
    with torch.no_grad():
        wanted = reference(ids[None]).logits[0]
        logits = (model(ids[None]).logits[0].float() - wanted).abs().max().item()
    row = [os.path.basename(folder), kind, str(count), f"{difference:.1e}" if count else "-", f"{logits:.3f}",
           f"{wanted.std().item():.2f}"]
    return row, reference


def run(sluice, gguf, text, work):
    from transformers import AutoTokenizer
    os.makedirs(work, exist_ok=True)
    torch.manual_seed(1)
    say(work, "folder                        loaded as                  linears weights  logits  spread")
    line = "{:29} {:26} {:>7} {:>7} {:>7} {:>7}"
    for source in SMALL:
        for case in SMALL_CASES:
            if "g64" in case and source != "llama-fp16" and source != "opt-fp16":
                continue
            folder = convert(sluice, f"{HERE}/../checkpoints/{source}", CASES[case], f"{work}/{source}-{case}")
            row, _ = check(sluice, folder, torch.randint(3, 512, (24,)))
            say(work, line.format(*row))
    folders = [convert(sluice, gguf, flags, f"{work}/{case}") for case, flags in CASES.items()]
    texts = {}
    greedy = []
    for folder in folders:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        row, reference = check(sluice, folder, tokenizer(PROMPT, return_tensors="pt").input_ids[0])
        say(work, line.format(*row))
        ids = tokenizer(open(text).read(), return_tensors="pt").input_ids[0]
        texts[os.path.basename(folder)] = perplexity(reference, ids)
        prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
        with torch.no_grad():
            out = reference.generate(prompt, max_new_tokens=24, do_sample=False)[0, prompt.shape[1]:]
        same = tokenizer.decode(out, skip_special_tokens=True) == sluice_greedy(sluice, folder, 24)
        greedy.append("same" if same else "DIFFERENT")
    say_perplexities(sluice, work, folders, text, (texts, greedy))


def say_perplexities(sluice, work, folders, text, measured):
    texts, greedy = measured
    models = [argument for folder in folders for argument in ("--model", folder)]
    out = subprocess.run([sluice, "eval", *models, "--file", text, "--runs", "0", "--json"], check=True, capture_output=True,
                         text=True)
    say(work, "\nfolder          perplexity: float32 run   sluice eval  difference   greedy")
    for result, same in zip(json.loads(out.stdout), greedy):
        own = texts[result["model"]]
        say(work, f"{result['model']:27} {own:11.4f} {result['perplexity']:13.4f} {result['perplexity'] - own:+11.4f}   {same}")


def autoawq(work):
    from awq.utils.packing_utils import dequantize_gemm
    from safetensors.torch import load_file
    say(work, "\nfolder                        linears  weights (autoawq's dequantize_gemm, float16)")
    for folder in sorted(glob.glob(f"{work}/*awq-g*")):
        if folder.endswith("-as-fp32"):
            continue
        group = json.load(open(f"{folder}/config.json"))["quantization_config"]["group_size"]
        file, own = load_file(f"{folder}/model.safetensors"), load_file(f"{folder}-as-fp32/model.safetensors")
        worst, count = 0.0, 0
        for key in [k for k in file if k.endswith(".qweight")]:
            stem = key[:-len(".qweight")]
            w = dequantize_gemm(file[key], file[f"{stem}.qzeros"], file[f"{stem}.scales"], 4, group)
            worst = max(worst, largest(w.T.float() - own[f"{stem}.weight"].half().float()))
            count += 1
        say(work, f"{os.path.basename(folder):29} {count:7} {worst:8.1e}")


if __name__ == "__main__":
    {"run": run, "autoawq": autoawq}[sys.argv[1]](*sys.argv[2:])
