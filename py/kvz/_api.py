"""Every public name of kvz. The package takes them from here when the first one is asked for."""

from kvz._load import SnapshotInfo
from kvz._persist import snapshot_info
from kvz.batch import append_many, attend_many, reorder
from kvz.cache import TwoTierCache
from kvz.config import (
    CacheConfig,
    CacheTier,
    HighPrecisionTail,
    Hybrid,
    Precision,
    QuantizedStore,
)
from kvz.errors import (
    AbiMismatchError,
    ClosedError,
    ConfigError,
    CoreError,
    CorruptError,
    CorruptSnapshotError,
    ForeignBufferError,
    InvalidArgumentError,
    InvalidTypeError,
    KvzError,
    NotFiniteError,
    NotRepresentableError,
    OutOfMemoryError,
    PoolExhaustedError,
    SnapshotError,
    SnapshotMismatchError,
    SnapshotVersionError,
    UnsupportedError,
)
from kvz.info import Info, get_num_threads, info, set_num_threads
from kvz.model import ModelCache, ModelStats
from kvz.plan import Plan, plan
from kvz.pool import AlignedBuffer, BufferPool, BufferSize, PooledBuffer, PoolStats, default_pool
from kvz.pooled import PooledBlock, PooledCache, PooledCacheStats
from kvz.prefix import PrefixCache, PrefixStats
from kvz.quality import CacheQuality, ModelQuality
from kvz.quantize import QuantizedTensor, quantize
from kvz.stats import CacheStats
from kvz.transaction import Transaction

__all__ = [
    "AbiMismatchError",
    "AlignedBuffer",
    "BufferPool",
    "BufferSize",
    "CacheConfig",
    "CacheQuality",
    "CacheStats",
    "CacheTier",
    "ClosedError",
    "ConfigError",
    "CoreError",
    "CorruptError",
    "CorruptSnapshotError",
    "ForeignBufferError",
    "HighPrecisionTail",
    "Hybrid",
    "Info",
    "InvalidArgumentError",
    "InvalidTypeError",
    "KvzError",
    "ModelCache",
    "ModelQuality",
    "ModelStats",
    "NotFiniteError",
    "NotRepresentableError",
    "OutOfMemoryError",
    "Plan",
    "PoolExhaustedError",
    "PoolStats",
    "PooledBlock",
    "PooledBuffer",
    "PooledCache",
    "PooledCacheStats",
    "Precision",
    "PrefixCache",
    "PrefixStats",
    "QuantizedStore",
    "QuantizedTensor",
    "SnapshotError",
    "SnapshotInfo",
    "SnapshotMismatchError",
    "SnapshotVersionError",
    "Transaction",
    "TwoTierCache",
    "UnsupportedError",
    "append_many",
    "attend_many",
    "default_pool",
    "get_num_threads",
    "info",
    "plan",
    "quantize",
    "reorder",
    "set_num_threads",
    "snapshot_info",
]
