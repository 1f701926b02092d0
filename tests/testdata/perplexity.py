#!/usr/bin/env python3
"""Perplexity by transformers, for DefaultModelTest.EvalGivesThePerplexityOfTransformers.

usage: perplexity.py MODEL.gguf TEXT WINDOW STRIDE       needs torch, transformers 5.24 and gguf

Windows and targets as services/cli/perplexity.h says; the file's weights dequantized, all in float32, sums in float64.
Printed for SmolLM2-135M-Instruct.Q4_1.gguf and tests/testdata/text/perplexity.txt: 2048 512: 29.237692; 256 64: 32.334727.
"""
import math
import os
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

path, text, window, stride = sys.argv[1], open(sys.argv[2]).read(), int(sys.argv[3]), int(sys.argv[4])
where = dict(pretrained_model_name_or_path=os.path.dirname(path), gguf_file=os.path.basename(path))
model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32).eval()
ids = AutoTokenizer.from_pretrained(**where)(text, return_tensors="pt").input_ids[0]
total, count, scored, begin = 0.0, 0, 1, 0
while scored < len(ids):
    end = min(begin + window, len(ids))
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids[begin:end][None]).logits[0].double(), -1)
    for i in range(scored, end):
        total -= logprobs[i - 1 - begin, ids[i]].item()
        count += 1
    scored = end
    begin += stride
print(f"perplexity {math.exp(total / count):.6f} over {count} tokens")
