"""Fidelity: what packing the cache costs a real model, for every format, beside the peers' formats.

`run.py` is the command ``kvz eval``. It asks `tasks.py` for token sequences, runs each through the
demo's model with the caches of `streams.py`, compares the predictions with those of an exact cache
in `measure.py`, and shows the outcome with `report.py` and `plot.py`. `peers.py` has the formats of
other projects, simulated.
"""
