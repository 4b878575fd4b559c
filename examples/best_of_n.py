"""Best of n: several samples from one prompt, which is read once and shared by all.

The samples are forks of the prompt's cache and are decoded as one batch.
"""

import numpy as np
from toy_model import VOCABULARY, forward, log_probabilities, new_sequence, prompt

import kvz

SAMPLES, STEPS = 6, 24

rng = np.random.default_rng(3)
pool = kvz.BufferPool()
root = new_sequence(pool)
(logits,) = forward([prompt(300, 2)], [root])
prompt_bytes = pool.stats().bytes_in_use

samples = [root.fork() for _ in range(SAMPLES)]
rows = np.repeat(logits[-1:], SAMPLES, axis=0)
scores = np.zeros(SAMPLES)
texts: list[list[int]] = [[] for _ in samples]
for _ in range(STEPS):
    chances = log_probabilities(rows)  # (SAMPLES, VOCABULARY)
    tokens = [int(rng.choice(VOCABULARY, p=np.exp(row) / np.exp(row).sum())) for row in chances]
    scores += chances[range(SAMPLES), tokens]
    for text, token in zip(texts, tokens, strict=True):
        text.append(token)
    rows = np.concatenate(forward([[token] for token in tokens], samples))

best = int(scores.argmax())
for i, (score, text) in enumerate(zip(scores, texts, strict=True)):
    print("*" if i == best else " ", f"{score:8.2f}", *text)
own = [sample.stats().own_bytes for sample in samples]
print(f"prompt: {prompt_bytes:,} bytes, once; of their own the samples have {sum(own):,}")
for i, sample in enumerate(samples):
    if i != best:
        sample.close()
root.close()
print("kept:", samples[best])
