"""The README's examples run as they stand, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        if "model.generate" in block:  # it runs in test_transformers_cache.py
            continue
        exec(block, names)
        assert names["out"].shape == (32, 128)
    assert "2000 tokens" in capsys.readouterr().out
