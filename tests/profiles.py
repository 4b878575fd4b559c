"""How hard hypothesis tries: `pytest --hypothesis-profile=long` for a long search.

Imported by conftest.py, before pytest reads that option.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# The machine may be slow, and the fixture `core` only names a core: nothing is shared by examples.
_QUIET = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]

settings.register_profile(
    "kvz",
    max_examples=60,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=_QUIET,
)
settings.register_profile(
    "long",
    settings.get_profile("kvz"),
    max_examples=2000,
    stateful_step_count=100,
    print_blob=True,
)
settings.load_profile("kvz")
