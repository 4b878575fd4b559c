"""The cache classes for transformers by themselves, as its tests/utils/test_cache_utils.py has it.

And what is refused: a model, an option or a cache that kvz cannot serve says so before it runs.
"""

from __future__ import annotations

import copy
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvz
from support import run_page
from transformers_models import (
    BASE,
    EXACT,
    KvzCache,
    KvzLayer,
    cache_for,
    hf,
    kvz_attention,
    kvz_mask,
    model_of,
    padded_prompt,
    prompt,
    torch,
)

FIELDS: dict[str, Any] = {"tail_length": 8, "migration_batch": 8}


def layer_of(window: int | None = None, store: str = "q8", **options: Any) -> KvzLayer:
    config = kvz.CacheConfig(max_tokens=1 << 40, store_precision=store, **FIELDS)
    return KvzLayer(config, window, **options)


def states(tokens: int, batch: int = 2, seed: int = 0) -> Any:
    """Keys or values: (batch, 2 heads, tokens, 16)."""
    return torch.randn(batch, 2, tokens, 16, generator=torch.Generator().manual_seed(seed))


def held(layer: KvzLayer) -> list[np.ndarray]:
    return [row.get_all_kv()[0] for row in layer.rows]


# -- tests/utils/test_cache_utils.py ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_dynamic_cache(core: str, dtype: str) -> None:
    """Tokens come in, of any dtype and layout, and read back as float16 storage has them."""
    layer = layer_of(store="f16", core=core)
    given = states(20).to(getattr(torch, dtype))
    keys, values = layer.update(given, given)
    assert keys.shape == values.shape == (2, 2, 20, 16)
    assert (keys.dtype, keys.device) == (given.dtype, given.device)
    more = states(3, seed=1).to(given.dtype)
    strided = more.transpose(1, 2).contiguous().transpose(1, 2)
    keys, _ = layer.update(strided, strided)
    assert keys.shape == (2, 2, 23, 16)
    assert layer.get_seq_length() == 23
    assert layer.get_mask_sizes(4) == (27, 0)
    expected = torch.cat([given, more], 2).to(torch.float16).float()
    for row, mine in enumerate(held(layer)):
        np.testing.assert_array_equal(mine.transpose(1, 0, 2), expected[row].numpy())


def test_sliding_window_cache(core: str) -> None:
    """A window holds what the next token can see, and little more, however long the stream."""
    layer, theirs = layer_of(5, core=core), hf.cache_utils.DynamicSlidingWindowLayer(5)
    most = 0
    for tokens in (3, 1, 1, 1, 7, 2, *[1] * 200, 300, 1, *[30] * 9):
        given = states(tokens, seed=tokens)
        assert layer.get_mask_sizes(tokens) == theirs.get_mask_sizes(tokens)
        keys, _ = layer.update(given, given)
        full, _ = theirs.update(given, given)
        assert keys.shape == full.shape
        assert layer.get_seq_length() == theirs.get_seq_length()
        assert len(layer.rows[0]) >= keys.shape[2]
        most = max(most, len(layer.rows[0]) - tokens)
    assert most <= 5 + 8 + 8 + 64


def test_hybrid_cache() -> None:
    """Layers with and without a window count alike, beside each other."""
    model = model_of("gemma2")
    cache = cache_for(model, **EXACT)
    with torch.no_grad():
        model(prompt(1, 40), past_key_values=cache)
        model(prompt(1, 1), past_key_values=cache)
    assert cache.is_sliding == [True, False]
    assert [layer.get_seq_length() for layer in cache.layers] == [41, 41]
    assert [layer.get_mask_sizes(1) for layer in cache.layers] == [(16, 26), (42, 0)]


def test_layers_take_the_formats_of_a_preset() -> None:
    """In turn, those with a window too, which have no sinks; a format beside it is refused."""
    model = model_of("gemma2")
    cache = cache_for(model, preset="balanced", tail_length=8)
    with torch.no_grad():
        model(prompt(1, 40), past_key_values=cache)
    configs = [layer.rows[0].config for layer in cache.layers]
    assert [config.key_precision for config in configs] == ["q5k", "q4k"]
    assert [config.sink_tokens for config in configs] == [0, 4]
    assert {config.tail_length for config in configs} == {8}
    with pytest.raises(kvz.ConfigError, match="the preset balanced says it"):
        cache_for(model, preset=kvz.presets.BALANCED, store_precision="q4")
    with pytest.raises(kvz.InvalidArgumentError, match="got 'huge'"):
        cache_for(model, preset="huge")


def test_reorder_repeat_and_select(core: str) -> None:
    """Sequences are chosen by number; repeated ones share their pages."""
    layer = layer_of(store="q4", core=core)
    layer.update(states(70, batch=3), states(70, batch=3))
    before = held(layer)
    layer.reorder_cache(torch.tensor([2, 2, 0]))
    for mine, wanted in zip(held(layer), [2, 2, 0], strict=True):
        np.testing.assert_array_equal(mine, before[wanted])
    layer.update(states(1, batch=3, seed=3), states(1, batch=3, seed=3))
    assert not np.array_equal(held(layer)[0][-1], held(layer)[1][-1])
    layer.batch_select_indices(torch.tensor([False, True, True]))
    assert len(layer.rows) == 2
    layer.batch_repeat_interleave(2)
    now = held(layer)
    assert len(now) == layer.batch_size == 4
    for mine, wanted in zip(now, [2, 2, 0, 0], strict=True):
        np.testing.assert_array_equal(mine[:70], before[wanted])


def test_reset_gives_the_memory_back(core: str) -> None:
    pool = kvz.BufferPool(core=core)
    layer = layer_of(core=core, pool=pool)
    assert not hasattr(layer, "batch_size")
    layer.update(states(70), states(70))
    assert pool.stats().bytes_in_use == layer.nbytes > 0
    layer.reset()
    assert pool.stats().bytes_in_use == layer.nbytes == layer.get_seq_length() == 0
    layer.update(states(2, batch=5), states(2, batch=5))
    assert layer.batch_size == 5


def test_crop_takes_back_what_it_can(core: str) -> None:
    layer = layer_of(10, core=core)
    layer.crop(-3)  # nothing is there, as in a layer that shares another's states
    layer.update(states(30), states(30))
    layer.crop(-4)
    assert layer.get_seq_length() == 26
    layer.update(states(100), states(100))
    layer.update(states(2), states(2))  # 128 tokens: the window slid before them
    held = len(layer.rows[0])
    assert held < 40
    with pytest.raises(kvz.InvalidArgumentError, match=r"4 tokens .* window of 10"):
        layer.crop(-(held - 5))
    assert layer.get_seq_length() == 128
    layer.crop(-100 + 98)
    with pytest.raises(kvz.InvalidArgumentError, match=r"tokens_to_remove.*got 3"):
        layer.crop(3)
    layer.activate_past_recording()
    layer.update(states(9), states(9))
    layer.update(states(9), states(9))
    layer.crop(-15)
    assert layer.get_seq_length() == 129


@pytest.mark.parametrize("bad", [0, 1])
def test_an_update_is_all_or_nothing(core: str, bad: int) -> None:
    """A NaN in one sequence leaves every sequence as it was."""
    layer = layer_of(core=core)
    layer.update(states(20), states(20))
    before = held(layer)
    wrong = states(3)
    wrong[bad, 1, 2, 5] = torch.nan
    with pytest.raises(kvz.NotFiniteError):
        layer.update(wrong, states(3))
    assert layer.get_seq_length() == 20
    for mine, wanted in zip(held(layer), before, strict=True):
        np.testing.assert_array_equal(mine, wanted)


def test_a_pool_limits_a_model() -> None:
    """The limit of a pool is the limit of the cache, and is said."""
    model = model_of("llama")
    pool = kvz.BufferPool(max_bytes=1 << 18)
    cache = cache_for(model, pool=pool, **EXACT)
    with torch.no_grad(), pytest.raises(kvz.PoolExhaustedError, match="262144"):
        model(prompt(2, 400), past_key_values=cache)


def test_statistics_and_repr() -> None:
    model = model_of("llama")
    cache = cache_for(model, store_precision="q4", **FIELDS)
    assert repr(cache) == "KvzCache(2 layers, 0 sequences of 0 tokens, 0 B)"
    model.generate(prompt(2, 80), past_key_values=cache, max_new_tokens=2, do_sample=False)
    stats = cache.stats()
    assert [[now.total_tokens for now in layer] for layer in stats] == [[81, 81]] * 2
    assert cache.nbytes == sum(now.total_bytes for layer in stats for now in layer)
    assert "2 layers, 2 sequences of 81 tokens" in repr(cache)
    assert repr(cache.layers[0]) == "KvzLayer(2 sequences of 81 tokens)"


def test_fork_shares_pages() -> None:
    """A fork costs nothing until it differs, and is not changed by what happens to the other."""
    model = model_of("llama")
    cache = cache_for(model, store_precision="q4", **FIELDS)
    with torch.no_grad():
        model(prompt(1, 150), past_key_values=cache)
        fork = cache.fork()
        digest = fork.layers[0].rows[0].digest()
        assert digest == cache.layers[0].rows[0].digest()
        model(prompt(1, 5), past_key_values=cache)
    assert fork.get_seq_length() == 150
    assert fork.layers[0].rows[0].digest() == digest
    assert copy.copy(cache).layers is cache.layers


# -- Settings: tests/test_modeling_common.py -------------------------------------------------------


def test_can_set_attention_dynamically() -> None:
    model = model_of("qwen2")
    model.set_attn_implementation("eager")
    cache_for(model)
    assert model.config._attn_implementation == "kvz"


def test_config_attn_implementation_setter() -> None:
    config = hf.LlamaConfig(**BASE)
    config._attn_implementation = "kvz"
    model = hf.LlamaForCausalLM(config).eval()
    cache = KvzCache(model.config)
    out = model.generate(prompt(1, 4), past_key_values=cache, max_new_tokens=2, do_sample=False)
    assert out.shape == (1, 6)


def test_the_cache_under_its_new_name() -> None:
    """`cache`, where transformers calls it so."""
    if "cache" not in inspect.signature(hf.LlamaForCausalLM.forward).parameters:
        pytest.skip("this transformers calls it past_key_values")
    model, ids = model_of("llama"), prompt(1, 9)
    cache = cache_for(model)
    model.generate(ids, cache=cache, max_new_tokens=2, do_sample=False)
    assert cache.get_seq_length() == 10


def test_the_two_lines_of_the_readme() -> None:
    """They are all that changes in a program that generates text."""
    text = (Path(__file__).parents[1] / "README.md").read_text("utf-8")
    (block,) = re.findall(r"```python\n([^`]*model\.generate[^`]*)```", text)
    assert len([line for line in block.splitlines() if line]) == 2
    model = model_of("llama")
    model.set_attn_implementation("sdpa")
    inputs = {"input_ids": prompt(1, 9), "max_new_tokens": 3}
    names: dict[str, Any] = {"model": model, "inputs": inputs}
    exec(block, names)
    assert names["out"].shape[1] > 9
    assert model.config._attn_implementation == "kvz"


def test_the_code_of_the_how_to() -> None:
    """It runs as it stands, and leaves what it says."""
    model = model_of("llama")
    given = {"input_ids": prompt(1, 40), "max_new_tokens": 4}
    inputs = {**given, "attention_mask": torch.ones_like(given["input_ids"])}
    names: dict[str, Any] = {"model": model, "inputs": inputs}
    run_page("howto-transformers.md", names)
    assert names["out"].shape == names["answer"].shape == (1, 44)
    assert names["read"].get_seq_length() == 39
    assert names["cache"].layers[0].config.tail_length == 32


# -- What is refused -------------------------------------------------------------------------------


def test_a_model_with_another_attention_is_refused() -> None:
    model = model_of("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(kvz.UnsupportedError, match=r"'kvz', got 'eager'.*cache_for\(model\)"):
        KvzCache(model.config)


def test_another_cache_under_kvz_attention_is_refused() -> None:
    """Forgetting to pass the cache does not quietly run without it."""
    model = model_of("llama")
    model.set_attn_implementation("kvz")
    with pytest.raises(kvz.UnsupportedError, match=r"no KvzCache.*cache_for\(model\)"):
        model.generate(prompt(1, 4), max_new_tokens=3, do_sample=False)


def test_another_attention_over_a_kvz_cache_is_refused() -> None:
    model = model_of("llama")
    cache = cache_for(model)
    model.set_attn_implementation("eager")
    with torch.no_grad(), pytest.raises(kvz.UnsupportedError, match="keeps packed"):
        model(prompt(1, 4), past_key_values=cache)


REFUSED = {
    "DeepseekV3": ("latent attention", {"q_lora_rank": 16, "kv_lora_rank": 16,
                   "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 24,
                   "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
                   "moe_intermediate_size": 32, "first_k_dense_replace": 1}),
    "FalconH1": ("hybrid", {"mamba_d_ssm": 64, "mamba_n_heads": 8, "mamba_d_head": 8,
                 "mamba_d_state": 16, "mamba_n_groups": 1}),
    "Bloom": ("attention be replaced", {}),
    "Mamba": ("no layer with keys and values|layer types|attention be replaced", {}),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_served_are_refused(name: str) -> None:
    """At set-up, and their attention is left as it was."""
    text, fields = REFUSED[name]
    model = getattr(hf, name + "ForCausalLM")(getattr(hf, name + "Config")(**BASE, **fields))
    before = model.config._attn_implementation
    with pytest.raises(kvz.UnsupportedError, match=text):
        cache_for(model)
    assert model.config._attn_implementation == before


def test_an_encoder_with_a_decoder_is_refused() -> None:
    config = hf.T5Config(vocab_size=99, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(kvz.UnsupportedError, match="t5: expected a decoder"):
        cache_for(hf.T5ForConditionalGeneration(config))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"store_precision": "q3"}, kvz.ConfigError, "store_precision"),
        ({"max_tokens": 5}, kvz.InvalidArgumentError, "max_tokens: the model decides"),
        ({"head_dim": 5, "num_kv_heads": 1}, kvz.InvalidArgumentError, "head_dim, num_kv_heads"),
        ({"tail": 5}, kvz.InvalidArgumentError, "tail: expected fields of CacheConfig"),
        ({"core": "gpu"}, kvz.InvalidArgumentError, "gpu"),
        ({"pool": 5}, kvz.InvalidTypeError, "pool"),
    ],
)
def test_wrong_options_are_refused(options: Any, error: Any, text: str) -> None:
    """Before a token runs."""
    with pytest.raises(error, match=text):
        cache_for(model_of("llama"), **options)


@pytest.mark.parametrize("bad", ["llama", None, 5])
def test_wrong_models_are_refused(bad: Any) -> None:
    with pytest.raises(kvz.InvalidTypeError, match="model: expected a PreTrainedModel"):
        cache_for(bad)
    with pytest.raises(kvz.InvalidTypeError, match="config: expected a transformers"):
        KvzCache(bad)


def test_another_batch_is_refused() -> None:
    model = model_of("llama")
    cache = cache_for(model)
    with torch.no_grad():
        model(prompt(2, 4), past_key_values=cache)
        with pytest.raises(kvz.InvalidArgumentError, match="batch of 2 as before, got 3"):
            model(prompt(3, 1), past_key_values=cache)


def test_weights_gradients_and_dropout_are_refused() -> None:
    model = model_of("llama")
    cache = cache_for(model)
    module = model.model.layers[0].self_attn
    keys, values = cache.layers[0].update(states(3, 1), states(3, 1))
    with pytest.raises(kvz.UnsupportedError, match="output_attentions"):
        kvz_attention(module, states(3, 1), keys, values, None, output_attentions=True)
    with pytest.raises(kvz.UnsupportedError, match=r"dropout: expected 0, got 0\.5"):
        kvz_attention(module, states(3, 1), keys, values, None, dropout=0.5)
    loss = model(prompt(1, 4), past_key_values=cache_for(model)).logits.sum()
    with pytest.raises(kvz.UnsupportedError, match="no gradient"):
        loss.backward()


# -- The mask --------------------------------------------------------------------------------------


def test_a_mask_is_made_only_where_one_is_needed() -> None:
    ones, (_, padded) = torch.ones(3, 30, dtype=torch.long), padded_prompt()
    sizes: dict[str, Any] = {"batch_size": 3, "q_length": 30, "kv_length": 30}
    masking = hf.masking_utils
    sliding = masking.sliding_window_causal_mask_function(4)
    chunked = masking.chunked_causal_mask_function(4, torch.zeros(3, dtype=torch.long))
    for function in (masking.causal_mask_function, sliding):
        assert kvz_mask(**sizes, mask_function=function, attention_mask=ones) is None
        some = kvz_mask(**sizes, mask_function=function, attention_mask=padded)
        assert some is not None
        assert torch.equal(some[:, 0, 0], padded.bool())
    whole = kvz_mask(**sizes, mask_function=chunked, attention_mask=ones)
    assert whole is not None
    assert whole.shape == (3, 1, 30, 30)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_a_mask_with_four_axes_is_taken_as_it_is(kind: str) -> None:
    """A block of tokens that see each other, as images have it."""
    model = model_of("llama")
    mask = torch.tril(torch.ones(10, 10, dtype=torch.bool))
    mask[3:7, 3:7] = True
    mask = mask[None, None]
    if kind == "additive":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    results = []
    for cache in (None, cache_for(model, **EXACT)):
        model.set_attn_implementation("kvz" if cache else "sdpa")
        with torch.no_grad():
            results.append(model(prompt(1, 10), attention_mask=mask, past_key_values=cache).logits)
    torch.testing.assert_close(results[1], results[0], atol=2e-3, rtol=0)
