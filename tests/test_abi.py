"""The border between Python and the core: one manifest, sized structs, statuses, no crash."""

from __future__ import annotations

import ctypes
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

import kvz
from kvz import _core, arrays, config, errors
from support import together

SIZED = ["PoolConfig", "PoolStats", "CacheConfig", "TokenLayout", "AttendOptions", "CacheStats"]


@pytest.fixture
def loaded(core: Any) -> _core.Core:
    """The core itself, with the functions of the ABI."""
    return _core.load(core)


class Calls:
    """One pool and one cache (1 head of 4 values, all f32), called without the Python package."""

    def __init__(self, core: _core.Core) -> None:
        self.core = core
        settings = core.new("PoolConfig")
        with core.frame() as frame:
            self.pool = core.create("pool_new", frame.ref(settings))
        status, self.cache = self.new_cache(self.settings())
        assert status == 0

    def settings(self, **changed: int) -> Any:
        fields = {"num_kv_heads": 1, "head_dim": 4, "max_tokens": 64, "tail_length": 8}
        fields |= {"migration_batch": 4, "tokens_per_block": 16}
        fields |= {"tail_format": 0, "key_format": 0, "value_format": 0}
        return self.core.new("CacheConfig", **{**fields, **changed})

    def new_cache(self, given: Any) -> tuple[int, int]:
        out = self.core.ctypes["ptr"](0x1234)
        with self.core.frame() as frame:
            status = self.core.cache_new(frame.ref(given), self.pool, frame.ref(out))
        return status, int(out.value or 0)

    def append(self, rows: Any, layout: Any = None, tokens: int | None = None) -> int:
        at, count = arrays.address_of(rows), len(rows) if tokens is None else tokens
        with self.core.frame() as frame:
            put = [frame.put(at, rows.nbytes) for _ in range(2)]
            lent = frame.ref(layout) if layout else 0
            status: int = self.core.cache_append(self.cache, *put, count, lent)
        return status

    def attend(self, options: Any = None, tokens: int = 1, heads: int = 1) -> int:
        query, out = (np.ones((tokens, max(heads, 1), 4), np.float32) for _ in range(2))
        with self.core.frame() as frame:
            lent = frame.ref(options) if options else 0
            at = frame.put(arrays.address_of(query), query.nbytes)
            result = frame.out(arrays.address_of(out), out.nbytes)
            status: int = self.core.cache_attend(self.cache, at, tokens, heads, 0.5, lent, result)
        return status

    def get(self, first: int, tokens: int) -> int:
        out = np.empty((8, 4), np.float32)
        with self.core.frame() as frame:
            at = frame.out(arrays.address_of(out), out.nbytes)
            status: int = self.core.cache_get(self.cache, first, tokens, at, at)
        return status

    def message(self) -> str:
        return self.core.string(self.core.last_error())

    def close(self) -> None:
        self.core.cache_free(self.cache)
        self.core.pool_free(self.pool)


@pytest.fixture
def calls(loaded: _core.Core) -> Any:
    made = Calls(loaded)
    yield made
    made.close()


def statuses(core: _core.Core) -> dict[str, int]:
    return core.enums["Status"]


# -- The manifest ----------------------------------------------------------------------------------


def test_every_status_has_an_exception_and_no_other(loaded: _core.Core) -> None:
    """The table in errors.py knows exactly the statuses of the core, by name."""
    assert set(errors.ERRORS) == set(statuses(loaded)) - {"ok"}
    assert statuses(loaded)["ok"] == 0


def test_every_error_is_documented_and_derives_from_a_builtin() -> None:
    """Each exception is a KvzError and one that a caller would expect; all are public."""
    found = [x for _, x in inspect.getmembers(errors, inspect.isclass) if x is not kvz.KvzError]
    assert set(errors.ERRORS.values()) <= set(found)
    for error in found:
        assert issubclass(error, kvz.KvzError)
        assert issubclass(error, (ValueError, TypeError, MemoryError, OSError))
        assert getattr(kvz, error.__name__) is error
        assert error.__doc__


def test_every_precision_is_a_format_of_the_core(loaded: _core.Core) -> None:
    """Names are what both sides agree on."""
    assert {p.value for p in kvz.Precision} == set(loaded.enums["Format"])
    assert set(arrays.BITS) == set(loaded.enums["Dtype"])
    assert set(loaded.enums["CacheKind"]) == {"two_tier", "pooled"}
    assert {kind._kind for kind in (kvz.TwoTierCache, kvz.PooledCache)} == {"two_tier", "pooled"}
    for name in loaded.enums["Rotation"]:
        assert config.CacheConfig(rotation=name).rotation == name


def test_the_defaults_are_those_of_the_core(loaded: _core.Core) -> None:
    """A struct that holds nothing but its size makes the cache of `CacheConfig()`."""
    made = Calls(loaded)
    made.core.cache_free(made.cache)
    given = loaded.structs["CacheConfig"](size_bytes=4)
    status, made.cache = made.new_cache(given)
    assert status == 0
    assert made.append(np.ones((1, 8, 128), np.float32)) == 0
    with kvz.TwoTierCache(core=loaded.name) as cache:
        cache.append(np.ones((1, 8, 128), np.float32), np.ones((1, 8, 128), np.float32))
        out = ctypes.c_uint64()
        with loaded.frame() as frame:
            loaded.cache_digest(made.cache, frame.ref(out))
        assert f"{out.value:016x}" == cache.digest()
    made.close()


def test_every_function_of_the_manifest_can_be_called(loaded: _core.Core) -> None:
    """Both loaders make all of them, and the manifest is what the function returns."""
    for name in loaded.abi["functions"]:
        assert callable(getattr(loaded, name))
    assert json.loads(loaded.string(loaded.manifest())) == loaded.abi


def test_both_cores_have_one_abi() -> None:
    """Same functions, statuses and fields; only pointers, and sizes of memory, differ in width."""
    pytest.importorskip("wasmtime")
    native, wasm = _core.load("native"), _core.load("wasm")
    functions = [
        {
            name: kinds
            for name, kinds in core.abi["functions"].items()
            if name not in ("alloc", "free")
        }
        for core in (native, wasm)
    ]
    assert functions[0] == functions[1]
    assert native.enums == wasm.enums
    assert native.abi["pointer_bits"] == 8 * ctypes.sizeof(ctypes.c_void_p)
    assert wasm.abi["pointer_bits"] == 32
    for name, spec in native.abi["types"].items():
        assert list(spec.get("fields", spec)) == list(
            wasm.abi["types"][name].get("fields", wasm.abi["types"][name])
        )


def test_another_layout_is_refused(loaded: _core.Core) -> None:
    """A struct that this platform would lay out differently, and another version, stop the load."""
    wrong = json.loads(json.dumps(loaded.abi))
    wrong["types"]["PoolConfig"]["fields"]["max_bytes"][1] += 4
    with pytest.raises(kvz.AbiMismatchError, match="PoolConfig"):
        _core.Core(loaded.path, wrong, loaded.ctypes["ptr"])
    wrong = {**loaded.abi, "version": 99}
    with pytest.raises(kvz.AbiMismatchError, match="version 99"):
        _core.Core(loaded.path, wrong, loaded.ctypes["ptr"])


# -- Sized structs ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SIZED)
def test_structs_begin_with_their_size(loaded: _core.Core, name: str) -> None:
    """And `new` fills it in."""
    assert loaded.abi["types"][name]["fields"]["size_bytes"] == ["u32", 0]
    assert loaded.new(name).size_bytes == ctypes.sizeof(loaded.structs[name])
    assert loaded.abi["types"][name]["size"] == ctypes.sizeof(loaded.structs[name])


def test_an_older_config_gets_defaults_for_the_rest(calls: Calls) -> None:
    """What is beyond size_bytes is not read, even where it is nonsense."""
    given = calls.settings(migration_batch=2, sink_tokens=1 << 60, tokens_per_block=0, rotation=77)
    given.size_bytes = calls.core.structs["CacheConfig"].sink_tokens.offset
    status, cache = calls.new_cache(given)
    assert (status, cache != 0) == (0, True)
    calls.core.cache_free(cache)


@pytest.mark.parametrize("size", [0, 1, 3])
def test_a_config_without_a_size_is_refused(calls: Calls, size: int) -> None:
    """It cannot even hold its own size; the out-pointer is null."""
    given = calls.settings()
    given.size_bytes = size
    assert calls.new_cache(given) == (statuses(calls.core)["abi_mismatch"], 0)


@pytest.mark.parametrize("size", [1, 4, 1 << 31])
def test_a_newer_config_is_refused(calls: Calls, size: int) -> None:
    """It may ask for what this library does not know."""
    given = calls.settings()
    given.size_bytes += size
    assert calls.new_cache(given) == (statuses(calls.core)["abi_mismatch"], 0)
    assert calls.message()
    with pytest.raises(kvz.AbiMismatchError):
        calls.core.check(statuses(calls.core)["abi_mismatch"])


def test_newer_options_and_layouts_are_refused(calls: Calls) -> None:
    """Wherever a struct goes in."""
    mismatch = statuses(calls.core)["abi_mismatch"]
    layout = calls.core.new("TokenLayout", key_token_stride=4, value_token_stride=4)
    options = calls.core.new("AttendOptions", causal=1)
    layout.size_bytes += 8
    options.size_bytes += 8
    assert calls.append(np.ones((1, 4), np.float32), layout) == mismatch
    assert calls.append(np.ones((1, 4), np.float32)) == 0
    assert calls.attend(options) == mismatch


@pytest.mark.parametrize("name", ["CacheStats", "PoolStats"])
@pytest.mark.parametrize("change", [-8, 0, 8])
def test_stats_of_another_length(calls: Calls, name: str, change: int) -> None:
    """A shorter struct is filled as far as it goes; a longer one learns how far that was."""
    size = ctypes.sizeof(calls.core.structs[name])
    buffer = np.full(size + 16, 0xAB, np.uint8)
    buffer[:4] = np.frombuffer(np.uint32(size + change).tobytes(), np.uint8)
    function = calls.core.cache_stats if name == "CacheStats" else calls.core.pool_stats
    handle = calls.cache if name == "CacheStats" else calls.pool
    with calls.core.frame() as frame:
        value = (ctypes.c_ubyte * buffer.size).from_buffer(buffer)
        status = function(handle, frame.ref(value))
    assert status == 0
    assert buffer[:4].view(np.uint32)[0] == size + min(change, 0)
    assert (buffer[size + min(change, 0) :] == 0xAB).all()


# -- Bad calls -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    [
        {"kind": 2},
        {"num_kv_heads": 0},
        {"num_kv_heads": (1 << 32) - 1},
        {"head_dim": 0},
        {"head_dim": (1 << 32) - 1},
        {"value_dim": (1 << 32) - 1},
        {"tail_format": 3},
        {"tail_format": 99},
        {"key_format": 10},
        {"value_format": (1 << 32) - 1},
        {"max_tokens": 0},
        {"max_tokens": 11},
        {"max_tokens": (1 << 64) - 1},
        {"tail_length": (1 << 64) - 1},
        {"migration_batch": 0},
        {"migration_batch": (1 << 64) - 1},
        {"sink_tokens": (1 << 64) - 1},
        {"rotation": 3},
        {"kind": 1, "tokens_per_block": 0},
        {"kind": 1, "tokens_per_block": (1 << 64) - 1},
        {"kind": 1, "sink_tokens": 64},
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(calls: Calls, changed: dict[str, int]) -> None:
    """As a status with a message, and the out-pointer is null."""
    status, cache = calls.new_cache(calls.settings(**changed))
    assert (status, cache) == (statuses(calls.core)["invalid_argument"], 0)
    named = [name for name in changed if name != "kind"] or ["kind"]
    assert named[-1] in calls.message()


BAD_CALLS: dict[str, Callable[[Calls], int]] = {
    "get beyond the end": lambda c: c.get(0, 5),
    "get from beyond": lambda c: c.get(5, 1),
    "get that wraps": lambda c: c.get((1 << 64) - 1, 2),
    "more queries than tokens": lambda c: c.attend(tokens=5),
    "no heads": lambda c: c.attend(heads=0),
    "an unknown mask": lambda c: c.attend(
        c.core.new("AttendOptions", causal=1, mask_kind=9, mask=64, live_tokens=4)
    ),
    "a mask for other tokens": lambda c: c.attend(
        c.core.new("AttendOptions", causal=1, mask_kind=1, mask=64, live_tokens=3)
    ),
    "mass for other tokens": lambda c: c.attend(
        c.core.new("AttendOptions", causal=1, mass=64, live_tokens=5)
    ),
    "an unknown key dtype": lambda c: c.append(
        np.ones((1, 4), np.float32), c.core.new("TokenLayout", key_dtype=4)
    ),
    "an unknown value dtype": lambda c: c.append(
        np.ones((1, 4), np.float32), c.core.new("TokenLayout", value_dtype=1 << 31)
    ),
    "positions that wrap": lambda c: c.append(np.ones((1, 4), np.float32), tokens=(1 << 64) - 1),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_is_a_status(calls: Calls, name: str) -> None:
    """Nothing crashes, and the cache is as before."""
    assert calls.append(np.ones((4, 4), np.float32)) == 0
    assert BAD_CALLS[name](calls) == statuses(calls.core)["invalid_argument"]
    assert calls.message()
    assert calls.core.cache_check(calls.cache) == 0
    assert calls.get(0, 4) == 0


@pytest.mark.parametrize("offset", [None, 0, 1, 64, 4096, 1 << 20])
def test_a_foreign_buffer_is_refused(calls: Calls, offset: int | None) -> None:
    """The pool takes back what it handed out, once, and nothing else."""
    core = calls.core
    pointer, size = core.ctypes["ptr"](), ctypes.c_uint64()
    with core.frame() as frame:
        status = core.pool_acquire(calls.pool, 2000, frame.ref(pointer), frame.ref(size))
    assert (status, size.value) == (0, 4096)
    foreign = 0 if offset is None else pointer.value + offset
    if offset == 0:
        assert core.pool_release(calls.pool, pointer.value) == 0
    assert core.pool_release(calls.pool, foreign) == statuses(core)["foreign_buffer"]
    with pytest.raises(kvz.ForeignBufferError):
        core.check(statuses(core)["foreign_buffer"])


def test_null_is_freed_without_harm(loaded: _core.Core) -> None:
    """As free(NULL) is."""
    loaded.cache_free(0)
    loaded.pool_free(0)
    loaded.free(0, 100)


def test_messages_belong_to_their_thread() -> None:
    """Each thread reads what its own call said, however many fail at once."""
    core = _core.load("native")

    def fail(field: str) -> list[str]:
        made, wrong = Calls(core), []
        given = made.settings(**{field: 0})
        for _ in range(500):
            status, _ = made.new_cache(given)
            if status == 0 or field not in made.message():
                wrong.append(made.message())
        made.close()
        return wrong

    fields = ["num_kv_heads", "head_dim", "max_tokens", "migration_batch"]
    assert together(*(partial(fail, field) for field in fields)) == [[]] * 4


# -- Loading ---------------------------------------------------------------------------------------


def run(code: str, **environment: str) -> str:
    """Run Python in a process of its own; its last line of output or of its error."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    return (done.stdout or done.stderr).strip().splitlines()[-1]


def test_importing_loads_nothing() -> None:
    """Neither wasmtime nor a library, until the first cache."""
    loaded = "print('wasmtime' in sys.modules, sys.modules['kvz._core']._loaded)"
    code = f"import sys, kvz; kvz.TwoTierCache; {loaded}"
    assert run(code, KVZ_CORE="wasm") == "False {}"


def test_the_environment_chooses_the_core() -> None:
    """KVZ_CORE counts where no core is named."""
    pytest.importorskip("wasmtime")
    code = "import kvz; print(kvz.info().core, kvz.info('native').core, kvz.BufferPool().core)"
    assert run(code, KVZ_CORE="wasm") == "wasm native wasm"
    assert run(code, KVZ_CORE="") == "native native native"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("KVZ_CORE", "gpu", "KVZ_CORE: expected 'native' or 'wasm', got 'gpu'"),
        ("KVZ_ISA", "z80", "got 'z80'"),
        ("KVZ_ISA", "z80", "KVZ_ISA: expected one of "),
        ("KVZ_NUM_THREADS", "0", "KVZ_NUM_THREADS: expected 1 or more, got '0'"),
        ("KVZ_NUM_THREADS", "many", "KVZ_NUM_THREADS: expected 1 or more, got 'many'"),
        ("KVZ_NUM_THREADS", "²", "KVZ_NUM_THREADS: expected 1 or more, got"),
    ],
)
def test_a_bad_environment_is_an_error(name: str, value: str, message: str) -> None:
    """It is never ignored: what was asked for would silently not be."""
    said = run("import kvz; kvz.info()", **{"KVZ_CORE": "native", name: value})
    assert said.startswith("kvz.errors.InvalidArgumentError: ")
    assert message in said


def test_the_environment_chooses_isa_and_threads() -> None:
    """Every ISA that the library says it could run can be chosen."""
    code = "import kvz; i = kvz.info(); print(i.isa, i.num_threads)"
    for isa in kvz.info("native").available_isas:
        assert run(code, KVZ_CORE="native", KVZ_ISA=isa, KVZ_NUM_THREADS="1") == f"{isa} 1"


def test_threads_can_be_counted(core: Any) -> None:
    """What is set is what is used, one at least; nonsense is refused."""
    before = kvz.get_num_threads(core)
    kvz.set_num_threads(1, core)
    assert kvz.get_num_threads(core) == kvz.info(core).num_threads == 1
    for bad in (0, -1, 1 << 31, 1 << 40):
        with pytest.raises(ValueError, match=r"threads|^n: expected"):
            kvz.set_num_threads(bad, core)
    with pytest.raises(TypeError):
        kvz.set_num_threads(1.5, core)  # type: ignore[arg-type]
    kvz.set_num_threads(before, core)


def test_a_missing_library_says_what_to_do(monkeypatch: Any, tmp_path: Any) -> None:
    """It names the folder, and is an OSError."""
    monkeypatch.setattr(_core, "NATIVE_FOLDER", tmp_path)
    with pytest.raises(OSError, match="pip install") as caught:
        _core._load_now("native")
    assert str(tmp_path) in str(caught.value)
    for name in ("libkvz.so", "kvz.dll"):
        (tmp_path / name).write_bytes(b"not a library")
    with pytest.raises(kvz.CoreError, match=r"found .*libkvz\.so, .*kvz\.dll"):
        _core._load_now("native")
    (tmp_path / "kvz.dll").unlink()
    with pytest.raises(kvz.CoreError, match="cannot be loaded"):
        _core._load_now("native")


def test_a_broken_module_says_so(monkeypatch: Any, tmp_path: Any) -> None:
    """The same for WebAssembly."""
    pytest.importorskip("wasmtime")
    monkeypatch.setattr(_core, "NATIVE_FOLDER", tmp_path)
    (tmp_path / "kvz.wasm").write_bytes(b"not a module")
    with pytest.raises(kvz.CoreError, match="cannot be loaded"):
        _core._load_now("wasm")
    (tmp_path / "kvz.wasm").write_bytes(b"\0asm\1\0\0\0")  # a module without anything
    with pytest.raises(kvz.CoreError, match="cannot be loaded"):
        _core._load_now("wasm")


def test_wasm_works_without_the_fast_path(monkeypatch: Any) -> None:
    """Where wasmtime lacks the call that the loader prefers, its public one gives the same."""
    pytest.importorskip("wasmtime")
    from kvz import _wasm

    usual = kvz.TwoTierCache(num_kv_heads=1, head_dim=32, core="wasm")
    monkeypatch.setattr(_wasm, "FAST_CALL", None)
    slow = _core._load_now("wasm")
    monkeypatch.setitem(_core._loaded, "wasm", slow)
    pool = kvz.BufferPool(core="wasm")
    cache = kvz.TwoTierCache(num_kv_heads=1, head_dim=32, pool=pool)
    keys = np.linspace(-1, 1, 500 * 32, dtype=np.float32).reshape(500, 1, 32)
    for each in (usual, cache):
        each.append(keys, keys)
    assert cache.digest() == usual.digest()
    assert np.array_equal(cache.attend(keys[0]), usual.attend(keys[0]))
    with pytest.raises(ValueError, match="finite"):
        cache.append(keys * np.nan, keys)
    cache.close()
    pool.close()


def test_a_trap_is_an_error() -> None:
    """A call that reads outside the memory of the module stops that call and nothing else."""
    pytest.importorskip("wasmtime")
    core = _core._load_now("wasm")  # one of its own: what a trap leaves behind is not used again
    with pytest.raises(kvz.CoreError, match="the wasm core stopped"):
        core.pool_new((1 << 32) - 64, (1 << 32) - 64)
