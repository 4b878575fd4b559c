"""What goes in: arrays of any library, dtype and layout; what does not, and how that is said."""

from __future__ import annotations

import array
import math
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import kvz
from kvz import arrays
from support import Floats, make, queries, rows, same_bits, unchanged

H, D, DV = 2, 32, 16
FIELDS = {"num_kv_heads": H, "head_dim": D, "value_dim": DV, "tail_precision": "f32"}


def kv(tokens: int = 5) -> tuple[Floats, Floats]:
    return rows(tokens, H, D, 1), rows(tokens, H, DV, 2)


def held(core: Any, keys: Any, values: Any) -> tuple[Floats, Floats]:
    """What a float32 cache holds after one append."""
    cache = make(core, **FIELDS)
    cache.append(keys, values)
    result: tuple[Floats, Floats] = cache.get_all_kv()
    return result


def bf16(x: Floats) -> Any:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    return x.astype(ml_dtypes.bfloat16)


def torch_tensor(dtype: str) -> Callable[[Floats], Any]:
    def convert(x: Floats) -> Any:
        torch = pytest.importorskip("torch")
        return torch.from_numpy(x.copy()).to(getattr(torch, dtype))

    return convert


def torch_parameter(x: Floats) -> Any:
    """Tensors that require a gradient refuse DLPack and numpy."""
    return torch_tensor("float32")(x).requires_grad_()


def jax_array(dtype: str) -> Callable[[Floats], Any]:
    def convert(x: Floats) -> Any:
        jnp = pytest.importorskip("jax.numpy")
        return jnp.asarray(x).astype(dtype)

    return convert


def mlx_array(dtype: str) -> Callable[[Floats], Any]:
    def convert(x: Floats) -> Any:
        mx = pytest.importorskip("mlx.core")
        return mx.array(x).astype(getattr(mx, dtype))

    return convert


def read_only(x: Floats) -> Any:
    x = x.copy()
    x.flags.writeable = False
    return x


def misaligned(x: Floats) -> Any:
    """Float32 at an odd address."""
    memory = np.zeros(x.nbytes + 1, np.uint8)
    view = memory[1:].view(np.float32).reshape(x.shape)
    view[...] = x
    return view


def packed_record(x: Floats) -> Any:
    """A field of records of 5 bytes: strides that are no multiple of the item."""
    records = np.zeros(x.shape, np.dtype([("x", "<f4"), ("pad", "u1")]))
    records["x"] = x
    return records["x"]


class OnlyArray:
    """Knows `__array__` alone."""

    def __init__(self, x: Floats) -> None:
        self.x = x

    def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
        return self.x if dtype is None else self.x.astype(dtype)


KINDS: dict[str, Callable[[Floats], Any]] = {
    "numpy f32": lambda x: x,
    "numpy f16": lambda x: x.astype(np.float16),
    "numpy f64": lambda x: x.astype(np.float64),
    "big endian": lambda x: x.astype(">f4"),
    "read-only": read_only,
    "misaligned": misaligned,
    "field of records": packed_record,
    "subclass": lambda x: x.view(type("Sub", (np.ndarray,), {})),
    "memoryview": memoryview,
    "lists": lambda x: x.tolist(),
    "__array__": OnlyArray,
    "bf16": bf16,
    "torch f32": torch_tensor("float32"),
    "torch f16": torch_tensor("float16"),
    "torch bf16": torch_tensor("bfloat16"),
    "torch f64": torch_tensor("float64"),
    "torch parameter": torch_parameter,
    "jax f32": jax_array("float32"),
    "jax bf16": jax_array("bfloat16"),
    "mlx f32": mlx_array("float32"),
    "mlx f16": mlx_array("float16"),
    "mlx bf16": mlx_array("bfloat16"),
}


def rounded(kind: str, x: Floats) -> Floats:
    """What the conversion to this kind leaves of x."""
    if "bf16" in kind:
        return np.asarray(bf16(x)).astype(np.float32)
    return x.astype(np.float16).astype(np.float32) if "f16" in kind else x


@pytest.mark.parametrize("kind", KINDS)
def test_any_array_goes_in(core: Any, kind: str) -> None:
    """Appended as they are, all kinds hold their own values, bit by bit."""
    keys, values = kv()
    got = held(core, KINDS[kind](keys), KINDS[kind](values))
    same_bits(got[0], rounded(kind, keys))
    same_bits(got[1], rounded(kind, values))


@pytest.mark.parametrize("kind", KINDS)
def test_any_array_is_a_query(core: Any, kind: str) -> None:
    """A query of any kind gives what its float32 gives."""
    cache = make(core, **FIELDS)
    cache.append(*kv(20))
    query = queries(cache.config, 3, per_kv_head=2)
    same_bits(cache.attend(KINDS[kind](query)), cache.attend(rounded(kind, query)))


@pytest.mark.parametrize("kind", ["torch bf16", "torch f32", "jax f32", "mlx bf16", "bf16"])
def test_heads_first_goes_in_as_a_view(core: Any, kind: str) -> None:
    """The (H, T, D) layout of other libraries is appended as a transposed view."""
    keys, values = kv()
    swapped = [KINDS[kind](np.ascontiguousarray(x.swapaxes(0, 1))) for x in (keys, values)]
    views = [x.swapaxes(0, 1) for x in swapped]
    got = held(core, *views)
    same_bits(got[0], rounded(kind, keys))
    same_bits(got[1], rounded(kind, values))


@pytest.mark.parametrize("kind", ["numpy f32", "torch bf16", "torch parameter", "bf16", "mlx bf16"])
def test_borrowing_copies_nothing(kind: str) -> None:
    """The address is that of the array itself, and strides are taken as they are."""
    keys = KINDS[kind](kv()[0])
    first, again = arrays.borrow(keys, "keys"), arrays.borrow(keys, "keys")
    assert first.address == again.address
    assert first.shape == (5, H, D)
    view = arrays.borrow(keys.swapaxes(0, 1), "keys")
    assert (view.shape, view.strides) == ((H, 5, D), (D, H * D, 1))
    if kind != "mlx bf16":  # which makes its views when they are looked at
        assert view.address == first.address
    assert view.with_dense_rows() is view


def test_a_strided_last_axis_is_copied_once() -> None:
    """Only then; the copy is dense."""
    wide = rows(5, H, 2 * D, 1)
    borrowed = arrays.borrow(wide[..., ::2], "keys").with_dense_rows()
    assert borrowed.strides == (H * D, D, 1)
    same_bits(borrowed.bits(), wide[..., ::2])


def test_repeated_and_reversed_rows_are_strides_too(core: Any) -> None:
    """Stride zero repeats a row, a negative one reads backwards."""
    keys, values = kv(1)
    many = np.broadcast_to(keys, (7, H, D))
    got = held(core, many, np.broadcast_to(values, (7, H, DV)))
    same_bits(got[0], np.ascontiguousarray(many))
    keys, values = kv(7)
    got = held(core, keys[::-1], values[::-1])
    same_bits(got[0], np.ascontiguousarray(keys[::-1]))
    same_bits(got[1], np.ascontiguousarray(values[::-1]))


REFUSED: dict[str, Callable[[Floats], Any]] = {
    "int64": lambda x: x.astype(np.int64),
    "int8": lambda x: x.astype(np.int8),
    "bool": lambda x: x > 0,
    "complex64": lambda x: x.astype(np.complex64),
    "object": lambda x: x.astype(object),
    "str": lambda x: x.astype(str),
    "datetime64": lambda x: np.zeros(x.shape, "datetime64[s]"),
    "records": lambda x: np.zeros(x.shape, [("x", "f4")]),
    "longdouble": lambda x: x.astype(np.longdouble),
    "float8": lambda x: x.astype(pytest.importorskip("ml_dtypes").float8_e4m3fn),
    "lists of ints": lambda x: x.astype(int).tolist(),
    "ragged lists": lambda x: [[1.0], [1.0, 2.0]],
    "text": lambda x: "keys",
    "None": lambda x: None,
    "dict": lambda x: {},
    "torch int": torch_tensor("int32"),
    "torch bool": torch_tensor("bool"),
    "torch sparse": lambda x: torch_tensor("float32")(x).to_sparse(),
    "torch meta": lambda x: torch_tensor("float32")(x).to("meta"),
    "jax int": jax_array("int32"),
    "mlx int": mlx_array("int32"),
    "array of ints": lambda x: array.array("i", [1, 2, 3]),
}
if np.dtype(np.longdouble) == np.dtype(np.float64):  # Windows
    del REFUSED["longdouble"]


@pytest.mark.parametrize("kind", REFUSED)
@pytest.mark.parametrize("which", [0, 1, 2], ids=["keys", "values", "query"])
def test_what_is_no_array_of_floats_is_refused(core: Any, kind: str, which: int) -> None:
    """With a TypeError that names the argument and says what was expected."""
    cache = make(core, **FIELDS)
    good = kv()
    cache.append(*good)
    bad = REFUSED[kind]([*good, queries(cache.config)][which])
    name = ("keys", "values", "query")[which]
    call = cache.attend if which == 2 else cache.append
    given = [bad] if which == 2 else [bad if which == i else good[i] for i in range(2)]
    with unchanged(cache), pytest.raises(TypeError, match=rf"^{name}: expected") as caught:
        call(*given)
    assert isinstance(caught.value, kvz.KvzError)


def test_a_foreign_error_is_explained() -> None:
    """Whatever an array does when it is looked at, the argument is named."""

    class Broken:
        def __array__(self, dtype: Any = None, copy: Any = None) -> Any:
            raise RuntimeError("no data here")

        def __dlpack__(self) -> Any:
            raise BufferError("not exportable")

    with pytest.raises(TypeError, match=r"^x: expected an array .* got Broken \(no data here\)"):
        arrays.borrow(Broken(), "x")


def test_other_memory_is_refused() -> None:
    """An array on another device says which, instead of being read."""

    class Elsewhere:
        def __init__(self) -> None:
            self.host = np.zeros(4, np.float32)

        def __dlpack__(self) -> Any:
            capsule = self.host.__dlpack__()
            tensor = arrays._DLTensor.from_address(arrays._capsule_pointer(capsule, b"dltensor"))
            tensor.device_type = 2
            return capsule

    with pytest.raises(TypeError, match=r"^x: expected host memory, got DLPack device type 2"):
        arrays.borrow(Elsewhere(), "x")


@pytest.mark.parametrize("value", [True, 1.0, "1", None, np.ones(2), [1]])
def test_counts_are_integers(core: Any, value: Any) -> None:
    """Not bools, floats, text, or arrays."""
    cache = make(core)
    with pytest.raises(TypeError, match=r"^n: expected an integer"):
        cache.trim(value)


@pytest.mark.parametrize("value", [-1, 1 << 63, -(1 << 70), np.uint64(1 << 63)])
def test_counts_have_a_range(core: Any, value: int) -> None:
    """Negative ones and those beyond 63 bits are refused."""
    cache = make(core)
    with pytest.raises(ValueError, match=r"^n: expected (0 or more|less than 2\*\*63), got"):
        cache.trim(value)
    assert cache.trim(np.int16(3)) == 0


@pytest.mark.parametrize("bits", [0x0000, 0x8000, 0x0001, 0x7F7F, 0x3F80, 0xC2F7])
def test_bfloat16_is_the_upper_half_of_float32(core: Any, bits: int) -> None:
    """Every bit of a bfloat16 arrives, subnormals and the sign of zero included."""
    ml_dtypes = pytest.importorskip("ml_dtypes")
    one = np.full((1, H, D), bits, np.uint16).view(ml_dtypes.bfloat16)
    cache = make(core, **{**FIELDS, "value_dim": D, "store_precision": "f32"})
    cache.append(one, one)
    expected = np.full((1, H, D), bits << 16, np.uint32).view(np.float32)
    same_bits(cache.get_all_kv()[0], expected)
    same_bits(arrays.as_float32(one, "x"), expected)


def torch_out(shape: tuple[int, ...]) -> Any:
    return pytest.importorskip("torch").zeros(shape)


def mlx_out(shape: tuple[int, ...]) -> Any:
    return memoryview(pytest.importorskip("mlx.core").zeros(shape))


#: What `attend` may write to, of a shape.
OUTPUTS: dict[str, Callable[[tuple[int, ...]], Any]] = {
    "numpy": lambda shape: np.zeros(shape, np.float32),
    "torch": torch_out,
    "mlx": mlx_out,
    "memoryview": lambda shape: memoryview(np.zeros(shape, np.float32)),
    "bytearray": lambda shape: bytearray(4 * math.prod(shape)),
    "array": lambda shape: array.array("f", [0.0] * math.prod(shape)),
    "mmap": lambda shape: mmap.mmap(-1, 4 * math.prod(shape)),
}


def written(out: Any, shape: tuple[int, ...]) -> Floats:
    flat = np.asarray(out) if hasattr(out, "shape") else np.frombuffer(out, np.float32)
    return flat.reshape(shape)


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.parametrize("n", [None, 3])
def test_any_writable_buffer_takes_the_result(core: Any, kind: str, n: int | None) -> None:
    """The numbers are those of a new array, in place, and what is returned is what was given."""
    cache = make(core, **FIELDS)
    cache.append(*kv(20))
    query = queries(cache.config, n, per_kv_head=2)
    shape = (*query.shape[:-1], DV)
    for options in ({}, {"window": 7}, {"return_lse": True}):
        expected = cache.attend(query, **options)
        out = OUTPUTS[kind](shape)
        got = cache.attend(query, out=out, **options)
        first = got[0] if isinstance(got, tuple) else got
        assert first is out
        if isinstance(got, tuple):
            same_bits(got[1], expected[1])
            expected = expected[0]
        same_bits(written(out, shape), expected)


REFUSED_OUTPUTS: dict[str, tuple[Callable[[tuple[int, ...]], Any], str]] = {
    "a list": (lambda shape: [0.0], "writable buffer of float32, got list"),
    "text": (lambda shape: "out", "got str"),
    "bytes": (lambda shape: bytes(4 * math.prod(shape)), "writable"),
    "read-only": (lambda shape: read_only(np.zeros(shape, np.float32)), "writable"),
    "too few bytes": (lambda shape: bytearray(7), "float32"),
    "doubles": (lambda shape: array.array("d", [0.0] * math.prod(shape)), "float64"),
    "another shape": (lambda shape: np.zeros(shape[::-1], np.float32), "shape"),
    "torch f16": (lambda shape: torch_out(shape).half(), "float16"),
    "torch strided": (lambda shape: torch_out(shape[::-1]).t(), "contiguous"),
    "torch with gradient": (lambda shape: torch_out(shape).requires_grad_(), "detach"),
    "torch meta": (lambda shape: torch_out(shape).to("meta"), "host memory"),
    "jax": (lambda shape: pytest.importorskip("jax.numpy").zeros(shape), "writable"),
}


@pytest.mark.parametrize("kind", REFUSED_OUTPUTS)
def test_what_cannot_take_the_result_is_refused(core: Any, kind: str) -> None:
    """Before anything is computed, with what was got and what was expected."""
    cache = make(core, **FIELDS)
    cache.append(*kv(20))
    query = queries(cache.config, None, per_kv_head=2)
    make_out, text = REFUSED_OUTPUTS[kind]
    out = make_out((query.shape[0], DV))
    with pytest.raises(kvz.KvzError, match=rf"^out: expected .*{text}"):
        cache.attend(query, out=out)


def test_a_query_may_lie_where_the_result_goes(core: Any) -> None:
    """Overlapping memory of torch is seen too."""
    torch = pytest.importorskip("torch")
    cache = make(core, **{**FIELDS, "value_dim": D})
    keys, _ = kv(20)
    cache.append(keys, keys)
    query = torch.from_numpy(queries(cache.config, None, per_kv_head=2).copy())
    expected = cache.attend(query.clone())
    assert cache.attend(query, out=query) is query
    same_bits(query.numpy(), expected)


@pytest.mark.parametrize("library", ["torch", "jax", "mlx"])
def test_options_take_arrays_of_any_library(core: Any, library: str) -> None:
    """Masks, slopes and sinks as well as queries."""
    to: Callable[[Any], Any] = {
        "torch": lambda x: pytest.importorskip("torch").from_numpy(x.copy()),
        "jax": lambda x: pytest.importorskip("jax.numpy").asarray(x),
        "mlx": lambda x: pytest.importorskip("mlx.core").array(x),
    }[library]
    cache = make(core, **FIELDS)
    cache.append(*kv(20))
    query = queries(cache.config, 3, per_kv_head=2)
    slopes, sinks = rows(1, 1, query.shape[1], 3)[0, 0], rows(1, 1, query.shape[1], 4)[0, 0]
    mask = rows(3, 1, 20, 5)[:, 0]
    for one in (mask, mask > 0):
        options = {"mask": one, "alibi_slopes": slopes, "sinks": sinks}
        foreign = {name: to(x) for name, x in options.items()}
        same_bits(cache.attend(to(query), **foreign), cache.attend(query, **options))
