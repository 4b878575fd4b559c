"""Look inside built wheels: `python -m tools.check_binary dist/*.whl`.

A cross-compiled library cannot be run where it was built, so it is read instead: is it the right
kind of file for its wheel, does it export the ABI and nothing else, will it load on the oldest
system that the wheel promises, and are the vector instructions in it that its kernels were
written for? Everything here returns a list of complaints, empty if all is well.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import capstone
import lief
import wasmtime


class Platform(NamedTuple):
    """What one kind of wheel must hold."""

    tag: str  # the wheel's platform tag, or its beginning
    kind: type  # of the parsed library
    machine: Any
    libraries: set[str]  # the system libraries it may need
    kernels: tuple[str, ...]


# Kernels are compiled for several CPU levels. Each level has an instruction that the others lack.
INSTRUCTIONS = {
    "x86_64_v2": ("pmaddubsw", "xmm"),
    "x86_64_v3": ("vpmaddubsw", "ymm"),
    "x86_64_v4": ("vpdpbusd", "zmm"),
    "neon": ("smull", ".8h"),
    "neon_dotprod": ("sdot", ".4s"),
}
X86 = ("x86_64_v2", "x86_64_v3", "x86_64_v4")
ARM = ("neon", "neon_dotprod")
ARM_APPLE = ("neon_dotprod",)  # what every Apple Silicon Mac has

GLIBC = {
    "libc.so.6",
    "libpthread.so.0",
    "libm.so.6",
    "ld-linux-x86-64.so.2",
    "ld-linux-aarch64.so.1",
}
MUSL = {"libc.so"}
MACOS = {"@rpath/libkvz.dylib", "/usr/lib/libSystem.B.dylib"}
WINDOWS = {"ntdll.dll", "kernel32.dll"}

ELF, MACHO, PE = lief.ELF, lief.MachO, lief.PE
PLATFORMS = [
    Platform("manylinux_2_17_x86_64", ELF.Binary, ELF.ARCH.X86_64, GLIBC, X86),
    Platform("manylinux_2_17_aarch64", ELF.Binary, ELF.ARCH.AARCH64, GLIBC, ARM),
    Platform("musllinux_1_2_x86_64", ELF.Binary, ELF.ARCH.X86_64, MUSL, X86),
    Platform("musllinux_1_2_aarch64", ELF.Binary, ELF.ARCH.AARCH64, MUSL, ARM),
    Platform("macosx_10_15_x86_64", MACHO.Binary, MACHO.Header.CPU_TYPE.X86_64, MACOS, X86),
    Platform("macosx_11_0_arm64", MACHO.Binary, MACHO.Header.CPU_TYPE.ARM64, MACOS, ARM_APPLE),
    Platform("win_amd64", PE.Binary, PE.Header.MACHINE_TYPES.AMD64, WINDOWS, X86),
    Platform("win_arm64", PE.Binary, PE.Header.MACHINE_TYPES.ARM64, WINDOWS, ARM),
]

# The linker's own, beside what the library exports on purpose.
LINKER_EXPORTS = re.compile(
    r"_mh_dylib_header|__dso_handle"  # macOS
    r"|DllMainCRTStartup|_tls_\w+|__xl_[az]"  # Windows
    r"|memory|__stack_pointer"  # WebAssembly
)

lief.logging.disable()  # it reports every oddity of the format on stderr


def check_wheel(path: Path) -> list[str]:
    """Complaints about one wheel."""
    platform = platform_of(path.name)
    with zipfile.ZipFile(path) as wheel:
        native = {
            PurePosixPath(n).name: wheel.read(n) for n in wheel.namelist() if "/_native/" in n
        }
    module = native.pop("kvz.wasm", b"")
    if len(native) != 1 or not module:
        return [f"one library and kvz.wasm expected, found {sorted(native)}"]
    (image,) = native.values()
    return check_library(image, platform) + check_module(module)


def platform_of(tags: str) -> Platform:
    """The platform of a wheel, from its tags or its file name."""
    return next(p for p in PLATFORMS if f"py3-none-{p.tag}" in tags)


def check_library(image: bytes, platform: Platform) -> list[str]:
    """Complaints about the native library."""
    library = lief.parse(image)
    if not isinstance(library, platform.kind) or machine(library) != platform.machine:
        return [f"not a library for {platform.tag}"]
    complaints = check_exports(image, exported(library), 64)
    if extra := needed(library) - platform.libraries:
        complaints.append(f"needs {sorted(extra)}")
    complaints += check_kernels(library, platform)
    if isinstance(library, ELF.Binary):
        complaints += check_elf(library, platform)
    if isinstance(library, MACHO.Binary):
        complaints += check_macho(image, library, platform)
    return complaints


def check_module(image: bytes) -> list[str]:
    """Complaints about the WebAssembly module."""
    module = wasmtime.Module(wasmtime.Engine(), image)
    complaints = check_exports(image, {export.name for export in module.exports}, 32)
    if imports := [f"{i.module}.{i.name}" for i in module.imports]:
        complaints.append(f"the module imports {imports}")
    return complaints


def check_exports(image: bytes, names: set[str], pointer_bits: int) -> list[str]:
    """The exports are the functions of the manifest, which is a string in the image."""
    found = re.search(rb'\{"version":\d+,"pointer_bits":[^\0]+', image)
    if found is None:
        return ["no manifest"]
    manifest = json.loads(found.group())
    promised = {f"kvz_{name}" for name in manifest["functions"]}
    names = {name for name in names if not LINKER_EXPORTS.fullmatch(name)}
    complaints = [f"{name} is not exported" for name in sorted(promised - names)]
    complaints += [f"{name} should not be exported" for name in sorted(names - promised)]
    if manifest["pointer_bits"] != pointer_bits:
        complaints.append(f"the manifest says {manifest['pointer_bits']} bits per pointer")
    return complaints


def machine(library: Any) -> Any:
    if isinstance(library, ELF.Binary):
        return library.header.machine_type
    return library.header.cpu_type if isinstance(library, MACHO.Binary) else library.header.machine


def exported(library: Any) -> set[str]:
    if isinstance(library, PE.Binary):
        table = library.get_export()
        return {str(entry.name) for entry in table.entries} if table else set()
    names = (symbol.name for symbol in library.exported_symbols)
    if isinstance(library, MACHO.Binary):  # where every C name has a leading underscore
        return {name.removeprefix("_") for name in names}
    return set(names)


def needed(library: Any) -> set[str]:
    if isinstance(library, PE.Binary):
        return {str(entry.name).lower() for entry in library.imports}
    return {entry if isinstance(entry, str) else entry.name for entry in library.libraries}


def check_kernels(library: Any, platform: Platform) -> list[str]:
    """The kernels of every CPU level are in the library, in the instructions meant for it."""
    missing = {INSTRUCTIONS[name]: name for name in platform.kernels}
    text = next(s for s in library.sections if s.name in {".text", "__text"})
    for mnemonic, operands in disassemble(bytes(text.content), platform):
        for found in [i for i in missing if i[0] == mnemonic and i[1] in operands]:
            del missing[found]
        if not missing:
            break
    return [f"no instruction of the {name} kernels" for name in missing.values()]


def disassemble(code: bytes, platform: Platform) -> Iterator[tuple[str, str]]:
    """Mnemonic and operands of every instruction."""
    if "neon_dotprod" in platform.kernels:
        engine = capstone.Cs(capstone.CS_ARCH_ARM64, capstone.CS_MODE_ARM)
    else:
        engine = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    engine.skipdata = True  # constants lie between functions
    return ((mnemonic, operands) for _, _, mnemonic, operands in engine.disasm_lite(code, 0))


def check_elf(library: Any, platform: Platform) -> list[str]:
    """Old enough symbols; and no instruction of the builder's CPU outside the kernels."""
    complaints = []
    for requirement in library.symbols_version_requirement:
        for version in requirement.get_auxiliary_symbols():
            if tuple(map(int, re.findall(r"\d+", version.name))) > (2, 17):
                complaints.append(f"needs {version.name}")
    if platform.machine == ELF.ARCH.X86_64:
        for symbol in library.exported_symbols:
            code = bytes(library.get_content_from_virtual_address(symbol.value, symbol.size))
            if any(mnemonic.startswith("v") for mnemonic, _ in disassemble(code, platform)):
                complaints.append(f"{symbol.name} uses AVX: not built with -Dcpu=baseline")
    return complaints


def check_macho(image: bytes, library: Any, platform: Platform) -> list[str]:
    """The oldest macOS is the tag's; on arm64, where the kernel insists, the signature holds."""
    complaints = []
    minimum = library.build_version.minos[:2]
    if f"macosx_{minimum[0]}_{minimum[1]}_" not in platform.tag:
        complaints.append(f"made for macOS {minimum} and later, unlike its tag")
    if platform.machine == MACHO.Header.CPU_TYPE.ARM64:
        if not library.has_code_signature:
            complaints.append("not signed")
        else:
            complaints += check_signature(image, bytes(library.code_signature.content))
    return complaints


def check_signature(image: bytes, blob: bytes) -> list[str]:
    """An ad-hoc signature is a code directory: a SHA-256 of every page of the file before it."""
    (directory,) = struct.unpack_from(">I", blob, 16)  # offset of the first blob in the super blob
    magic, _, _, flags, hashes, _, _, count, limit = struct.unpack_from(">9I", blob, directory)
    hash_size, hash_type, _, page_log2 = struct.unpack_from(">4B", blob, directory + 36)
    if magic != 0xFADE0C02 or not flags & 0x2 or (hash_size, hash_type) != (32, 2):
        return ["not signed ad hoc with SHA-256"]
    page = 1 << page_log2
    for index in range(count):
        start = directory + hashes + 32 * index
        digest = hashlib.sha256(image[page * index : min(page * (index + 1), limit)]).digest()
        if blob[start : start + 32] != digest:
            return [f"the signature of page {index} is wrong"]
    return []


def main(paths: list[str]) -> int:
    """Print the verdict on each wheel; 1 if there is any complaint."""
    failed = False
    for path in map(Path, paths):
        complaints = check_wheel(path)
        failed = failed or bool(complaints)
        print(f"{'FAILED' if complaints else 'ok':7} {path.name} ({path.stat().st_size >> 10} KiB)")
        for complaint in complaints:
            print(f"        {complaint}")
    return int(failed or not paths)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
