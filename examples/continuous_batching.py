"""Continuous batching: sequences join the batch when they arrive and leave when they are done.

Every step is one forward pass for all sequences in the batch. One that has just joined brings its
whole prompt, the others bring one token each. Nothing is padded, and the memory of those that
leave is there for those that come.
"""

import numpy as np
from toy_model import forward, new_sequence, prompt

import kvz

# (step at which it arrives, length of its prompt, tokens it wants)
REQUESTS = [(0, 70, 12), (0, 5, 30), (3, 200, 9), (4, 33, 25), (15, 120, 10), (16, 8, 20)]
BATCH_MAX = 4


def decode_alone(number: int) -> list[int]:
    """What a sequence gives that has the model for itself."""
    _, length, wanted = REQUESTS[number]
    ids, written = prompt(length, number), []
    with new_sequence() as sequence:
        while len(written) < wanted:
            (logits,) = forward([ids], [sequence])
            ids = [int(logits[-1].argmax())]
            written += ids
    return written


pool = kvz.BufferPool(max_bytes=1 << 20)
waiting = list(range(len(REQUESTS)))
batch: dict[int, kvz.ModelCache] = {}
pending = {number: prompt(REQUESTS[number][1], number) for number in waiting}
written: dict[int, list[int]] = {number: [] for number in waiting}
step = 0
while waiting or batch:
    while waiting and len(batch) < BATCH_MAX and REQUESTS[waiting[0]][0] <= step:
        batch[waiting.pop(0)] = new_sequence(pool)
    if batch:
        logits = forward([pending[number] for number in batch], list(batch.values()))
        print(
            f"step {step:2}: sequences {[*batch]}, {sum(len(pending[n]) for n in batch)} tokens, "
            f"{pool.stats().bytes_in_use:,} bytes"
        )
        for number, rows in zip([*batch], logits, strict=True):
            pending[number] = [int(np.argmax(rows[-1]))]
            written[number] += pending[number]
            if len(written[number]) == REQUESTS[number][2]:
                batch.pop(number).close()
    step += 1

assert pool.stats().bytes_in_use == 0
same = [written[number] == decode_alone(number) for number in range(len(REQUESTS))]
print(f"{sum(same)} of {len(same)} sequences gave what they give alone, in {step} steps")
