"""What is in a saved cache, and whether it is whole. Called by cli.py (`kvz inspect`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvz._persist import Source, load_layers, snapshot_info
from kvz.cache import TwoTierCache
from kvz.pooled import PooledCache


def inspect_snapshot(path: Path, core: str | None) -> dict[str, Any]:
    """Read a snapshot, checking every checksum, and say what each layer holds.

    Raises
    ------
    SnapshotError, OSError
        The file is no snapshot, is damaged, or cannot be read.
    """
    info = snapshot_info(path)
    source = Source(path=path, fingerprint=None, mmap=False, pool=None, core=core)
    kind: Any = TwoTierCache if info.kind == "two_tier" else PooledCache
    layers = []
    for cache in load_layers(kind, source, None, convert=False):
        now = cache.stats().to_dict()
        now.pop("pool_stats", None)
        layers.append({"config": cache.config.to_dict(), "stats": now, "digest": cache.digest()})
        cache.close()
    return {
        "path": str(path),
        "kind": info.kind,
        "files": list(info.files),
        "file_bytes": info.nbytes,
        "next_position": info.next_position,
        "fingerprint": info.fingerprint,
        "checksums": "passed",
        "layers": layers,
    }


HEAD = ("\nlayer", "heads\nx dim", "\nstore", "\ntokens", "\nsinks", "in\nstore", "\nwarm",
        "in\ntail", "\nbytes", "digest\n")  # fmt: skip


def rows_of(result: dict[str, Any]) -> list[list[str]]:
    """Return the cells of a table, one row for each layer."""
    rows = []
    for index, layer in enumerate(result["layers"]):
        config, now = layer["config"], layer["stats"]
        store = config["store_precision"]
        names = store if isinstance(store, str) else "/".join(store)
        pooled = result["kind"] != "two_tier"
        rows.append(
            [
                str(index),
                f"{config['num_kv_heads']}x{config['head_dim']}",
                config["tail_precision"] if pooled else names,
                f"{now['total_tokens']:,}",
                f"{now['sink_tokens']:,}",
                f"{now.get('store_tokens', 0):,}",
                f"{now.get('warm_tokens', 0):,}",
                f"{now.get('tail_tokens', now['total_tokens'] - now['sink_tokens']):,}",
                f"{now['total_bytes']:,}",
                layer["digest"],
            ]
        )
    return rows
