"""What the model is asked: a text, a passage that it has seen before, a needle in a haystack.

Every task is a sequence of tokens and the positions whose predictions count. Called by run.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

from kvz.demo.model import SmolLM2
from kvz.errors import InvalidArgumentError

Kind: TypeAlias = Literal["text", "copy", "needle"]

WARM_UP = 3  # the first third of a window is context only
RECOGNISE = 8  # tokens of a repeated passage until the model can know what it is
CODES = ("70413", "28965", "51937", "84026", "39578")
NEEDLE = "\n\nThe secret code of the {place} is {code}.\n\n"
QUESTION = "\n\nAs was said above, the secret code of the {place} is"
PLACES = ("lighthouse", "castle", "library", "harbour", "garden")


def depths_of(count: int) -> tuple[float, ...]:
    """Spread needles over the haystack.

    Examples
    --------
    >>> depths_of(5)
    (0.1, 0.3, 0.5, 0.7, 0.9)
    """
    return tuple((index + 0.5) / count for index in range(count))


DEPTHS = depths_of(len(CODES))


class Task(NamedTuple):
    """Tokens, and from where on the predictions of the next one are compared.

    Attributes
    ----------
    kind : {"text", "copy", "needle"}
    label : str
        For people.
    ids : list of int
    first : int
        The predictions after the tokens `first`, ..., len(ids) - 2 count: those of the tokens
        ``ids[first + 1 :]``.
    """

    kind: Kind
    label: str
    ids: list[int]
    first: int


def tasks(
    model: SmolLM2, text: str, *, tokens: int, windows: int, depths: Sequence[float] = DEPTHS
) -> list[Task]:
    """Make all tasks out of one text.

    Parameters
    ----------
    model : SmolLM2
        For its tokenizer.
    text : str
    tokens : int
        Length of a task.
    windows : int
        Pieces of the text that are read, evenly spread over it.
    depths : sequence of float
        Where needles are put, 0 being the beginning of the haystack.

    Raises
    ------
    InvalidArgumentError
        The text has fewer than `tokens` tokens, or `tokens` are more than the model takes.
    """
    ids: list[int] = model.tokenizer.encode(text).ids
    if not 64 <= tokens <= min(len(ids), model.shape.max_tokens):
        raise InvalidArgumentError(
            f"tokens: expected 64 to {min(len(ids), model.shape.max_tokens)}, which is what the "
            f"text has and the model takes, got {tokens}"
        )
    found = []
    for window in range(windows):
        start = (len(ids) - tokens) * window // max(windows - 1, 1)
        found.append(
            Task("text", f"text {window + 1}", ids[start : start + tokens], tokens // WARM_UP)
        )
    passage = ids[: tokens // 2]
    found.append(Task("copy", "copy", passage * 2, len(passage) + RECOGNISE - 1))
    haystack = ids[-tokens:]
    needles = zip(depths, PLACES, CODES, strict=False)
    found += [needle(model, haystack, *each) for each in needles]
    return found


def needle(model: SmolLM2, haystack: Sequence[int], depth: float, place: str, code: str) -> Task:
    """Hide a sentence with a code in the haystack, and ask for it at the end.

    The task is as long as the haystack, which loses its last tokens for it.
    """

    def encode(text: str) -> list[int]:
        ids: list[int] = model.tokenizer.encode(text).ids
        return ids

    hidden = encode(NEEDLE.format(place=place, code=code))
    question = encode(QUESTION.format(place=place))
    answer = encode(f" {code}")
    rest = list(haystack[: len(haystack) - len(hidden) - len(question) - len(answer)])
    at = int(len(rest) * depth)
    ids = rest[:at] + hidden + rest[at:] + question + answer
    return Task("needle", f"needle at {depth:.0%}", ids, len(ids) - len(answer) - 1)
