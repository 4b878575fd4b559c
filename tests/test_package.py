"""What is installed: a wheel with one library, one WebAssembly module, nothing left to build."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import kvz
from tools.check_binary import check_library, check_module, platform_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed() -> metadata.Distribution:
    try:
        return metadata.distribution("kvz")
    except metadata.PackageNotFoundError:
        pytest.skip("kvz is on the path but not installed")


@pytest.fixture(scope="module")
def wheel(installed: metadata.Distribution) -> metadata.Distribution:
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    if origin.get("dir_info", {}).get("editable"):
        pytest.skip("an editable install has neither tag nor files")
    return installed


@pytest.fixture(scope="module")
def tags(wheel: metadata.Distribution) -> list[str]:
    return re.findall(r"^Tag: (\S+)", wheel.read_text("WHEEL") or "", re.MULTILINE)


@pytest.fixture(scope="module")
def native() -> dict[str, Path]:
    """The files of kvz/_native, which is where both wheels and editable installs have them."""
    return {path.name: path for path in Path(kvz.__file__).with_name("_native").iterdir()}


def run_isolated(code: str) -> str:
    """Run Python where no compiler, no other program and no user setting can be found."""
    env = {key: value for key, value in os.environ.items() if key in {"SYSTEMROOT", "TEMP", "TMP"}}
    command = [sys.executable, "-I", "-W", "error", "-c", code]
    return subprocess.check_output(command, env=env, text=True)


def test_the_wheel_is_for_one_platform_and_every_python(
    wheel: metadata.Distribution, tags: list[str]
) -> None:
    assert "Root-Is-Purelib: false" in (wheel.read_text("WHEEL") or "")
    assert tags
    assert all(tag.startswith("py3-none-") and not tag.endswith("-any") for tag in tags)


def test_the_wheel_holds_the_package_and_nothing_else(wheel: metadata.Distribution) -> None:
    files = [path.as_posix() for path in wheel.files or [] if path.suffix != ".pyc"]
    inside = [name for name in files if name.startswith("kvz/")]
    outside = [name for name in files if not name.startswith(("kvz/", "kvz-"))]
    assert "kvz/py.typed" in inside
    assert not [name for name in inside if name.endswith((".zig", ".zon", ".new"))]
    assert len([name for name in inside if name.startswith("kvz/_native/")]) == 2
    assert all(re.search(r"(bin|Scripts)/kvz(\.exe)?$", name) for name in outside)


def test_the_version_is_that_of_the_core(installed: metadata.Distribution) -> None:
    declared = re.search(r'\.version = "([^"]+)"', (ROOT / "build.zig.zon").read_text("utf-8"))
    assert declared
    assert installed.version == declared.group(1)
    assert run_isolated("import kvz; print(kvz.__version__)").strip() == installed.version


def test_one_library_and_one_module_are_installed(native: dict[str, Path]) -> None:
    assert set(native) - {"kvz.wasm"} <= {"libkvz.so", "libkvz.dylib", "kvz.dll"}
    assert len(native) == 2


def test_the_library_fits_its_tag(tags: list[str], native: dict[str, Path]) -> None:
    """Exports, needed libraries, kernels of every CPU level, nothing of the builder's own CPU."""
    (library,) = (path for name, path in native.items() if name != "kvz.wasm")
    assert check_library(library.read_bytes(), platform_of(" ".join(tags))) == []


def test_the_module_exports_the_abi_and_imports_nothing(native: dict[str, Path]) -> None:
    assert check_module(native["kvz.wasm"].read_bytes()) == []


def test_importing_needs_numpy_alone(installed: metadata.Distribution) -> None:
    loaded = run_isolated(
        "import sys; from kvz import *\n"
        "print(*{name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names))"
    )
    optional = {"wasmtime", "rich", "gguf", "tokenizers", "ziglang", "hatchling"}
    assert not optional & set(loaded.split())


def test_a_cache_runs_without_a_compiler(installed: metadata.Distribution) -> None:
    """Nothing is compiled or started: no process is spawned on the way to the first result."""
    code = """if True:
        import sys
        started = []
        watched = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
        sys.addaudithook(lambda event, _: started.append(event) if event in watched else None)
        import kvz, numpy
        cache = kvz.TwoTierCache(num_kv_heads=1, head_dim=32)
        cache.append(numpy.ones((1, 1, 32), "f4"), numpy.ones((1, 1, 32), "f4"))
        print(cache.attend(numpy.ones((1, 32), "f4")).sum(), started)
    """
    assert run_isolated(code).split() == ["32.0", "[]"]


def test_one_version_of_zig_is_named(installed: metadata.Distribution) -> None:
    """The pins of the build, of the developer's tools and of the core agree."""
    pins = re.findall(r"ziglang==([\d.]+)", (ROOT / "pyproject.toml").read_text("utf-8"))
    zon = (ROOT / "build.zig.zon").read_text("utf-8")
    minimum = re.search(r'\.minimum_zig_version = "([^"]+)"', zon)
    assert minimum
    assert pins
    assert set(pins) == {minimum.group(1)}


def test_names_are_loaded_when_they_are_asked_for() -> None:
    """Importing kvz imports nothing; a function keeps its name beside the module it lives in."""
    code = (
        "import sys, kvz; assert 'numpy' not in sys.modules; import kvz.info, kvz.quantize; "
        "from kvz import *; print(callable(kvz.info), callable(kvz.quantize), TwoTierCache, "
        "set(kvz.__all__) <= set(dir(kvz)))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout == "True True <class 'kvz.cache.TwoTierCache'> True\n"
    with pytest.raises(AttributeError, match="'kvz' has no attribute 'Nothing'"):
        getattr(kvz, "Nothing")  # noqa: B009


def test_every_shadowed_module_is_known() -> None:
    """A public function with the name of its module is listed, so that it is not overwritten."""
    modules = {path.stem for path in Path(kvz.__path__[0]).glob("*.py")}
    assert modules & set(kvz.__all__) == kvz._SHADOWED
