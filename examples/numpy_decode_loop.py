"""A decode loop of one's own: a small model with random weights, one cache per layer.

The prompt goes in at once, then token by token: each step appends the keys and values of the new
token and attends with its queries. `python -m kvz demo` is the same loop around a real model.
"""

import numpy as np

import kvz

VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 512, 128, 4, 4, 2, 32
PROMPT = [17, 250, 3, 99, 411, 8, 64, 32] * 40
STEPS = 32

rng = np.random.default_rng(7)


def matrix(rows: int, columns: int) -> np.ndarray:
    """Random weights that keep the size of what they multiply."""
    return rng.standard_normal((rows, columns), np.float32) / np.float32(np.sqrt(rows))


embedding, unembedding = matrix(VOCABULARY, WIDTH), matrix(WIDTH, VOCABULARY)
layers = [
    {
        "qkv": matrix(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM),
        "out": matrix(HEADS * HEAD_DIM, WIDTH),
    }
    for _ in range(LAYERS)
]
pool = kvz.BufferPool()
caches = [
    kvz.TwoTierCache(num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, tail_length=64, pool=pool)
    for _ in range(LAYERS)
]


def forward(ids: list[int]) -> np.ndarray:
    """Run the next tokens; return the logits after the last one."""
    x = embedding[ids]  # (T, WIDTH)
    for layer, cache in zip(layers, caches, strict=True):
        heads = (x @ layer["qkv"]).reshape(len(ids), -1, HEAD_DIM)
        query, key, value = np.split(heads, [HEADS, HEADS + KV_HEADS], axis=1)
        cache.append(key, value)
        x = x + cache.attend(query).reshape(len(ids), -1) @ layer["out"]
        x /= np.sqrt((x * x).mean(-1, keepdims=True))
    logits: np.ndarray = x[-1] @ unembedding
    return logits


token = int(forward(PROMPT).argmax())
written = [token]
for _ in range(STEPS - 1):
    token = int(forward([token]).argmax())
    written.append(token)

print("tokens:", *written)
print(caches[0])
print(f"all layers: {sum(cache.nbytes for cache in caches):,} bytes")
