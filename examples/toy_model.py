"""A small model with random weights that runs a batch of sequences; the other examples use it.

What matters here is `forward`: in every layer one `append_many` and one `attend_many` serve all
sequences, of which each brings as many new tokens as it likes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

import kvz

VOCABULARY, WIDTH, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 256, 64, 3, 4, 2, 32

_rng = np.random.default_rng(7)


def _matrix(rows: int, columns: int) -> np.ndarray:
    """Random weights that keep the size of what they multiply."""
    return _rng.standard_normal((rows, columns), np.float32) / np.float32(np.sqrt(rows))


_embedding, _unembedding = _matrix(VOCABULARY, WIDTH), _matrix(WIDTH, VOCABULARY)
_layers = [
    (_matrix(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM), _matrix(HEADS * HEAD_DIM, WIDTH))
    for _ in range(LAYERS)
]


def new_sequence(pool: kvz.BufferPool | None = None) -> kvz.ModelCache:
    """Make the cache of one sequence."""
    return kvz.ModelCache(
        num_layers=LAYERS,
        pool=pool,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        tail_length=16,
        migration_batch=16,
    )


def _times(x: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Multiply row by row, so that a row's bits do not depend on its batch."""
    return np.stack([row @ weights for row in x])


def forward(
    tokens: Sequence[Sequence[int]], sequences: Sequence[kvz.ModelCache]
) -> list[np.ndarray]:
    """Run the next tokens of every sequence.

    Returns
    -------
    list of (T, VOCABULARY) arrays
        For each sequence the logits after each of its T tokens.
    """
    ends = np.cumsum([len(ids) for ids in tokens])[:-1]
    x = _embedding[np.concatenate(tokens)]  # (tokens of all sequences, WIDTH)
    for i, (qkv, out) in enumerate(_layers):
        heads = _times(x, qkv).reshape(len(x), -1, HEAD_DIM)
        parts = np.split(heads, [HEADS, HEADS + KV_HEADS], axis=1)
        query, key, value = (np.split(part, ends) for part in parts)
        caches = [sequence[i] for sequence in sequences]
        kvz.append_many(caches, key, value)
        seen = np.concatenate(kvz.attend_many(caches, query))
        x = x + _times(seen.reshape(len(x), -1), out)
        x /= np.sqrt((x * x).mean(-1, keepdims=True))
    return np.split(_times(x, _unembedding), ends)


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Log-softmax over the last axis, at a temperature that suits random weights."""
    shifted = 3 * (logits - logits.max(-1, keepdims=True))
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def prompt(length: int, seed: int) -> list[int]:
    """Random tokens."""
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()
