"""A prompt cache that survives: in memory by its tokens, on disk between runs.

The model is a stand-in that makes keys and values of token numbers.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import kvz

FINGERPRINT = {"model": "stand-in-1", "tokenizer": "none"}
LAYERS, HEADS, DIM = 2, 2, 64


def run(model: kvz.ModelCache, tokens: list[int]) -> None:
    """Append what a model would compute for `tokens`."""
    for number, layer in enumerate(model):
        seeds = [[number, token] for token in tokens]
        rows = [np.random.default_rng(seed).standard_normal((HEADS, DIM)) for seed in seeds]
        layer.append(np.array(rows, np.float32), np.array(rows, np.float32))


system, question, other = list(range(1500)), [7, 8, 9], [7, 8, 10, 11]
with tempfile.TemporaryDirectory() as folder, kvz.PrefixCache(max_bytes=64 << 20) as prefixes:
    path = Path(folder, "system-prompt.kvz")
    with kvz.ModelCache(None, LAYERS, num_kv_heads=HEADS, head_dim=DIM) as model:
        run(model, system)
        print(f"wrote {model.save(path, fingerprint=FINGERPRINT):,} bytes")

    # The next run: nothing is computed, and the pages stay in the file until they are read.
    mapped = kvz.default_pool().core == "native"  # WebAssembly has a memory of its own
    with kvz.ModelCache.load(path, fingerprint=FINGERPRINT, mmap=mapped) as model:
        prefixes.insert(system, model)

    for prompt in (system + question, system + other):
        model, known = prefixes.fork(prompt)
        with model:
            run(model, prompt[known:])
            prefixes.insert(prompt, model)
            print(f"{len(prompt)} tokens, {known} of them were there")
    print(prefixes)
