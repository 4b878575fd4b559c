"""One layer of a `KvzCache`: a `TwoTierCache` for every sequence of the batch.

Called by transformers, through cache.py; read by attention.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from kvz.batch import append_many
from kvz.cache import TwoTierCache
from kvz.config import CacheConfig
from kvz.errors import InvalidArgumentError, UnsupportedError
from kvz.integrations.transformers.states import PackedStates
from kvz.pool import BufferPool

#: How many tokens come between two times that a window slides.
_SLIDE_TOKENS = 64


class KvzLayer(CacheLayerMixin):
    """Keys and values of one attention layer, packed.

    A layer with a sliding window drops packed tokens that no later one can see, some time before
    others come, so that the newest may be taken back until then.

    Parameters
    ----------
    config : CacheConfig
        Of each sequence; heads and dims are those of the first keys and values.
    sliding_window : int, optional
    pool : BufferPool, optional
    core : {"native", "wasm"}, optional

    Attributes
    ----------
    rows : list of TwoTierCache
        One for each sequence of the batch.
    """

    is_compileable = False
    is_croppable = True
    supports_early_init = False  # which would come with tensors of no tokens

    def __init__(
        self,
        config: CacheConfig,
        sliding_window: int | None = None,
        pool: BufferPool | None = None,
        core: str | None = None,
    ) -> None:
        super().__init__()
        if sliding_window is not None:  # which would hide them
            config = replace(config, sink_tokens=0)
        self.config = config
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.pool, self.core = pool, core
        self.record_past = False
        self._slid_at = 0  # the length when the window slid last
        self.rows: list[TwoTierCache] = []

    # -- What comes in ---------------------------------------------------------------------------

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the caches for keys (batch, heads, tokens, dim) and values like these."""
        batch, heads, _, dim = key_states.shape
        if key_states.device.type != "cpu":
            raise UnsupportedError(
                f"keys: expected tensors on the CPU, got {key_states.device}; kvz runs on CPUs"
            )
        config = replace(
            self.config, num_kv_heads=heads, head_dim=dim, value_dim=value_states.shape[-1]
        )
        self.dtype, self.device = key_states.dtype, key_states.device
        self.rows = [TwoTierCache(config, pool=self.pool, core=self.core) for _ in range(batch)]
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[PackedStates, PackedStates]:
        """Append new tokens, or, if anything is wrong, nothing.

        Parameters
        ----------
        key_states, value_states : (batch, kv heads, new tokens, dim)

        Returns
        -------
        keys, values : PackedStates
            Of as many tokens as `get_mask_sizes` promised.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        batch, heads, tokens, dim = key_states.shape
        if batch != len(self.rows):
            raise InvalidArgumentError(
                f"keys: expected a batch of {len(self.rows)} as before, got {batch}"
            )
        seen, _ = self.get_mask_sizes(tokens)
        if not self.record_past:
            self._slide()
        self._append(key_states.detach(), value_states.detach())
        made = (key_states.dtype, key_states.device)
        return (
            PackedStates(self, (batch, heads, seen, dim), *made),
            PackedStates(self, (batch, heads, seen, value_states.shape[-1]), *made),
        )

    def _append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Append to every sequence, or to none: (batch, heads, tokens, dim) each."""
        given: list[Any] = [keys.transpose(1, 2), values.transpose(1, 2)]
        if keys.shape[2] == 1:  # small, and dense now: numpy is the shortest way into the core
            given = [one.to(torch.float32).contiguous().numpy() for one in given]
        if len(self.rows) == 1:
            self.rows[0].append(given[0][0], given[1][0])
        else:
            append_many(self.rows, *given)

    def _slide(self) -> None:
        """Drop what is packed and the next token cannot see, a page of tokens or more at a time."""
        length = self.get_seq_length()
        if self.sliding_window is None or length - self._slid_at < _SLIDE_TOKENS:
            return
        self._slid_at = length
        for row in self.rows:
            evictable = row.evictable
            row.evict(evictable[evictable <= length - self.sliding_window])

    # -- Lengths ---------------------------------------------------------------------------------

    def get_seq_length(self) -> int:
        """Return how many tokens came, those that slid out included."""
        return self.rows[0].next_position if self.rows else 0

    def get_max_length(self) -> int:
        """Return the sliding window, or -1."""
        return -1 if self.sliding_window is None else self.sliding_window

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many tokens `query_length` new ones will see, and how many they will not."""
        held = self.get_seq_length()
        if self.sliding_window is None or held < self.sliding_window:
            return held + query_length, 0
        return self.sliding_window - 1 + query_length, held - self.sliding_window + 1

    # -- What transformers does with a cache -----------------------------------------------------

    def activate_past_recording(self) -> None:
        """Let nothing slide out before `crop` is called."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest -`tokens_to_remove` tokens.

        Raises
        ------
        InvalidArgumentError
            The number is positive, or a window would miss tokens that slid out already.
        """
        if tokens_to_remove > 0:
            raise InvalidArgumentError(
                f"tokens_to_remove: expected 0 or less, got {tokens_to_remove}; -n takes back n"
            )
        count = min(-tokens_to_remove, self.get_seq_length())
        if self.sliding_window is not None and count:
            left = self.get_seq_length() - count
            missing = min(left, self.sliding_window - 1) - (len(self.rows[0]) - count)
            if missing > 0:
                raise InvalidArgumentError(
                    f"tokens_to_remove: {missing} tokens that a window of {self.sliding_window} "
                    f"needs after taking back {count} slid out already; call "
                    "activate_past_recording() before the tokens come"
                )
        for row in self.rows:
            row.trim(count)
        self._slid_at = min(self._slid_at, self.get_seq_length())
        if self.record_past:
            self._slide()

    def reset(self) -> None:
        """Forget everything and give the memory back."""
        self._release(self.rows)
        self.rows = []
        self._slid_at = 0
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Make sequence i a continuation of what was sequence `beam_idx[i]`."""
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence `repeats` times."""
        self._select([row for row in range(len(self.rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences `indices`: numbers, or a mask."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._select(indices.tolist())

    def _select(self, indices: list[int]) -> None:
        """Take sequences by number; repeated ones are forked, and share their pages."""
        if not self.rows:
            return
        taken: set[int] = set()
        chosen: list[TwoTierCache] = []
        for index in indices:
            row = self.rows[index]
            chosen.append(row.fork() if index in taken else row)
            taken.add(index)
        self._release(row for index, row in enumerate(self.rows) if index not in taken)
        self.rows = chosen

    @staticmethod
    def _release(rows: Iterable[TwoTierCache]) -> None:
        for row in rows:
            row.close()

    def offload(self) -> None:
        """Do nothing: it is in the memory of the CPU."""

    def prefetch(self) -> None:
        """Do nothing."""

    def __deepcopy__(self, memo: dict[int, Any]) -> KvzLayer:
        """Fork every sequence: pages are shared until one of the two writes to them."""
        copy = KvzLayer(self.config, self.sliding_window, self.pool, self.core)
        copy.rows = [row.fork() for row in self.rows]
        copy.record_past, copy._slid_at = self.record_past, self._slid_at
        copy.is_initialized = self.is_initialized
        if self.is_initialized:
            copy.dtype, copy.device = self.dtype, self.device
        return copy

    # -- Looking ---------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        """Give `batch_size`, which transformers asks for only where it is there."""
        if name == "batch_size" and self.__dict__.get("rows"):
            return len(self.rows)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def nbytes(self) -> int:
        """Bytes of the pages held."""
        return sum(row.nbytes for row in self.rows)

    def __repr__(self) -> str:
        window = f"window {self.sliding_window}, " if self.is_sliding else ""
        return f"KvzLayer({window}{len(self.rows)} sequences of {self.get_seq_length()} tokens)"
