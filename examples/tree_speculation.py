"""Speculative decoding with a tree of drafts: the model checks several guesses in one pass.

Each branch of the tree is a fork of the sequence, so all of them are read in one batch. The longest
run of guesses that the model agrees with is accepted. The sequence itself never sees the others:
its state is, to the bit, that of a sequence which was given the accepted tokens and nothing else.
"""

import numpy as np
from toy_model import forward, new_sequence, prompt

BRANCHES, DEPTH, TOKENS = 3, 4, 60


def decode_plain(ids: list[int], count: int) -> list[int]:
    """Token by token: what speculation has to arrive at."""
    sequence, written = new_sequence(), []
    while len(written) < count:
        (logits,) = forward([ids], [sequence])
        ids = [int(logits[-1].argmax())]
        written += ids
    return written


text = prompt(90, 5)
expected = decode_plain(text, TOKENS)
rng = np.random.default_rng(0)


def guess(written: list[int]) -> list[list[int]]:
    """Stand for a draft model that is right most of the time."""
    branches = []
    for _ in range(BRANCHES):
        truth = expected[len(written) : len(written) + DEPTH]
        wrong = rng.random(len(truth)) < 0.25
        branches.append([(t + int(w)) % 256 for t, w in zip(truth, wrong, strict=True)])
    return branches


sequence = new_sequence()
(logits,) = forward([text], [sequence])
written = [int(logits[-1].argmax())]
accepted: list[list[int]] = []
while len(written) < TOKENS:
    # The newest token is not in the cache yet: it comes before every guess.
    drafts = [[written[-1], *branch] for branch in guess(written)]
    branches = [sequence.fork() for _ in drafts]
    checked = [rows.argmax(-1).tolist() for rows in forward(drafts, branches)]
    # Where the model, after the tokens so far, says what the draft says next, it is accepted.
    agreed = [
        next((i for i, (a, b) in enumerate(zip(draft[1:], said, strict=False)) if a != b), DEPTH)
        for draft, said in zip(drafts, checked, strict=True)
    ]
    best = int(np.argmax(agreed))
    count = min(agreed[best], TOKENS - len(written) - 1, len(drafts[best]) - 1)
    accepted.append(drafts[best][: count + 1])
    forward([accepted[-1]], [sequence])
    written += [*drafts[best][1 : count + 1], checked[best][count]]
    for branch in branches:
        branch.close()

again = new_sequence()
for ids in [text, *accepted]:
    forward([ids], [again])
print(f"{TOKENS} tokens in {len(accepted)} passes of {BRANCHES} branches")
print("same tokens:", written == expected)
print("same state:", sequence.digest() == again.digest())
