"""The tokenizer inside a GGUF file, as a `tokenizers.Tokenizer`. Called by model.py."""

from __future__ import annotations

from gguf import GGUFReader
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

CONTROL = 3  # the token type of tokens that are never text, such as <|im_start|>
INCOMPLETE = "\N{REPLACEMENT CHARACTER}"  # what half a character decodes to


def tokenizer_from_gguf(reader: GGUFReader) -> Tokenizer:
    """Byte-level BPE as SmolLM2 has it: every digit is a word of its own.

    Parameters
    ----------
    reader : gguf.GGUFReader
        A file whose `tokenizer.ggml.pre` is "smollm".

    Returns
    -------
    tokenizers.Tokenizer

    Raises
    ------
    ValueError
        The file has another kind of tokenizer.
    """
    names = ("model", "pre", "tokens", "token_type", "merges")
    fields = [reader.get_field(f"tokenizer.ggml.{name}") for name in names]
    model, pre, tokens, types, merges = (field and field.contents() for field in fields)
    if (model, pre) != ("gpt2", "smollm"):
        raise ValueError(f"expected a tokenizer of kind gpt2, smollm; the file has {model}, {pre}")
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, type_ in zip(tokens, types, strict=True) if type_ == CONTROL]
    tokenizer.add_special_tokens(control)
    return tokenizer


class TextStream:
    """Text of tokens as they come: half a character waits for its other half."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """Return the text that `token` completes; it may be empty."""
        self._waiting.append(token)
        text: str = self._tokenizer.decode(self._waiting)
        if text.endswith(INCOMPLETE):
            return ""
        self._waiting.clear()
        return text
