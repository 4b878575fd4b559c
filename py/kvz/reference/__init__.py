"""The specification of kvz, in numpy: the same caches, written to be read instead of to be fast.

Read formats.py, then caches.py with attention.py in its place, each from top to bottom; a part uses
only what stands above it.

1. *Rounding*: the three floating-point precisions.
2. *Rotation*: an orthonormal Hadamard transform, which spreads outliers over a vector.
3. *Formats*: what a value becomes when it is stored, one vector at a time.
4. *Tiers*: which token lies in which tier, as a function of the stream alone.
5. *Attention*: in float64, over the stored values.
6. *Caches*: the verbs of `kvz.TwoTierCache` and `kvz.PooledCache` on plain arrays.

Parts 1 to 4 are exact: the core gives the same bits. All their arithmetic is float32, one rounding
(to nearest, ties to even) per operation and no fused multiply-add. Part 5 is what the core
approximates: it computes the same sums with a stated error.

Used by the test suite as its oracle; it needs numpy alone and no compiled core.
"""

from kvz.reference.attention import Attention, attention, spread_mask
from kvz.reference.caches import ReferenceCache, ReferencePooledCache, ReferenceStats, Tiers
from kvz.reference.formats import (
    GROUP,
    Floats,
    Format,
    decode,
    encode_q4,
    encode_q8,
    hadamard_blocks,
    rotate,
    round_to,
)

__all__ = [
    "GROUP",
    "Attention",
    "Floats",
    "Format",
    "ReferenceCache",
    "ReferencePooledCache",
    "ReferenceStats",
    "Tiers",
    "attention",
    "decode",
    "encode_q4",
    "encode_q8",
    "hadamard_blocks",
    "rotate",
    "round_to",
    "spread_mask",
]
