"""mlx-lm models with caches of kvz give what they give with mlx-lm's own."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

import kvz

mx = pytest.importorskip("mlx.core")
pytest.importorskip("mlx_lm")
from mlx_lm.generate import generate_step, speculative_generate_step  # noqa: E402
from mlx_lm.models import cache as mlx_cache  # noqa: E402
from mlx_lm.models import gemma3_text, gpt_oss, llama, qwen3  # noqa: E402

from kvz.integrations.mlx_lm import KvzPromptCache, make_prompt_cache  # noqa: E402
from support import run_page  # noqa: E402

VOCABULARY = 199
BASE: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "head_dim": 16,
}
EXACT: dict[str, Any] = {
    "store_precision": "f32",
    "tail_precision": "f32",
    "tail_length": 16,
    "migration_batch": 8,
}


def make_llama() -> Any:
    return llama.Model(llama.ModelArgs(model_type="llama", **BASE))


def make_qwen3() -> Any:
    fields = {"max_position_embeddings": 512, "rope_theta": 1e4, "tie_word_embeddings": False}
    return qwen3.Model(qwen3.ModelArgs(model_type="qwen3", **BASE, **fields))


def make_gemma3() -> Any:
    fields = {"query_pre_attn_scalar": 16, "sliding_window": 16, "sliding_window_pattern": 2}
    return gemma3_text.Model(gemma3_text.ModelArgs(model_type="gemma3_text", **BASE, **fields))


def make_gpt_oss() -> Any:
    fields = {**BASE, "sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
              "rope_theta": 1e4}  # fmt: skip
    return gpt_oss.Model(gpt_oss.ModelArgs(model_type="gpt_oss", **fields))


MODELS = {
    "llama": make_llama,
    "qwen3": make_qwen3,
    "gemma3": make_gemma3,
    "gpt-oss": make_gpt_oss,
}
_made: dict[str, Any] = {}


def model_of(name: str) -> Any:
    if name not in _made:
        mx.set_default_device(mx.cpu)
        mx.random.seed(0)
        _made[name] = MODELS[name]()
        mx.eval(_made[name].parameters())
    return _made[name]


def prompt(tokens: int = 30, seed: int = 0) -> Any:
    return mx.array(np.random.default_rng(seed).integers(3, VOCABULARY, tokens))


def greedy(model: Any, cache: Any, tokens: int = 40, **options: Any) -> list[int]:
    steps = generate_step(prompt(), model, max_tokens=tokens, prompt_cache=cache, **options)
    return [int(token) for token, _ in steps]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("step", [2048, 7], ids=["whole", "chunks"])
def test_greedy_text_is_the_same(name: str, step: int) -> None:
    """Also where a window slides and where there are sinks, whole prompt or in pieces."""
    model = model_of(name)
    expected = greedy(model, mlx_cache.make_prompt_cache(model))
    cache = make_prompt_cache(model, **EXACT)
    assert greedy(model, cache, prefill_step_size=step) == expected
    assert cache[0].offset == 70
    assert cache[0].nbytes > 0
    # The model goes on working with the caches of mlx-lm.
    assert greedy(model, mlx_cache.make_prompt_cache(model)) == expected


def test_logits_are_the_same() -> None:
    """Within the rounding of float32, token by token, for a batch."""
    for name in MODELS:
        model = model_of(name)
        ids = mx.stack([prompt(20, seed) for seed in range(3)])
        caches = mlx_cache.make_prompt_cache(model), make_prompt_cache(model, **EXACT)
        for start, stop in ((0, 9), (9, 10), (10, 20)):
            expected, got = (np.array(model(ids[:, start:stop], cache=cache)) for cache in caches)
            np.testing.assert_allclose(got, expected, atol=2e-4, rtol=2e-4)


def test_packed_storage_is_packed() -> None:
    model = model_of("llama")
    cache = make_prompt_cache(model, store_precision="q4", tail_length=8, migration_batch=8)
    greedy(model, cache)
    (row,) = cache[0].rows
    assert row.stats().store_tokens > 50
    assert 0 < cache[0].nbytes < 4 * 69 * 2 * 2 * 16 * 4


def test_layers_take_the_formats_of_a_preset() -> None:
    """In turn."""
    model = model_of("llama")
    cache = make_prompt_cache(model, preset="balanced", tail_length=8, migration_batch=8)
    greedy(model, cache)
    assert [each.rows[0].config.key_precision for each in cache] == ["q5k", "q4k"] * 2


def test_speculative_decoding() -> None:
    """Rejected tokens are trimmed and leave no trace."""
    model = model_of("llama")
    expected = greedy(model, mlx_cache.make_prompt_cache(model))
    caches = [*make_prompt_cache(model, **EXACT), *make_prompt_cache(model, **EXACT)]
    steps = speculative_generate_step(prompt(), model, model, max_tokens=40, prompt_cache=caches)
    assert [int(step[0]) for step in steps] == expected


def test_the_code_of_the_how_to(capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of("llama")
    run_page("howto-mlx.md", {"model": model, "prompt": prompt()})
    expected = greedy(model, mlx_cache.make_prompt_cache(model), 100)
    assert len(capsys.readouterr().out.splitlines()) == len(expected) == 100


def test_a_rotating_cache_is_refused() -> None:
    """At set-up, with what to do instead; None is what mlx-lm has where nobody asked for one."""
    with pytest.raises(kvz.UnsupportedError, match=r"max_kv_size.*pool"):
        make_prompt_cache(model_of("llama"), max_kv_size=512)
    assert len(make_prompt_cache(model_of("llama"), max_kv_size=None)) == 4


def test_trim_and_the_rest_of_the_protocol() -> None:
    model = model_of("llama")
    cache = make_prompt_cache(model, **EXACT)
    assert cache[0].empty()
    assert (cache[0].size(), cache[0].offset, cache[0].nbytes) == (0, 0, 0)
    before = greedy(model, cache, 10)
    assert mlx_cache.can_trim_prompt_cache(cache)
    assert mlx_cache.trim_prompt_cache(cache, 10 + 30) == 40
    assert (cache[0].size(), cache[0].offset) == (0, 0)
    assert greedy(model, cache, 10) == before
    fork = copy.deepcopy(cache)
    assert fork[0].rows[0].digest() == cache[0].rows[0].digest()
    fork[0].trim(3)
    assert (fork[0].size(), cache[0].size()) == (37, 40)
    assert (cache[0].state, cache[0].meta_state) == ([], "")
    with pytest.raises(kvz.UnsupportedError, match="state"):
        cache[0].state = [mx.zeros(3)]


def test_what_cannot_be_served_is_refused() -> None:
    class Odd:
        def make_cache(self) -> list[Any]:
            return [mlx_cache.ArraysCache(2)]

    with pytest.raises(kvz.UnsupportedError, match="ArraysCache"):
        make_prompt_cache(Odd())
    with pytest.raises(kvz.ConfigError, match="store_precision"):
        make_prompt_cache(model_of("llama"), store_precision="q3")
    cache = KvzPromptCache(kvz.CacheConfig(num_kv_heads=1, head_dim=1))
    cache.update_and_fetch(mx.zeros((2, 1, 3, 8)), mx.zeros((2, 1, 3, 8)))
    with pytest.raises(kvz.InvalidArgumentError, match="batch of 2 as before, got 1"):
        cache.update_and_fetch(mx.zeros((1, 1, 3, 8)), mx.zeros((1, 1, 3, 8)))
    nothing = mx.full((2, 1, 3, 8), float("nan"))
    with pytest.raises(kvz.NotFiniteError):
        cache.update_and_fetch(nothing, nothing)
    assert cache.size() == 3
