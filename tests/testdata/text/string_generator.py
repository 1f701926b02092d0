"""The strings both sides make: make_goldens.py here, tests/services/text/string_generator.h in C++.

String i: a 64-bit LCG starts at i * 0x9E3779B97F4A7C15 + 1; a draw is state = state * 6364136223846793005 +
1442695040888963407 (mod 2^64), value state >> 33. 1 + draw % 20 parts follow. A part: draw % 12 == 0 is one code point of
ranges[draw % len], low + draw % (high - low + 1); else pieces[draw % len]."""
import json
import pathlib

MASK = (1 << 64) - 1
_data = json.loads((pathlib.Path(__file__).parent / "generator.json").read_text(encoding="utf-8"))
PIECES, RANGES = _data["pieces"], _data["ranges"]


def make_string(i):
    state = (i * 0x9E3779B97F4A7C15 + 1) & MASK

    def draw():
        nonlocal state
        state = (state * 6364136223846793005 + 1442695040888963407) & MASK
        return state >> 33

    parts = []
    for _ in range(1 + draw() % 20):
        if draw() % 12 == 0:
            low, high = RANGES[draw() % len(RANGES)]
            parts.append(chr(low + draw() % (high - low + 1)))
        else:
            parts.append(PIECES[draw() % len(PIECES)])
    return "".join(parts)
