"""torch's scaled_dot_product_attention over tensors of shape (1, heads, tokens, head_dim)."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from workload import Data, Floats, Job

KVS = {"f32": 32.0, "bf16": 16.0}
CASES = ("decode", "prefill", "append", "stream", "overhead")
TOLERANCE = {"f32": 1e-4, "bf16": 3e-2}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def versions() -> dict[str, Any]:
    return {"torch": torch.__version__}


class Entry:
    """The conversion of query and output is inside the step."""

    def __init__(self, job: Job, data: Data) -> None:
        torch.set_num_threads(job.threads)
        torch.set_grad_enabled(False)
        self.job, self._dtype = job, DTYPES[job.kv]
        slow = job.kv == "bf16" and not job.appends
        self.caches = job.caches(KVS[job.kv], 1 / 8 if slow else 1)
        keys, values = (self._heads_first(x).to(self._dtype) for x in (data.keys, data.values))
        self._all = [(keys.clone(), values.clone()) for _ in range(self.caches)]
        self.bytes: float = keys.nbytes + values.nbytes
        new = (self._heads_first(x[: job.new]) for x in (data.keys, data.values))
        self._new = tuple(new)
        self._query = self._heads_first(data.query)
        self._mask = None
        if job.case == "prefill" and job.past:  # is_causal means a square, from the first token on
            visible = torch.ones(job.new, job.tokens, dtype=torch.bool).tril(job.past)
            mask = torch.zeros(visible.shape, dtype=self._dtype)
            self._mask = mask.masked_fill(~visible, float("-inf"))[None, None]
        self._at, self._first = 0, torch.empty(0)
        self.run = self._append if job.appends else self._attend

    @staticmethod
    def _heads_first(rows: Floats) -> torch.Tensor:
        return torch.from_numpy(rows).transpose(0, 1).contiguous()[None]

    def prepare(self) -> None:
        if self._at + self.job.new > self.job.past:
            self._at = 0

    def _append(self) -> None:
        new = slice(self._at, self._at + self.job.new)
        for keys, values in self._all:
            keys[:, :, new], values[:, :, new] = self._new
        self._at += self.job.new

    def _attend(self) -> None:
        outputs = [self._one(keys, values) for keys, values in self._all]
        self._first = outputs[0]

    def _one(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return scaled_dot_product_attention(
            self._query.to(self._dtype),
            keys,
            values,
            attn_mask=self._mask,
            is_causal=self.job.case == "prefill" and self._mask is None,
            enable_gqa=True,
        ).float()

    def output(self) -> Floats:
        return self._first[0].transpose(0, 1).contiguous().numpy()

    def stored(self) -> tuple[Floats, Floats]:
        keys, values = (x[0].transpose(0, 1).float().numpy() for x in self._all[0])
        return keys, values
