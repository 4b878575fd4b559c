"""The generation tests of transformers, by their names there, with kvz against DynamicCache.

A name says what is tested in tests/generation/test_utils.py of transformers 5: each test runs a
model with its own eager attention and a DynamicCache, and again with kvz, and compares the text
and the logits. Storage is float32 where texts must agree, so that nothing but kvz can differ.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest

from transformers_models import (
    EXACT,
    MODELS,
    RECURRENT,
    KvzCache,
    KvzLayer,
    cache_for,
    hf,
    model_of,
    padded_prompt,
    prompt,
    torch,
)

#: The largest difference of two logits, whose own magnitude is about 10: float32 sums of another
#: order, through the layers of a model with wide weights.
TOLERANCE = 2e-3
models = pytest.mark.parametrize("name", MODELS)
croppable = pytest.mark.parametrize("name", [name for name in MODELS if name not in RECURRENT])


def dynamic(model: Any) -> Any:
    """The cache and the attention that transformers has."""
    model.set_attn_implementation("eager")
    return hf.DynamicCache(config=model.config)


def exact(model: Any) -> KvzCache:
    """The same numbers, held by kvz."""
    return cache_for(model, **EXACT)


def generate(model: Any, cache: Any, ids: Any = None, mask: Any = None, **options: Any) -> Any:
    given = {"max_new_tokens": 20, "do_sample": False, **options}
    if ids is not None:
        given["input_ids"] = ids
        given["attention_mask"] = torch.ones_like(ids) if mask is None else mask
    return model.generate(
        past_key_values=cache,
        return_dict_in_generate=True,
        output_logits=True,
        disable_compile=True,
        **given,
    )


def same(got: Any, expected: Any) -> None:
    """Assert the same text and, token by token, the same logits."""
    assert torch.equal(got.sequences, expected.sequences)
    for mine, theirs in zip(got.logits, expected.logits, strict=True):
        # Where padding is a query, eager attention averages over everything; nobody reads it.
        torch.testing.assert_close(mine, theirs, atol=TOLERANCE, rtol=0)


def compare(name: str, run: Any) -> Any:
    """Run the same thing with both caches, compare, and return what kvz gave."""
    model = model_of(name)
    expected = run(model, dynamic(model))
    got = run(model, exact(model))
    same(got, expected)
    assert isinstance(got.past_key_values, KvzCache)
    return got


# -- tests/generation/test_utils.py ----------------------------------------------------------------


@models
def test_greedy_generate(name: str) -> None:
    compare(name, lambda model, cache: generate(model, cache, prompt(1, 30), max_new_tokens=40))


@models
def test_greedy_generate_batched(name: str) -> None:
    compare(name, lambda model, cache: generate(model, cache, prompt(3, 20)))


@models
def test_left_padding_compatibility(name: str) -> None:
    """Padding on the left: the batch gives what DynamicCache gives, and what each prompt alone."""
    ids, mask = padded_prompt()
    got = compare(name, lambda model, cache: generate(model, cache, ids, mask))
    model = model_of(name)
    for row in range(3):
        alone = ids[row : row + 1, mask[row] == 1]
        result = generate(model, exact(model), alone)
        assert torch.equal(result.sequences[0, alone.shape[1] :], got.sequences[row, 30:])


@models
def test_cache_extra_left_padding(name: str) -> None:
    """More padding than any prompt needs changes nothing."""
    ids, mask = padded_prompt()
    pad = torch.zeros(3, 5, dtype=ids.dtype)
    wider, its_mask = torch.cat([pad, ids], 1), torch.cat([pad, mask], 1)
    got = compare(name, lambda model, cache: generate(model, cache, wider, its_mask))
    model = model_of(name)
    expected = generate(model, exact(model), ids, mask)
    assert torch.equal(got.sequences[:, 5:], expected.sequences)


@models
def test_sample_generate(name: str) -> None:
    def run(model: Any, cache: Any) -> Any:
        torch.manual_seed(3)
        options = {"do_sample": True, "top_k": 20, "num_return_sequences": 2}
        return generate(model, cache, *padded_prompt(), **options)

    compare(name, run)


@models
def test_beam_search_generate(name: str) -> None:
    ids, mask = padded_prompt()
    compare(name, lambda m, c: generate(m, c, ids, mask, num_beams=4, num_return_sequences=2))


@models
def test_beam_sample_generate(name: str) -> None:
    def run(model: Any, cache: Any) -> Any:
        torch.manual_seed(4)
        return generate(model, cache, prompt(2, 20), do_sample=True, num_beams=3, top_k=20)

    compare(name, run)


# gemma3n and gemma4 look tokens up by their ids in every layer.
with_embeds = pytest.mark.parametrize("name", [n for n in MODELS if n not in ("gemma3n", "gemma4")])


@with_embeds
def test_generate_from_inputs_embeds(name: str) -> None:
    model = model_of(name)
    embeds = model.get_input_embeddings()(prompt(2, 20)).detach()
    compare(name, lambda m, c: generate(m, c, inputs_embeds=embeds))


@with_embeds
def test_generate_continue_from_inputs_embeds(name: str) -> None:
    """Two turns on one cache, where the first gave embeddings instead of ids."""
    look_up = model_of(name).get_input_embeddings()
    embeds = look_up(prompt(2, 20)).detach()

    def run(model: Any, cache: Any) -> Any:
        first = generate(model, cache, inputs_embeds=embeds, max_new_tokens=3)
        more = torch.cat([embeds, look_up(first.sequences).detach()], 1)
        return generate(model, first.past_key_values, inputs_embeds=more, max_new_tokens=5)

    compare(name, run)


@models
def test_generate_continue_from_past_key_values(name: str) -> None:
    """Two turns on one cache, with padding in front of the first and none in the second."""
    ids, mask = padded_prompt()

    def run(model: Any, cache: Any) -> Any:
        first = generate(model, cache, ids, mask, max_new_tokens=9)
        more = torch.cat([first.sequences, prompt(3, 8, seed=5)], 1)
        ones = torch.ones(3, more.shape[1] - 30, dtype=mask.dtype)
        return generate(model, first.past_key_values, more, torch.cat([mask, ones], 1))

    compare(name, run)


@models
def test_chunked_prefill(name: str) -> None:
    """A prompt in pieces is the prompt."""
    ids, mask = padded_prompt()
    model = model_of(name)
    expected = generate(model, dynamic(model), ids, mask)
    same(generate(model, exact(model), ids, mask, prefill_chunk_size=8), expected)


@croppable
def test_prompt_lookup_decoding_matches_greedy_search(name: str) -> None:
    ids = prompt(1, 12).repeat(1, 3)  # so that there is something to look up
    model = model_of(name)
    plain = generate(model, dynamic(model), ids, max_new_tokens=30)
    looked_up = generate(model, exact(model), ids, max_new_tokens=30, prompt_lookup_num_tokens=4)
    assert torch.equal(looked_up.sequences, plain.sequences)


@croppable
def test_prompt_lookup_decoding_stops_at_eos(name: str) -> None:
    ids = prompt(1, 12).repeat(1, 3)
    model = model_of(name)
    plain = generate(model, dynamic(model), ids, max_new_tokens=30)
    stop = int(plain.sequences[0, 36 + 10])
    options = {"max_new_tokens": 30, "eos_token_id": stop}
    expected = generate(model, dynamic(model), ids, **options)
    got = generate(model, exact(model), ids, prompt_lookup_num_tokens=4, **options)
    assert torch.equal(got.sequences, expected.sequences)
    assert int(got.sequences[0, -1]) == stop


@croppable
@pytest.mark.parametrize("assistant", ["random", "same"])
def test_assisted_decoding_matches_greedy_search(name: str, assistant: str) -> None:
    """Rejected tokens of a draft leave no trace, whether many are rejected or none."""
    model = model_of(name)
    draft = copy.deepcopy(model if assistant == "same" else model_of("llama"))
    draft.set_attn_implementation("eager")
    draft.generation_config.num_assistant_tokens = 4
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    plain = generate(model, dynamic(model), prompt(1, 30), max_new_tokens=30)
    got = generate(model, exact(model), prompt(1, 30), max_new_tokens=30, assistant_model=draft)
    assert torch.equal(got.sequences, plain.sequences)


@croppable
def test_assisted_decoding_sample(name: str) -> None:
    def run(model: Any, cache: Any) -> Any:
        draft = copy.deepcopy(model_of("llama"))
        draft.set_attn_implementation("eager")
        torch.manual_seed(6)
        return generate(
            model, cache, prompt(1, 30), assistant_model=draft, do_sample=True, top_k=20
        )

    model = model_of(name)
    expected = run(model, dynamic(model))
    assert torch.equal(run(model, exact(model)).sequences, expected.sequences)


@croppable
def test_crop_and_regenerate(name: str) -> None:
    """Taking tokens back and going on is the same as never having had them."""
    ids = prompt(1, 30)

    def run(model: Any, cache: Any) -> Any:
        cache.activate_past_recording()
        with torch.no_grad():
            model(ids, past_key_values=cache)
            model(prompt(1, 6, seed=9), past_key_values=cache)
        cache.crop(-6 - 4)
        assert cache.get_seq_length() == 26
        return generate(model, cache, ids)

    compare(name, run)


@models
def test_reuse_of_a_prompt_by_deepcopy(name: str) -> None:
    """One prefill, two answers: the copies do not see each other."""
    ids = prompt(2, 24)

    def run(model: Any, cache: Any) -> Any:
        with torch.no_grad():
            model(ids[:, :20], past_key_values=cache)
        other = copy.deepcopy(cache)
        ends = [prompt(2, 5, seed=s) for s in (7, 8)]
        first = generate(model, cache, torch.cat([ids[:, :20], ends[0]], 1))
        second = generate(model, other, torch.cat([ids[:, :20], ends[1]], 1))
        second.sequences = torch.cat([first.sequences, second.sequences])
        return second

    compare(name, run)


@models
def test_past_key_values_format(name: str) -> None:
    """Every layer counts the tokens of every sequence, and holds no more than its window."""
    model = model_of(name)
    theirs = generate(model, dynamic(model), prompt(2, 40), max_new_tokens=5).past_key_values
    cache = generate(model, exact(model), prompt(2, 40), max_new_tokens=5).past_key_values
    assert len(cache) == len(theirs)
    assert cache.is_sliding == theirs.is_sliding
    for mine, other in zip(cache.layers, theirs.layers, strict=True):
        if not hasattr(mine, "rows"):
            continue
        if not other.is_initialized:
            assert mine.rows == []  # shares the states of another layer
            continue
        assert mine.get_seq_length() == other.get_seq_length() == 44
        assert mine.get_mask_sizes(3) == other.get_mask_sizes(3)
        assert mine.get_max_length() == other.get_max_length()
        window = mine.sliding_window or 1000
        assert len(mine.rows) == mine.batch_size == 2
        for row in mine.rows:
            # What a window hides goes some time after it was packed, a page at a time.
            assert min(44, window) <= len(row) <= min(44, window + 16 + 8 + 64)
            assert row.next_position == 44
            shape = (row.config.num_kv_heads, row.config.head_dim)
            assert shape == (other.keys.shape[1], other.keys.shape[3])


class UnpackedLayer(KvzLayer):  # type: ignore[misc, valid-type]
    """Gives a model the numbers that the packed states read back as, for its own attention."""

    def update(self, key_states: Any, value_states: Any, *args: Any, **kwargs: Any) -> Any:
        keys, _ = super().update(key_states, value_states)
        pairs = [row.get_all_kv() for row in self.rows]
        return tuple(
            torch.stack([torch.from_numpy(pair[side]).transpose(0, 1) for pair in pairs])[
                :, :, -keys.shape[2] :
            ]
            for side in (0, 1)
        )


@models
@pytest.mark.parametrize("store", ["q8", "q4"])
def test_generate_with_quant_cache(name: str, store: str) -> None:
    """Attending to packed bytes loses less than packing did, in the logits of the first token."""
    model, ids = model_of(name), prompt(2, 60)
    fields: dict[str, Any] = {"store_precision": store, "tail_length": 8, "migration_batch": 8}
    plain = generate(model, dynamic(model), ids, max_new_tokens=1).logits[0]
    unpacked = cache_for(model, **fields)
    for layer in unpacked.layers:
        if isinstance(layer, KvzLayer):
            layer.__class__ = UnpackedLayer
    model.set_attn_implementation("eager")
    stored = generate(model, unpacked, ids, max_new_tokens=1).logits[0]
    got = generate(model, cache_for(model, **fields), ids, max_new_tokens=3)
    assert (got.logits[0] - stored).norm() < (stored - plain).norm()
    held = [row for layer in got.past_key_values.stats() for row in layer]
    assert any(now.store_tokens for now in held)


@models
def test_a_forward_pass_without_a_cache(name: str) -> None:
    """Training and scoring run in torch, with the same masks, windows, sinks and caps."""
    ids, mask = padded_prompt()
    model = model_of(name)
    logits = []
    for attention in ("eager", "kvz"):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            logits.append(model(ids, attention_mask=mask, use_cache=False).logits[mask == 1])
    torch.testing.assert_close(logits[1], logits[0], atol=TOLERANCE, rtol=0)
