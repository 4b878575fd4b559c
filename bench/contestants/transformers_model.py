"""A small Llama-like model with random weights: one forward pass of it, over one cache or another.

Called by with_kvz_transformers.py, with_transformers_dynamic.py and with_transformers_quantized.py.
"""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from workload import Data, Floats, Job

LAYERS = 10
VOCABULARY = 1024
SEED = 20260101
STEPS = 8  # of single tokens, until the cache is set back
# Of weights, and of keys and values of the past, which are like those that the model makes. What
# such a model says errs about twice as much as what is stored.
SPREAD, PAST_SPREAD = 0.03, 0.7
# How far logits may be from the exact ones.
TOLERANCE = {"f32": 1e-4, "f16": 3e-3, "q8": 0.04, "q4": 0.4, "int4": 0.4}


@lru_cache(maxsize=1)
def model_of(heads: int, kv_heads: int, head_dim: int) -> Any:
    """Make the model, the same one in every process."""
    torch.manual_seed(SEED)
    torch.set_grad_enabled(False)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=heads * head_dim,
        intermediate_size=heads * head_dim * 8 // 3,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        initializer_range=SPREAD,
        max_position_embeddings=1 << 20,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


class Forward:
    """A step is one forward of `new` tokens, which ends with the logits of the last one."""

    caches = 1

    def __init__(self, job: Job, data: Data) -> None:
        torch.set_num_threads(job.threads)
        self.job, self.model = job, model_of(job.heads, job.kv_heads, job.head_dim)
        random = torch.Generator().manual_seed(SEED)
        self._ids = torch.randint(VOCABULARY, (1, job.new), generator=random)
        shape = LAYERS, 2, 1, job.kv_heads, job.past, job.head_dim
        self._past = torch.randn(shape, generator=random) * PAST_SPREAD
        self._steps = 0
        self._cache = self._fill(self.empty(), self._past)
        self._logits = self._all_logits(self.model, self._cache)
        self.bytes = self.count(self._cache) / LAYERS

    def empty(self) -> Any:
        """Make a cache for `model`, and switch its attention where it has to."""
        raise NotImplementedError

    def count(self, cache: Any) -> float:
        """Return the bytes that a cache takes."""
        raise NotImplementedError

    def _fill(self, cache: Any, past: Any) -> Any:
        for layer, (keys, values) in zip(cache.layers, past, strict=True):
            if self.job.past:
                layer.update(keys.clone(), values.clone())
        return cache

    def _all_logits(self, model: Any, cache: Any) -> Floats:
        logits: Floats = model(self._ids, past_key_values=cache).logits[0].numpy()
        return logits

    def prepare(self) -> None:
        if self._steps % (STEPS if self.job.new == 1 else 1) == 0:
            self._cache = self._fill(self.empty(), self._past)
        self._steps += 1

    def run(self) -> None:
        self.model(self._ids, past_key_values=self._cache, logits_to_keep=1)

    def output(self) -> Floats:
        """Return what the model said first of every new token, (new, vocabulary)."""
        return self._logits

    def exact(self) -> Floats:
        """Return the same, computed in float64 and over plain arrays."""
        model = copy.deepcopy(self.model).double()
        model.set_attn_implementation("eager")
        cache = self._fill(DynamicCache(config=model.config), self._past.double())
        return self._all_logits(model, cache)
