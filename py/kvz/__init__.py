"""kvz: a KV cache for transformer inference on CPUs that attends to packed keys and values."""

import sys
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvz._api import *  # noqa: F403

    __version__: str

#: Public functions that have the name of the module they live in.
_SHADOWED = frozenset({"info", "plan", "quantize"})


class _Package(ModuleType):
    """Keeps the import of a module from taking the name of a function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _SHADOWED and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    """Load the public names, and numpy with them, when one is asked for: `kvz --help` asks none."""
    if name == "__version__":
        return import_module("kvz.info").version()
    if name not in _SHADOWED and not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    if name == "__all__" or not name.startswith("_"):
        api = import_module("kvz._api")
        names = {each: getattr(api, each) for each in api.__all__}
        globals().update(names, __all__=api.__all__)
        if name in globals():
            return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__getattr__("__all__")})
