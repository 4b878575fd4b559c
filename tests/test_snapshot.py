"""Saving and loading: the same bits on every core, whole or not at all."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvz
from snapshot_support import corrupt, filled, same_cache
from support import KINDS, PAIRS, STORES, configure, make, make_from, same_bits, stream, unchanged

CORES = ("native", "wasm")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 11, 12, 64, 65, 150, 511, 512, 513, 900])
def test_what_is_loaded_is_what_was_saved(
    core: str, kind: str, tokens: int, tmp_path: Path
) -> None:
    with filled(core, kind, tokens) as cache:
        for other in (core, "native"):
            cache.save(tmp_path / "x")
            with type(cache).load(tmp_path / "x", core=other) as loaded:
                assert loaded.core == other
                same_cache(loaded, cache)


@pytest.mark.parametrize("store", [*STORES, *PAIRS])
@pytest.mark.parametrize("head_dim", [1, 33, 80])
def test_every_format_survives(core: str, store: Any, head_dim: int, tmp_path: Path) -> None:
    with filled(
        core, tokens=300, store_precision=store, head_dim=head_dim, value_dim=40, rotation="on"
    ) as cache:
        cache.save(tmp_path / "x")
        with kvz.TwoTierCache.load(tmp_path / "x", core=core) as loaded:
            same_cache(loaded, cache)


def test_trimmed_and_evicted_states_survive(core: str, tmp_path: Path) -> None:
    """States that no stream of appends alone would give."""
    for kind in KINDS:
        for trims in ((1,), (30, 2), (200,), (505,), (511, 1)):
            with filled(core, kind, 700) as cache:
                for n in trims:
                    cache.trim(n)
                    cache.append(*stream(cache.config, 1))
                cache.save(tmp_path / "x")
                with type(cache).load(tmp_path / "x", core=core) as loaded:
                    same_cache(loaded, cache)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_depend_on_the_stream_alone(kind: str, tmp_path: Path) -> None:
    """Not on the core, nor on how the stream was cut into appends."""
    files = []
    for core in CORES:
        for cut in (1, 7, 700):
            with make(core, kind, sink_tokens=3) as cache:
                keys, values = stream(cache.config, 700)
                for start in range(0, 700, cut):
                    cache.append(keys[start : start + cut], values[start : start + cut])
                cache.save(tmp_path / "x")
                files.append((tmp_path / "x").read_bytes())
    assert len(set(files)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_of_a_trimmed_token_is_written(core: str, kind: str, tmp_path: Path) -> None:
    """Its slots are zeros, as if it had never been there."""
    files = []
    for trimmed in (0, 30):
        with make(core, kind, max_tokens=1000) as cache:
            keys, values = stream(cache.config, 700)
            cache.append(keys[:650], values[:650])
            if trimmed:
                cache.append(*stream(cache.config, trimmed, seed=3))
                cache.trim(trimmed)
            cache.trim(cache.next_position - 100)
            cache.save(tmp_path / "x")
            files.append((tmp_path / "x").read_bytes())
    assert len(files[0]) == len(files[1])
    assert files[0][4096:] == files[1][4096:]


def test_any_safetensors_reader_can_read_it(core: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.numpy")
    reader = pytest.importorskip("safetensors")
    with filled(core, tokens=300) as cache:
        cache.save(tmp_path / "x.safetensors", fingerprint={"model": "m", "layers": [1, 2]})
        tensors = safetensors.load_file(tmp_path / "x.safetensors")
        assert sorted(tensors) == ["hashes"] + [f"layers.0.{t}" for t in ("sinks", "store", "tail")]
        store = tensors["layers.0.store"]
        assert store.dtype == np.uint8
        assert store.nbytes == cache.stats().store_bytes
        # q8 codes as docs/format.md lays them out: the first page of head 0.
        keys = np.zeros((64, 32), np.float32)
        codes, scales = store[0, 0, : 64 * 32].view(np.int8), store[0, 0, 2048:2176].view("<f2")
        for t in range(64):
            for d in range(32):
                keys[t, d] = np.float32(codes[(d // 4 * 64 + t) * 4 + d % 4]) * scales[t]
        same_bits(keys[3:], cache.get_kv(3, 64)[0][:, 0])
        with reader.safe_open(tmp_path / "x.safetensors", "np") as file:
            about = json.loads(file.metadata()["snapshot"])
        assert about["fingerprint"] == {"model": "m", "layers": [1, 2]}
    with make(core) as empty:
        empty.save(tmp_path / "empty.safetensors")
        assert set(safetensors.load_file(tmp_path / "empty.safetensors")) == {"hashes"}


def test_a_fingerprint_has_to_match(core: str, tmp_path: Path) -> None:
    with filled(core) as cache:
        cache.save(tmp_path / "x", fingerprint={"model": "a", "tokenizer": 7})
    load = kvz.TwoTierCache.load
    load(tmp_path / "x", fingerprint={"model": "a"}, core=core)
    load(tmp_path / "x", core=core)
    for wrong in ({"model": "b"}, {"rope": "a"}, {"model": "a", "tokenizer": 8}, {"rope": None}):
        with pytest.raises(kvz.SnapshotMismatchError, match="fingerprint: expected"):
            load(tmp_path / "x", fingerprint=wrong, core=core)
    assert kvz.snapshot_info(tmp_path / "x").fingerprint == {"model": "a", "tokenizer": 7}


def test_bad_fingerprints_are_refused(tmp_path: Path) -> None:
    cyclic: dict[str, Any] = {}
    cyclic["self"] = cyclic
    with filled("native") as cache:
        for bad in ("model", [1], {1: 2}):
            with pytest.raises(kvz.InvalidTypeError, match="fingerprint"):
                cache.save(tmp_path / "x", fingerprint=bad)
        for unfit in ({"a": object()}, {"a": float("nan")}, cyclic):
            with pytest.raises(kvz.InvalidArgumentError, match="fingerprint: not JSON"):
                cache.save(tmp_path / "x", fingerprint=unfit)
    assert not list(tmp_path.iterdir())


def test_another_kind_is_refused(tmp_path: Path) -> None:
    for kind, other in (("pooled", kvz.TwoTierCache), ("two_tier", kvz.PooledCache)):
        with filled("native", kind) as cache:
            cache.save(tmp_path / "x")
        with pytest.raises(kvz.SnapshotMismatchError, match=f"found {kind}"):
            other.load(tmp_path / "x")


def test_another_configuration_has_to_be_asked_for(core: str, tmp_path: Path) -> None:
    """Without `convert` it is refused; with it every token is read back and appended."""
    with filled(core, tokens=300) as cache:
        cache.save(tmp_path / "x")
        same = kvz.TwoTierCache.load(tmp_path / "x", config=cache.config, core=core, convert=True)
        same_cache(same, cache)
        cache.save(tmp_path / "x")
        other = configure(store_precision=("q8", "q4"), tail_length=20, sink_tokens=1)
        with pytest.raises(kvz.SnapshotMismatchError, match=r"store_precision .*convert=True"):
            kvz.TwoTierCache.load(tmp_path / "x", config=other, core=core)
        converted = kvz.TwoTierCache.load(tmp_path / "x", config=other, core=core, convert=True)
        with make_from(core, other) as expected:
            expected.append(*cache.get_all_kv())
            same_cache(converted, expected)
        with pytest.raises(kvz.InvalidTypeError, match="config"):
            kvz.TwoTierCache.load(tmp_path / "x", config={"head_dim": 32})  # type: ignore[arg-type]


def test_conversion_keeps_positions(core: str, tmp_path: Path) -> None:
    """Also where the window has moved on and left a gap behind the sinks."""
    with filled(core, tokens=900) as cache:
        cache.save(tmp_path / "x")
        other = configure(store_precision="q4", sink_tokens=3)
        with kvz.TwoTierCache.load(
            tmp_path / "x", config=other, core=core, convert=True
        ) as converted:
            np.testing.assert_array_equal(converted.positions, cache.positions)
            assert converted.next_position == 900
            converted.check()
            same_bits(converted.get_all_kv()[0][:3], cache.get_all_kv()[0][:3])
            tail = len(converted) - converted.stats().tail_tokens
            same_bits(converted.get_all_kv()[0][tail:], cache.get_all_kv()[0][tail:])
        for sinks in (0, 4):
            other = configure(store_precision="q4", sink_tokens=sinks)
            with pytest.raises(kvz.SnapshotMismatchError, match="sink_tokens: expected 3"):
                kvz.TwoTierCache.load(tmp_path / "x", config=other, core=core, convert=True)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: Any) -> None:
    """Wherever the system fails: nothing is torn, nothing is left over."""
    path = tmp_path / "x"
    with filled("native", tokens=300) as cache:
        cache.save(path)
        before = path.read_bytes()
        cache.append(*stream(cache.config, 50, seed=1))

        def broken(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        for name in ("fsync", "replace"):
            for incremental in (False, True):
                with monkeypatch.context() as patch, unchanged(cache):
                    patch.setattr(os, name, broken)
                    patch.setattr("kvz._save.SYNC_BYTES", 1)  # as in a large file
                    with pytest.raises(OSError, match="No space"):
                        cache.save(path, incremental=incremental)
                assert [p.name for p in tmp_path.iterdir()] == ["x"]
                assert path.read_bytes() == before
        with pytest.raises(FileNotFoundError):
            cache.save(tmp_path / "no" / "x")
    with pytest.raises(FileNotFoundError):
        kvz.TwoTierCache.load(tmp_path / "nothing")
    with pytest.raises(IsADirectoryError):
        kvz.TwoTierCache.load(tmp_path)


def test_a_full_pool_refuses_and_gives_everything_back(core: str, tmp_path: Path) -> None:
    with filled(core, tokens=300) as cache:
        cache.save(tmp_path / "x")
        small = kvz.BufferPool(max_bytes=cache.nbytes - 64, core=core)
        with pytest.raises(kvz.PoolExhaustedError):
            kvz.TwoTierCache.load(tmp_path / "x", pool=small)
        assert small.stats().bytes_in_use == 0
        enough = kvz.BufferPool(max_bytes=cache.nbytes, core=core)
        with kvz.TwoTierCache.load(tmp_path / "x", pool=enough) as loaded:
            assert loaded.memory_pool is enough
            assert loaded.digest() == cache.digest()


def test_a_cache_is_saved_whole_while_others_append(core: str, tmp_path: Path) -> None:
    """Every file is one moment of the stream, never half an append."""
    with make(core, max_tokens=4096) as cache:
        keys, values = stream(cache.config, 400)
        done = threading.Event()

        def append() -> None:
            for start in range(0, 400, 5):
                cache.append(keys[start : start + 5], values[start : start + 5])
            done.set()

        thread = threading.Thread(target=append)
        thread.start()
        seen = set()
        while not done.is_set() or not seen:
            cache.save(tmp_path / "x", incremental=bool(len(seen) % 2))
            with kvz.TwoTierCache.load(tmp_path / "x", core=core) as loaded:
                tokens = len(loaded)
                seen.add(tokens)
                assert tokens % 5 == 0
                with make(core, max_tokens=4096) as expected:
                    expected.append(keys[:tokens], values[:tokens])
                    assert loaded.digest() == expected.digest()
        thread.join()


def test_files_are_as_others_and_links_are_followed(tmp_path: Path) -> None:
    """A save takes the mode that any new file gets, and goes to where a link points."""
    real, link = tmp_path / "real", tmp_path / "link"
    with filled("native") as cache:
        cache.save(real)
        (tmp_path / "plain").write_bytes(b"")
        assert real.stat().st_mode == (tmp_path / "plain").stat().st_mode
        if os.name == "posix":
            link.symlink_to(real)
            cache.append(*stream(cache.config, 5))
            cache.save(link)
            assert link.is_symlink()
            assert kvz.TwoTierCache.load(real).digest() == cache.digest()
        cache.save(str(real))
        cache.close()
        with pytest.raises(kvz.ClosedError):
            cache.save(real)


def test_a_model_is_saved_as_a_whole(core: str, tmp_path: Path) -> None:
    """Layers of different shapes in one file; increments bring what is new in each."""
    path = tmp_path / "x"
    configs = [
        configure(store_precision="q4", head_dim=64),
        configure(max_tokens=64, sink_tokens=2),
        configure(num_kv_heads=3, value_dim=16),
    ]
    with kvz.ModelCache(configs, core=core) as model:
        for n in (1, 200, 37):
            for layer in model:
                layer.append(*stream(layer.config, n, seed=n))
            model.save(path, fingerprint={"model": "m"}, incremental=True)
            info = kvz.snapshot_info(path)
            assert (info.num_layers, info.next_position) == (3, model.next_position)
            assert info.configs == model.configs
            for mmap in {False, core == "native"}:
                with kvz.ModelCache.load(
                    path, core=core, mmap=mmap, fingerprint={"model": "m"}
                ) as loaded:
                    assert loaded.digest() == model.digest()
                    assert loaded.configs == model.configs
                    loaded.trim(1)
                    loaded.check()
        assert model.save(path, fingerprint={"model": "m"}, incremental=True) == 0
        kvz.ModelCache.load(path, configs=configs, core=core).close()
        with pytest.raises(kvz.SnapshotMismatchError, match="expected 2 layers, found 3"):
            kvz.ModelCache.load(path, configs=configs[:2], core=core)
        with pytest.raises(kvz.SnapshotMismatchError, match="expected 1 layers, found 3"):
            kvz.TwoTierCache.load(path, core=core)
        other = [configs[0], configs[1], configure(num_kv_heads=3, value_dim=16, tail_length=9)]
        with pytest.raises(kvz.SnapshotMismatchError, match="tail_length 9, found 8"):
            kvz.ModelCache.load(path, configs=other, core=core)
        with kvz.ModelCache.load(path, configs=other, core=core, convert=True) as converted:
            assert converted.configs == tuple(other)
            assert converted[0].digest() == model[0].digest()
            np.testing.assert_array_equal(converted[2].positions, model[2].positions)


def test_a_refused_model_gives_everything_back(core: str, tmp_path: Path) -> None:
    pool = kvz.BufferPool(core=core)
    with kvz.ModelCache(configure(), 3, core=core) as model:
        for layer in model:
            layer.append(*stream(layer.config, 100))
        model.save(tmp_path / "x")
        corrupt(tmp_path / "x", (tmp_path / "x").stat().st_size - 9000)
        with pytest.raises(kvz.CorruptSnapshotError):
            kvz.ModelCache.load(tmp_path / "x", pool=pool)
        assert pool.stats().bytes_in_use == 0


def xxh64(data: bytes) -> int:
    """XXH64 with seed 0, from its specification."""
    p1, p2, p3 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9
    p4, p5, mask = 0x85EBCA77C2B2AE63, 0x27D4EB2F165667C5, (1 << 64) - 1

    def rotated(x: int, n: int) -> int:
        return (x << n | x >> (64 - n)) & mask

    def mixed(lane: int, x: int) -> int:
        return rotated((lane + x * p2) & mask, 31) * p1 & mask

    whole = len(data) // 32 * 32
    lanes = [(p1 + p2) & mask, p2, 0, -p1 & mask]
    for at in range(0, whole, 8):
        i = at // 8 % 4
        lanes[i] = mixed(lanes[i], int.from_bytes(data[at : at + 8], "little"))
    x = sum(rotated(lane, n) for lane, n in zip(lanes, (1, 7, 12, 18), strict=True)) & mask
    for lane in lanes:
        x = ((x ^ mixed(0, lane)) * p1 + p4) & mask
    x = (x if whole else p5) + len(data) & mask
    at = whole
    while at + 8 <= len(data):
        x = rotated(x ^ mixed(0, int.from_bytes(data[at : at + 8], "little")), 27) * p1 + p4 & mask
        at += 8
    if at + 4 <= len(data):
        x = x ^ int.from_bytes(data[at : at + 4], "little") * p1 & mask
        x = rotated(x, 23) * p2 + p3 & mask
        at += 4
    for byte in data[at:]:
        x = rotated(x ^ byte * p5 & mask, 11) * p1 & mask
    x = (x ^ x >> 33) * p2 & mask
    x = (x ^ x >> 29) * p3 & mask
    return x ^ x >> 32


def test_the_checksums_are_what_the_documentation_says(core: str, tmp_path: Path) -> None:
    with filled(core, store_precision="q4", num_kv_heads=1) as cache:
        cache.save(tmp_path / "x")
    raw = (tmp_path / "x").read_bytes()
    length = 8 + int.from_bytes(raw[:8], "little")
    assert length % 4096 == 0
    header = raw[:37] + b"0" * 16 + raw[53:length]
    assert raw[37:53].decode() == f"{xxh64(header):016x}"
    tensors = json.loads(raw[8:length])
    about = json.loads(tensors.pop("__metadata__")["snapshot"])
    begin, end = tensors.pop("hashes")["data_offsets"]
    assert length + end == len(raw)
    assert about["hashes"] == f"{xxh64(raw[length + begin :]):016x}"
    hashes = []
    for entry in tensors.values():
        size = entry["shape"][-1]
        assert entry["data_offsets"][0] % 64 == 0
        for at in range(length + entry["data_offsets"][0], length + entry["data_offsets"][1], size):
            hashes.append(xxh64(raw[at : at + size]))
    assert hashes == np.frombuffer(raw[length + begin :], "<u8").tolist()
