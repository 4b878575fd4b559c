"""Build hook: compiles the Zig core and puts it into the wheel as `kvz/_native/`.

The library is loaded by ctypes and knows nothing of CPython, so one wheel per platform
(`py3-none-<platform>`) serves every Python; pyproject.toml has the table of targets. Without
KVZ_TARGET, this machine's row is built; with it, the named row is cross-compiled.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from packaging.tags import platform_tags


class CoreBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    """Called by hatchling before it packs a wheel or makes an editable install."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        targets: dict[str, dict[str, str]] = self.config["targets"]
        name = os.environ.get("KVZ_TARGET") or host_target(targets)
        if name not in targets:
            raise SystemExit(f"KVZ_TARGET={name}: choose one of {', '.join(targets)}")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{targets[name]['platform']}"
        built = compile_core(Path(self.root), name, targets[name]["zig"])
        if version == "editable":
            install_in_tree(built, Path(self.root, "py", "kvz", "_native"))
        else:
            build_data["force_include"][str(built)] = "kvz/_native"


def host_target(targets: dict[str, dict[str, str]]) -> str:
    """The first target whose wheel this Python would install."""
    accepted = set(platform_tags())
    for name, target in targets.items():
        if accepted.intersection(target["platform"].split(".")):
            return name
    raise SystemExit(f"kvz has no wheel for this machine; KVZ_TARGET can be {', '.join(targets)}")


def compile_core(root: Path, name: str, zig_target: str) -> Path:
    """Compile the library and kvz.wasm; return the folder that holds these two files alone."""
    prefix = root / "build" / name
    built = prefix / "kvz"
    shutil.rmtree(built, ignore_errors=True)
    command = [sys.executable, "-m", "ziglang", "build", "--prefix", str(prefix)]
    # Both given always: without them Zig builds for this very machine's CPU and C library.
    command += [f"-Dtarget={zig_target}", "-Dcpu=baseline", "-Doptimize=fast"]
    subprocess.run(command, cwd=root, check=True)
    return built


def install_in_tree(built: Path, target: Path) -> None:
    """Replace the library by rename: a running process may have the old file mapped."""
    target.mkdir(exist_ok=True)
    for source in built.iterdir():
        fresh = target / f"{source.name}.new"
        shutil.copyfile(source, fresh)
        fresh.replace(target / source.name)
