"""Continuous batching with a real model: questions join the batch as they come, answers leave it.

Needs `pip install "kvz[demo]"`. Every step is one forward pass over all sequences in the batch: one
that has just joined brings its whole prompt, the others one token each. Nothing is padded.
"""

import numpy as np

import kvz
from kvz.demo import fetch
from kvz.demo.run import load_model

# (step at which it arrives, the question)
REQUESTS = [
    (0, "What is the capital of France?"),
    (0, "Name three colours."),
    (4, "Write one sentence about the sea."),
    (6, "How many days has a week?"),
    (9, "What do bees make?"),
]
BATCH_MAX = 3
TOKENS_MAX = 24

model = load_model(fetch.model_path())
shape = model.shape
stop = model.tokenizer.token_to_id("<|im_end|>")


def prompt(question: str) -> list[int]:
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    return list(model.tokenizer.encode(text).ids)


def new_sequence(pool: kvz.BufferPool | None = None) -> kvz.ModelCache:
    return kvz.ModelCache(
        kvz.CacheConfig(
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            max_tokens=512,
            tail_length=16,
            migration_batch=16,
            sink_tokens=4,
            store_precision=("q8", "q4"),
        ),
        shape.num_layers,
        pool=pool,
    )


def answer_alone(question: str) -> list[int]:
    """Answer with the model for oneself."""
    ids, answer = prompt(question), list[int]()
    with new_sequence() as sequence:
        while ids[-1] != stop and len(answer) < TOKENS_MAX:
            (logits,) = model.forward_many([ids], [sequence])
            ids = [int(logits.argmax())]
            answer += ids
    return answer


pool = kvz.BufferPool()
waiting = list(range(len(REQUESTS)))
batch: dict[int, kvz.ModelCache] = {}
pending = {number: prompt(question) for number, (_, question) in enumerate(REQUESTS)}
answers: dict[int, list[int]] = {number: [] for number in waiting}
step = 0
while waiting or batch:
    while waiting and len(batch) < BATCH_MAX and REQUESTS[waiting[0]][0] <= step:
        batch[waiting.pop(0)] = new_sequence(pool)
    if batch:
        logits = model.forward_many([pending[number] for number in batch], list(batch.values()))
        tokens = sum(len(pending[number]) for number in batch)
        held = pool.stats().bytes_in_use
        print(f"step {step:2}: sequences {[*batch]}, {tokens} tokens, {held:,} bytes")
        for number, row in zip([*batch], logits, strict=True):
            pending[number] = [int(np.argmax(row))]
            answers[number] += pending[number]
            if pending[number] == [stop] or len(answers[number]) == TOKENS_MAX:
                batch.pop(number).close()
    step += 1

for number, (_, question) in enumerate(REQUESTS):
    print(f"{question} {model.tokenizer.decode(answers[number])!r}")
same = [answers[number] == answer_alone(question) for number, (_, question) in enumerate(REQUESTS)]
print(f"{sum(same)} of {len(same)} answers are those given alone, in {step} steps")
