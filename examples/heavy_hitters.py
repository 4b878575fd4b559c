"""Heavy hitters (H2O, Zhang et al. 2023): keep what attention looks at, not only what is new.

Every step tells how much attention each token got (`return_mass`). The policy adds that up, and
when the cache holds more than its budget it evicts the packed pages that got least. A token that
matters all along survives, where a plain window of the same size has long forgotten it.
"""

import numpy as np

import kvz

BUDGET, PAGE, STEPS, HEADS, HEAD_DIM = 512, 64, 1500, 2, 64


class HeavyHitters:
    """Evicts the pages of a cache that got least attention.

    Parameters
    ----------
    budget : int
        Tokens that the cache may hold after `step`.
    page : int
        Tokens that go together; whole pages are what gives memory back.
    """

    def __init__(self, budget: int, page: int = 64) -> None:
        self.budget, self.page = budget, page
        self.scores = np.zeros(0)  # by position: attention of late

    def step(self, cache: kvz.TwoTierCache, mass: np.ndarray) -> None:
        """Take in the mass (query heads, tokens) of the newest attention; evict if need be."""
        positions = cache.positions
        if cache.next_position > len(self.scores):
            grown = np.zeros(2 * cache.next_position)
            grown[: len(self.scores)] = self.scores
            self.scores = grown
        self.scores *= 0.99  # what mattered long ago fades, so that age is no merit
        self.scores[positions] += mass.sum(axis=0)
        while len(cache) > self.budget:
            evictable = cache.evictable
            # The newest page that can be evicted has had no time to be looked at.
            pages = np.unique(evictable // self.page)[:-1]
            totals = [self.scores[p * self.page : (p + 1) * self.page].sum() for p in pages]
            if not totals:
                return
            cache.evict(evictable[evictable // self.page == pages[np.argmin(totals)]])


shape = {"num_kv_heads": HEADS, "head_dim": HEAD_DIM, "tail_length": 64, "sink_tokens": 4}
full = kvz.TwoTierCache(**shape)
window = kvz.TwoTierCache(**shape, max_tokens=BUDGET)
hitters = kvz.TwoTierCache(**shape)
policy = HeavyHitters(BUDGET, PAGE)

rng = np.random.default_rng(0)
topic = rng.standard_normal((HEADS, HEAD_DIM)).astype(np.float32)
errors = {"window": [], "heavy hitters": []}
for step in range(STEPS):
    keys, values = rng.standard_normal((2, HEADS, HEAD_DIM)).astype(np.float32)
    query = 0.5 * rng.standard_normal((HEADS, HEAD_DIM)).astype(np.float32)
    if step % 300 == 100:  # now and then comes a token that everything later looks back to
        keys = keys + topic
    query += 0.9 * topic
    for cache in (full, window, hitters):
        cache.append(keys, values)
    exact = full.attend(query)
    out, mass = hitters.attend(query, return_mass=True)
    policy.step(hitters, mass)
    for name, got in (("window", window.attend(query)), ("heavy hitters", out)):
        errors[name].append(np.linalg.norm(got - exact) / np.linalg.norm(exact))

print(f"full {len(full)} tokens, window {len(window)}, heavy hitters {len(hitters)}")
for name, each in errors.items():
    print(f"{name:14} error of the last 500 steps: {np.mean(each[-500:]):.3f}")
marked = np.arange(100, STEPS, 300)
print(
    "kept of the tokens that matter:", np.isin(marked, hitters.positions).sum(), "of", len(marked)
)
print("better than the window:", np.mean(errors["heavy hitters"]) < np.mean(errors["window"]))
