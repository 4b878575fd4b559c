"""Increments and mapped files: what is saved and loaded without copying the whole."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvz
from snapshot_support import corrupt, filled, same_cache
from support import KINDS, same_bits, stream


def test_an_increment_holds_only_what_is_new(core: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    with filled(core, tokens=2000, max_tokens=4000) as cache:
        whole = cache.save(path, incremental=True)  # nothing there yet: all of it
        assert whole == path.stat().st_size
        assert cache.save(path, incremental=True) == 0
        sizes = []
        for seed in range(4):
            cache.append(*stream(cache.config, 64, seed=seed))
            sizes.append(cache.save(path, incremental=True))
            with kvz.TwoTierCache.load(path, core=core) as loaded:
                assert loaded.digest() == cache.digest()
        assert max(sizes) < whole / 4
        info = kvz.snapshot_info(path)
        assert [Path(name).name for name in info.files] == ["x", "x.1", "x.2", "x.3", "x.4"]
        assert info.nbytes == whole + sum(sizes)
        assert info.next_position == cache.next_position
        cache.trim(100)  # less than before, and an older state again
        cache.save(path, incremental=True)
        same_cache(kvz.TwoTierCache.load(path, core=core), cache)
        cache.save(path)
        assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_increments_never_take_more_than_twice_the_room(tmp_path: Path) -> None:
    """What is out of date is cleaned up before it outweighs what is not."""
    path = tmp_path / "x"
    with filled("native", tokens=100, tail_length=100, head_dim=256, max_tokens=3000) as cache:
        for seed in range(60):
            cache.append(*stream(cache.config, 5, seed=seed))
            cache.save(path, incremental=True)
            taken = sum(p.stat().st_size for p in tmp_path.iterdir())
            assert taken <= 2 * cache.nbytes + (1 << 20) + 65 * 8192
        same_cache(kvz.TwoTierCache.load(path), cache)


def test_an_increment_of_something_else_is_a_whole_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with filled("native", tokens=300) as cache, filled("native", tokens=90, head_dim=64) as other:
        for one, fingerprint in ((cache, None), (other, None), (cache, {"a": 1}), (cache, None)):
            assert one.save(path, fingerprint=fingerprint, incremental=True) > 0
            assert [p.name for p in tmp_path.iterdir()] == ["x"]
            assert kvz.TwoTierCache.load(path, fingerprint=fingerprint).digest() == one.digest()
        path.write_bytes(b"something else")
        cache.save(path, incremental=True)
        assert kvz.TwoTierCache.load(path).digest() == cache.digest()


def test_leftover_increments_of_an_older_snapshot_do_no_harm(tmp_path: Path) -> None:
    """As after a crash between the new base and the removal of the old increments."""
    path, increment = tmp_path / "x", tmp_path / "x.1"
    with filled("native", tokens=300) as cache:
        cache.save(path)
        cache.append(*stream(cache.config, 9))
        cache.save(path, incremental=True)
        stale = increment.read_bytes()
        cache.append(*stream(cache.config, 9))
        cache.save(path)
        increment.write_bytes(stale)
        assert kvz.TwoTierCache.load(path).digest() == cache.digest()
        cache.append(*stream(cache.config, 9))
        cache.save(path, incremental=True)
        assert kvz.TwoTierCache.load(path).digest() == cache.digest()
        with pytest.raises(kvz.SnapshotError, match="an increment"):
            kvz.TwoTierCache.load(increment)


def test_a_save_stopped_anywhere_leaves_the_last_state(tmp_path: Path, monkeypatch: Any) -> None:
    """A crash leaves a part of the file under another name, or all of it under its own."""
    path = tmp_path / "x"
    with filled("native", tokens=300) as cache:
        cache.save(path)
        digest = cache.digest()
        cache.append(*stream(cache.config, 30))

        class Stop(BaseException):
            pass

        def stop(*_: Any) -> None:
            raise Stop

        for stage in ("write", "fsync", "replace", "sync_folder"):
            for incremental in (True, False):
                with monkeypatch.context() as patch:
                    patch.setattr(Path, "unlink", lambda *_: None)  # nothing is tidied up
                    if stage == "write":
                        patch.setattr("kvz._save._Disk.write", stop)
                    elif stage == "sync_folder":
                        patch.setattr("kvz._save.sync_folder", stop)
                    else:
                        patch.setattr(os, stage, stop)
                    with pytest.raises(Stop):
                        cache.save(path, incremental=incremental)
                renamed = stage == "sync_folder"
                expected = cache.digest() if renamed else digest
                with kvz.TwoTierCache.load(path) as loaded:
                    assert loaded.digest() == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [0, 3, 65, 150, 900])
@pytest.mark.usefixtures("native_core")
def test_a_mapped_cache_is_the_same_cache(kind: str, tokens: int, tmp_path: Path) -> None:
    """Also after whatever is done to it, while the file stays as it is."""
    with filled("native", kind, tokens) as cache:
        cache.save(tmp_path / "x")
        raw = (tmp_path / "x").read_bytes()
        pool = kvz.BufferPool()
        with type(cache).load(tmp_path / "x", mmap=True, pool=pool) as mapped:
            assert pool.stats().bytes_in_use == 0
            assert mapped.mapped_bytes == cache.nbytes == mapped.nbytes
            query = np.ones((2, 32), np.float32)
            same_bits(mapped.attend(query), cache.attend(query))
            other = mapped.fork()
            same_cache(mapped, cache)
            assert mapped.mapped_bytes < mapped.nbytes
            other.append(*stream(cache.config, 40, seed=8))
            other.trim(90)
            other.check()
            with mapped.fork() as third:
                mapped.clear()
                same_cache(third, cache)
            other.close()
        assert pool.stats().bytes_in_use == 0
        assert (tmp_path / "x").read_bytes() == raw
        with pytest.raises(kvz.ClosedError):
            mapped.attend(query)


@pytest.mark.usefixtures("native_core")
def test_a_mapped_increment_is_the_same_cache(tmp_path: Path) -> None:
    with filled("native", tokens=2000, max_tokens=4000) as cache:
        cache.save(tmp_path / "x")
        for seed in range(3):
            cache.append(*stream(cache.config, 100, seed=seed))
            cache.save(tmp_path / "x", incremental=True)
        with kvz.TwoTierCache.load(tmp_path / "x", mmap=True) as mapped:
            assert mapped.digest() == cache.digest()
            mapped.append(*stream(cache.config, 100, seed=5))
            cache.append(*stream(cache.config, 100, seed=5))
            mapped.save(tmp_path / "x", incremental=True)
            assert mapped.digest() == cache.digest()
            with kvz.TwoTierCache.load(tmp_path / "x", mmap=True) as again:
                mapped.save(tmp_path / "x")  # over the file that both are mapped from
                same_cache(again, cache)
            mapped.check()
        assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.usefixtures("native_core")
def test_a_damaged_page_is_noticed_before_its_first_use(tmp_path: Path) -> None:
    """Every use is refused, and stays refused, and nothing that is made of it is saved."""
    path = tmp_path / "x"
    with filled("native", tokens=300) as cache:
        cache.save(path)
        corrupt(path, 4096 + 1000)
        config = cache.config
    uses: list[Any] = [
        lambda cache: cache.attend(np.ones((2, 32), np.float32)),
        lambda cache: cache.get_all_kv(),
        lambda cache: cache.append(*stream(config, 1)),
        lambda cache: cache.digest(),
        lambda cache: cache.save(tmp_path / "y"),
        lambda cache: cache.fork().attend(np.ones((2, 32), np.float32)),
    ]
    for use in uses:
        with kvz.TwoTierCache.load(path, mmap=True) as mapped:
            for _ in range(2):
                with pytest.raises(kvz.CorruptSnapshotError, match="damaged"):
                    use(mapped)
            mapped.clear()
            mapped.check()
    assert not (tmp_path / "y").exists()
    corrupt(path, 100)
    with pytest.raises(kvz.SnapshotError):
        kvz.TwoTierCache.load(path, mmap=True)


@pytest.mark.usefixtures("native_core")
def test_many_threads_may_use_a_mapped_cache_first(tmp_path: Path) -> None:
    with filled("native", tokens=3000, max_tokens=4000) as cache:
        cache.save(tmp_path / "x")
        query = np.ones((2, 32), np.float32)
        expected = cache.attend(query)
        with (
            kvz.TwoTierCache.load(tmp_path / "x", mmap=True) as mapped,
            ThreadPoolExecutor(8) as threads,
        ):
            for got in threads.map(lambda _: mapped.attend(query), range(16)):
                same_bits(got, expected)
        corrupt(tmp_path / "x", 9000)
        with kvz.TwoTierCache.load(tmp_path / "x", mmap=True) as mapped:
            with ThreadPoolExecutor(8) as threads:
                tries = [threads.submit(mapped.attend, query) for _ in range(16)]
            for one in tries:
                assert isinstance(one.exception(), kvz.CorruptSnapshotError)


def test_files_cannot_be_mapped_into_webassembly(tmp_path: Path) -> None:
    pytest.importorskip("wasmtime")
    with filled("wasm") as cache:
        cache.save(tmp_path / "x")
        with pytest.raises(kvz.InvalidArgumentError, match=r"mmap: .*wasm"):
            kvz.TwoTierCache.load(tmp_path / "x", mmap=True, core="wasm")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.usefixtures("native_core")
def test_what_is_kept_behind_the_window_comes_back(kind: str, mmap: bool, tmp_path: Path) -> None:
    """Pins, and single tokens that an eviction spared, also where they share a page."""
    path = tmp_path / "x"
    with filled("native", kind, tokens=400) as cache:
        cache.pin(20, 31)
        cache.pin(600, 640)
        evicted = [p for p in range(70, 200) if p % 3]
        cache.evict(evicted)
        for seed in range(4):
            cache.save(path, incremental=True)
            with type(cache).load(path, mmap=mmap) as loaded:
                assert loaded.pinned == cache.pinned
                query = np.ones((2, 32), np.float32)
                same_bits(loaded.attend(query), cache.attend(query))
                assert loaded.digest() == cache.digest()
                more = stream(cache.config, 90, seed=seed)
                loaded.append(*more)
                cache.append(*more)
                assert loaded.digest() == cache.digest()
                loaded.check()
        config = cache.config
    with pytest.raises(kvz.SnapshotMismatchError, match="cannot be converted"):
        type(cache).load(path, config=replace(config, max_tokens=600), convert=True)
