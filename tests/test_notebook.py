"""What notebooks show, and the plots."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

import kvz
from kvz.html import COLORS


class Tags(HTMLParser):
    """Fails on tags that are not closed in order, and gathers the widths of bars."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.widths: list[float] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        style = dict(attrs).get("style") or ""
        if tag != "br":
            self.open.append(tag)
        if any(color in style for color in COLORS.values()) and "width" in style:
            self.widths.append(float(style.partition("width:")[2].partition("%")[0]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def filled(core: Any) -> kvz.TwoTierCache:
    cache = kvz.TwoTierCache(
        core=core, num_kv_heads=2, head_dim=64, sink_tokens=4, store_precision=("q8", "q4")
    )
    rows = np.random.default_rng(0).standard_normal((1000, 2, 64), dtype=np.float32)
    cache.append(rows, rows)
    return cache


def test_a_cache_shows_its_tiers(core: Any) -> None:
    """The parts of the bar are as wide as the bytes of the tiers, and named."""
    cache = filled(core)
    shown, now = Tags(cache._repr_html_()), cache.stats()
    sizes = np.array([now.sink_bytes, now.store_bytes, now.tail_bytes])
    np.testing.assert_allclose(shown.widths, 100 * sizes / sizes.sum(), atol=0.01)
    assert "store, q8/q4: 700 tokens" in shown.text
    assert "1,000 tokens" in shown.text
    assert "bits per value" in Tags(now._repr_html_()).text
    empty = kvz.TwoTierCache(core=core)
    assert Tags(empty._repr_html_()).widths == []
    cache.close()
    assert cache._repr_html_() == "TwoTierCache(closed)"


def test_a_model_shows_every_layer(core: Any) -> None:
    model = kvz.ModelCache(num_layers=3, core=core, num_kv_heads=1, head_dim=32)
    rows = np.ones((400, 1, 32), np.float32)
    for layer in range(3):
        model[layer].append(rows, rows)
    shown = Tags(model._repr_html_())
    assert len(shown.widths) == 6  # store and tail of three layers
    assert "ModelCache(3 layers" in shown.text


@pytest.fixture
def plot() -> Any:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    import kvz.plot

    yield kvz.plot
    plt.close("all")


def test_tiers_are_stacked(core: Any, plot: Any) -> None:
    cache = filled(core)
    ax = plot.tiers([cache, cache.stats()])
    heights = sum(bar.get_height() for bar in ax.patches)
    assert heights == pytest.approx(2 * cache.nbytes / 2**20)
    assert plot.tiers(cache, ax) is ax


def test_errors_rise_with_age(core: Any, plot: Any) -> None:
    rows = np.random.default_rng(0).standard_normal((1000, 2, 64), dtype=np.float32)
    ax = plot.error_by_age(filled(core), rows, rows)
    keys, values = (line.get_xydata() for line in ax.lines)
    assert len(keys) == len(values) == 1000
    young, old = keys[keys[:, 0] < 250][:, 1], keys[(keys[:, 0] > 400) & (keys[:, 0] < 990)][:, 1]
    assert young.max() < 1e-3 < old.min()
    assert values[:, 1].max() > keys[:, 1].max()  # q4 against q8
    with pytest.raises(kvz.InvalidArgumentError, match="keys: expected all 1000"):
        plot.error_by_age(filled(core), rows[:9], rows)


def test_fidelity_against_size(plot: Any) -> None:
    rows = [{"store": "q4", "bits_per_value": 4.5, "kl": 1e-3},
            {"store": "f32", "bits_per_value": 32, "kl": 0.0}]  # fmt: skip
    ax = plot.kl_against_bits(rows)
    assert [text.get_text() for text in ax.texts] == ["q4", "f32, exact"]
    assert ax.get_yscale() == "log"
