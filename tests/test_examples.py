"""Every example runs, on every core, and says what it promises to say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"
# What the output of each example contains; an example that is not listed fails.
PROMISES = {
    "quickstart.py": "(32, 128)",
    "numpy_decode_loop.py": "351 tokens: 256 q4 + 95 f16",
    "shared_pool.py": "no room in the pool",
    "partial_attention_merge.py": "largest difference",
    "continuous_batching.py": "6 of 6 sequences gave what they give alone",
    "beam_search.py": "best beam is exact: True",
    "best_of_n.py": "kept: ModelCache(3 layers, 324 tokens",
    "tree_speculation.py": "same state: True",
    "heavy_hitters.py": "kept of the tokens that matter: 5 of 5",
    "prompt_cache_on_disk.py": "1504 tokens, 1502 of them were there",
    "toy_model.py": "",  # the others import it
}


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_example_runs(name, core, monkeypatch, capsys):
    monkeypatch.setenv("KVZ_CORE", core)
    monkeypatch.syspath_prepend(EXAMPLES)
    runpy.run_path(str(EXAMPLES / name))
    assert PROMISES[name] in capsys.readouterr().out


def test_examples_are_there():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(PROMISES)
