#!/usr/bin/env python3
"""The peer: llama.cpp (llama-cpp-python) on the same file, the same threads and the same token ids as service_bench.

usage: llama_cpp_bench.py MODEL THREADS      prints one JSON line
"""
import json
import statistics
import sys
import time

import llama_cpp
import numpy as np

model_path, threads = sys.argv[1], int(sys.argv[2])
PROMPT, DECODE, ROUNDS = 512, 128, 5
model = llama_cpp.Llama(model_path=model_path, n_ctx=1024, n_threads=threads, n_threads_batch=threads, n_batch=512,
                        verbose=False, logits_all=False)
pattern = [504, 3575, 282, 4649, 314]  # "The capital of France is"


def greedy():
    logits = llama_cpp.llama_get_logits_ith(model._ctx.ctx, -1)
    return int(np.argmax(np.ctypeslib.as_array(logits, (model.n_vocab(),))))


def measure(prompt_tokens):
    model.reset()
    start = time.perf_counter()
    model.eval([pattern[i % 5] for i in range(prompt_tokens)])
    token = greedy()
    first = time.perf_counter()
    for _ in range(DECODE):
        model.eval([token])
        token = greedy()
    return prompt_tokens / (first - start), DECODE / (time.perf_counter() - first)


measure(PROMPT)  # Warm-up
long, short = [measure(PROMPT) for _ in range(ROUNDS)], [measure(5) for _ in range(ROUNDS)]
print(json.dumps(dict(what=f"llama.cpp {llama_cpp.__version__}", threads=threads,
                      prefill_512=statistics.median(x[0] for x in long),
                      decode_512_640=statistics.median(x[1] for x in long),
                      decode_5_133=statistics.median(x[1] for x in short))))
