"""SmolLM2 in numpy: a small Llama whose attention, and only that, is done by a KV cache.

Start at `SmolLM2.forward`, or at `forward_many` for a batch of sequences. The caches are the
caller's, one per layer, so the same model runs on a `kvz.TwoTierCache` or on whatever else has the
three members of `Cache`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from gguf import GGUFReader, dequantize
from numpy.typing import NDArray

from kvz.batch import append_many, attend_many
from kvz.demo.tokenizer import tokenizer_from_gguf

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from kvz.cache import TwoTierCache

Floats = NDArray[np.float32]
Attend = Callable[[Floats, Floats, Floats], Floats]


class Cache(Protocol):
    """What the model asks of a cache of one layer."""

    @property
    def next_position(self) -> int:
        """Position of the token that is appended next."""

    def append(self, keys: Floats, values: Floats) -> None:
        """Take the keys and values of T tokens, (T, num_kv_heads, head_dim) each."""

    def attend(self, query: Floats) -> Floats:
        """Attend with the T newest tokens, (T, num_heads, head_dim), causally."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a Llama."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_tokens: int
    rope_base: float
    norm_epsilon: float


@dataclass(frozen=True, kw_only=True, repr=False)
class Layer:
    """Weights of one layer, (out, in); what is multiplied by the same input is one matrix."""

    attention_norm: Floats  # (width,)
    qkv: Floats  # ((num_heads + 2 * num_kv_heads) * head_dim, width)
    attention_out: Floats  # (width, num_heads * head_dim)
    mlp_norm: Floats  # (width,)
    gate_up: Floats  # (2 * hidden, width)
    mlp_out: Floats  # (width, hidden)


@dataclass(frozen=True, kw_only=True, repr=False)
class SmolLM2:
    """A Llama with tied embeddings, in float32; `from_gguf` makes one."""

    shape: Shape
    tokenizer: Tokenizer
    layers: Sequence[Layer]
    embedding: Floats  # (vocabulary, width); also the output matrix
    output_norm: Floats  # (width,)

    @cached_property
    def phases(self) -> NDArray[np.complex64]:
        """Rotations of RoPE, (max_tokens, head_dim / 2)."""
        shape = self.shape
        frequencies = shape.rope_base ** -(np.arange(0, shape.head_dim, 2) / shape.head_dim)
        angles = np.outer(np.arange(shape.max_tokens), frequencies)
        phases: NDArray[np.complex64] = np.exp(1j * angles).astype(np.complex64)
        return phases

    @classmethod
    def from_gguf(cls, path: str | PathLike[str]) -> SmolLM2:
        """Read a GGUF file of the "llama" architecture; its weights become float32.

        Raises
        ------
        ValueError
            If the file holds another architecture or another kind of tokenizer.
        """
        reader = GGUFReader(path)
        architecture = _field(reader, "general.architecture")
        if architecture != "llama":
            raise ValueError(f"{path} holds a {architecture!r}; this demo runs only 'llama'")
        shape = Shape(
            num_layers=_field(reader, "llama.block_count"),
            num_heads=_field(reader, "llama.attention.head_count"),
            num_kv_heads=_field(reader, "llama.attention.head_count_kv"),
            head_dim=_field(reader, "llama.rope.dimension_count"),
            max_tokens=_field(reader, "llama.context_length"),
            rope_base=_field(reader, "llama.rope.freq_base"),
            norm_epsilon=_field(reader, "llama.attention.layer_norm_rms_epsilon"),
        )
        weights = {each.name: dequantize(each.data, each.tensor_type) for each in reader.tensors}

        def layer(index: int) -> Layer:
            def get(*names: str) -> Floats:
                return np.concatenate([weights.pop(f"blk.{index}.{name}.weight") for name in names])

            return Layer(
                attention_norm=get("attn_norm"),
                qkv=get("attn_q", "attn_k", "attn_v"),
                attention_out=get("attn_output"),
                mlp_norm=get("ffn_norm"),
                gate_up=get("ffn_gate", "ffn_up"),
                mlp_out=get("ffn_down"),
            )

        return cls(
            shape=shape,
            tokenizer=tokenizer_from_gguf(reader),
            layers=[layer(index) for index in range(shape.num_layers)],
            embedding=weights["token_embd.weight"],
            output_norm=weights["output_norm.weight"],
        )

    def forward(
        self, ids: Sequence[int], caches: Sequence[Cache], *, last: int | None = None
    ) -> Floats:
        """Run the next tokens of a sequence; the caches hold those before them.

        Parameters
        ----------
        ids : (T,) int
        caches : one per layer
            They take the keys and values of these tokens.
        last : int, optional
            Only the last so many tokens get logits, which are a fifth of the work; all by default.

        Returns
        -------
        (T or last, vocabulary) float32
            Logits of the token after each.
        """
        x = self.embedding[np.asarray(ids)]  # (T, width)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = self._layer(layer, x, partial(self._attend, cache))
        if last is not None:
            x = x[len(x) - last :]
        return self._logits(x)

    def forward_many(
        self, ids: Sequence[Sequence[int]], sequences: Sequence[Iterable[TwoTierCache]]
    ) -> Floats:
        """Run the next tokens of many sequences, of any numbers, in one pass without padding.

        Parameters
        ----------
        ids : one (T,) int per sequence
        sequences : for each sequence its caches, one per layer

        Returns
        -------
        (B, vocabulary) float32
            Logits of the token after the last one of each sequence.
        """
        ends = np.cumsum([len(each) for each in ids])
        x = self.embedding[np.concatenate(ids)]  # all tokens after one another
        for layer, *caches in zip(self.layers, *sequences, strict=True):
            x = self._layer(layer, x, partial(self._attend_many, caches, ends[:-1]))
        return self._logits(x[ends - 1])

    def generate(self, logits: Floats, caches: Sequence[Cache], count: int) -> Iterator[int]:
        """Yield the likeliest next token up to `count` times, from the `logits` (1, vocabulary)."""
        stop = self.tokenizer.token_to_id("<|im_end|>")
        token = None
        for _ in range(count):
            if token is not None:
                logits = self.forward([token], caches)
            token = int(logits[-1].argmax())
            if token == stop:
                return
            yield token

    def _layer(self, layer: Layer, x: Floats, attend: Attend) -> Floats:
        shape = self.shape
        normed = self._norm(x, layer.attention_norm)
        heads = (normed @ layer.qkv.T).reshape(len(x), -1, shape.head_dim)
        query, key, value = np.split(
            heads, [shape.num_heads, shape.num_heads + shape.num_kv_heads], axis=1
        )
        x = x + attend(query, key, value).reshape(len(x), -1) @ layer.attention_out.T
        gate, up = np.split(self._norm(x, layer.mlp_norm) @ layer.gate_up.T, 2, axis=-1)
        silu = gate * (1 + np.tanh(gate / 2)) / 2
        result: Floats = x + (silu * up) @ layer.mlp_out.T
        return result

    def _logits(self, x: Floats) -> Floats:
        logits: Floats = self._norm(x, self.output_norm) @ self.embedding.T
        return logits

    def _attend(self, cache: Cache, query: Floats, key: Floats, value: Floats) -> Floats:
        position = cache.next_position
        cache.append(self._rope(key, position), value)
        return cache.attend(self._rope(query, position))  # (T, num_heads, head_dim)

    def _attend_many(
        self,
        caches: Sequence[TwoTierCache],
        cuts: NDArray[np.int64],
        query: Floats,
        key: Floats,
        value: Floats,
    ) -> Floats:
        positions = [cache.next_position for cache in caches]

        def turned(x: Floats) -> list[Floats]:
            parts = zip(np.split(x, cuts), positions, strict=True)
            return [self._rope(part, position) for part, position in parts]

        append_many(caches, turned(key), np.split(value, cuts))
        return np.concatenate(attend_many(caches, turned(query)))

    def _rope(self, x: Floats, position: int) -> Floats:
        # GGUF keeps the two numbers that turn together side by side: they are one complex number.
        phases = self.phases[position : position + len(x), np.newaxis]
        turned: Floats = (x.view(np.complex64) * phases).view(np.float32)
        return turned

    def _norm(self, x: Floats, weight: Floats) -> Floats:
        square = (x * x).mean(-1, keepdims=True)
        normed: Floats = x / np.sqrt(square + np.float32(self.shape.norm_epsilon)) * weight
        return normed


def _field(reader: GGUFReader, name: str) -> Any:
    field = reader.get_field(name)
    if field is None:
        raise ValueError(f"the file lacks the field {name!r}")
    return field.contents()
