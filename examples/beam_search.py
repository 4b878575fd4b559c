"""Beam search: each step keeps the best continuations, wherever they come from.

`reorder` takes the beams to the caches of their parents: the first child goes on with the cache
itself, the others with forks, and what no child needs is closed. The prompt is there once.
"""

import numpy as np
from toy_model import VOCABULARY, forward, log_probabilities, new_sequence, prompt

import kvz

BEAMS, STEPS = 4, 20

pool = kvz.BufferPool()
root = new_sequence(pool)
(logits,) = forward([prompt(100, 1)], [root])
prompt_bytes = pool.stats().bytes_in_use

beams = [root]
scores = np.zeros(1)
texts: list[list[int]] = [[]]
rows = logits[-1:]
for _ in range(STEPS):
    totals = scores[:, None] + log_probabilities(rows)  # (beams, VOCABULARY)
    best = np.argsort(-totals, axis=None)[:BEAMS]
    parents, tokens = best // VOCABULARY, best % VOCABULARY
    beams = kvz.reorder(beams, parents.tolist())
    scores = totals.flat[best]
    texts = [[*texts[p], int(t)] for p, t in zip(parents, tokens, strict=True)]
    rows = np.concatenate(forward(tokens[:, None], beams))

for score, text in zip(scores, texts, strict=True):
    print(f"{score:8.3f}", *text)
taken = sum(beam.nbytes for beam in beams)
print(
    f"{BEAMS} beams hold {taken:,} bytes, of which the pool has {pool.stats().bytes_in_use:,}; "
    f"the prompt takes {prompt_bytes:,}"
)

# The best beam is the sequence that its tokens alone would have made.
again = new_sequence()
forward([prompt(100, 1)], [again])
for token in texts[0]:
    forward([[token]], [again])
print("best beam is exact:", again.digest() == beams[0].digest())
