"""A native core that runs elsewhere: a library of another CPU under qemu, of Windows under Wine.

KVZ_AGENT is the command that starts agent.zig with such a library. `stand_in` then puts it where
the native core would be, and tests that take arrays and not buffers run on it as they are:

    at=build/aarch64-linux
    KVZ_AGENT="qemu-aarch64 -L /usr/aarch64-linux-gnu $at/bin/agent $at/kvz/libkvz.so" pytest ...

Used by conftest.py and workload.py; noxfile.py has the sessions.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import struct
import subprocess
import threading
from typing import Any

from kvz import _core

ALIGNMENT = 64  # of everything that the core allocates


def stand_in() -> None:
    """Make the library that KVZ_AGENT runs the native core, if it is set."""
    command = os.environ.get("KVZ_AGENT")
    if command and "native" not in _core._loaded:
        core = ForeignCore(shlex.split(command))
        _core._apply_environment(core)
        _core._loaded["native"] = core


class ForeignCore(_core.Core):
    """The functions of the ABI as methods, each of which is a message to the agent."""

    name = "native"
    shares_memory = False

    def __init__(self, command: list[str]) -> None:
        self.lock = threading.RLock()
        self._talking = False
        self._later: list[bytes] = []  # calls that a finalizer made in the middle of a message
        self._agent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        manifest = self._talk(_call("manifest"), 8)
        text = self.string(int.from_bytes(manifest, "little"))
        super().__init__(shlex.join(command), json.loads(text), ctypes.c_void_p)
        for name, (restype, *argtypes) in self.abi["functions"].items():
            setattr(self, name, self._bind(name, restype, argtypes))

    def _bind(self, name: str, restype: str, argtypes: list[str]) -> Any:
        """Make a Python function of a function of the library."""
        result = self.ctypes[restype]
        slots = [self.ctypes[kind] for kind in argtypes]

        def call(*args: Any) -> Any:
            with self.lock:
                words = [self._word(slot, arg) for slot, arg in zip(slots, args, strict=True)]
                request = _call(name, *words)
                if result is None and self._talking:
                    return self._later.append(request)
                answer = self._talk(request, 8)
            if result is None:
                return None
            value = result.from_buffer_copy(answer).value
            return value or 0 if restype == "ptr" else value

        return call

    def _word(self, slot: Any, arg: Any) -> bytes:
        if isinstance(arg, bytes):  # a string; the few there are stay
            source = ctypes.create_string_buffer(arg, len(arg))
            arg = self.copy_in(ctypes.addressof(source), len(arg))
        return bytes(slot(arg)).ljust(8, b"\0")

    def copy_in(self, address: int, nbytes: int) -> int:
        """Allocate memory of the agent and copy `nbytes` of this process there."""
        pointer: int = self.alloc(nbytes)
        assert pointer % ALIGNMENT == 0 < pointer
        data = ctypes.string_at(address, nbytes)
        self._talk(b"w" + struct.pack("<QQ", pointer, nbytes) + data, 0)
        return pointer

    def copy_out(self, pointer: int, nbytes: int) -> bytes:
        """Read memory of the agent."""
        return self._talk(b"r" + struct.pack("<QQ", pointer, nbytes), nbytes)

    def _talk(self, request: bytes, answer_bytes: int) -> bytes:
        with self.lock:
            assert self._agent.stdin is not None
            assert self._agent.stdout is not None
            self._talking = True
            try:
                self._agent.stdin.write(request)
                self._agent.stdin.flush()
                answer = self._agent.stdout.read(answer_bytes)
            finally:
                self._talking = False
            if len(answer) != answer_bytes:
                raise RuntimeError(f"the agent stopped: exit status {self._agent.wait()}")
            while self._later:
                self._talk(self._later.pop(), 8)
        return answer

    def string(self, pointer: int) -> str:
        """Read a string of the library, some bytes at a time."""
        text = b""
        while b"\0" not in text:
            text += self.copy_out(pointer + len(text), 64)
        return text.partition(b"\0")[0].decode()

    def frame(self) -> _core.Frame:
        """Return a context that copies into the memory of the agent and back."""
        return ForeignFrame(self)


def _call(name: str, *words: bytes) -> bytes:
    return b"".join((b"c", bytes([len(name)]), name.encode(), *words))


class ForeignFrame(_core.Frame):
    """Copies what is lent into the memory of the agent, and results back at the end."""

    def __init__(self, core: ForeignCore) -> None:
        self._core = core
        self._held: list[tuple[int, int]] = []  # (pointer, bytes)
        self._outputs: list[tuple[int, int, int]] = []  # (pointer, address, bytes)

    def __enter__(self) -> _core.Frame:
        self._core.lock.acquire()
        return self

    def __exit__(self, *error: object) -> None:
        try:
            for pointer, address, nbytes in self._outputs if error == (None,) * 3 else ():
                ctypes.memmove(address, self._core.copy_out(pointer, nbytes), nbytes)
            for pointer, nbytes in self._held:
                self._core.free(pointer, nbytes)
        finally:
            self._core.lock.release()

    def put(self, address: int, nbytes: int) -> int:
        """Copy `nbytes` in."""
        pointer = self._core.copy_in(address, nbytes)
        self._held.append((pointer, nbytes))
        return pointer

    def out(self, address: int, nbytes: int) -> int:
        """Reserve `nbytes`, copied out at the end if nothing was raised."""
        pointer: int = self._core.alloc(nbytes)
        self._held.append((pointer, nbytes))
        self._outputs.append((pointer, address, nbytes))
        return pointer

    def ref(self, value: Any) -> int:
        """Copy a ctypes value in, and out at the end."""
        address, nbytes = ctypes.addressof(value), ctypes.sizeof(value)
        pointer = self.put(address, nbytes)
        self._outputs.append((pointer, address, nbytes))
        return pointer
