"""The demo: a real language model in numpy, whose attention is done by kvz.

Read `model.py` first: it is the example of how to put kvz under a model of your own. `evaluate.py`
measures what packing the cache costs in quality, and `run.py` is the command ``kvz demo``.
"""
