"""Property tests that find the same examples wherever they run."""

from __future__ import annotations

from hypothesis import HealthCheck, settings


def reproducible(examples: int) -> settings:
    """The same examples in every run, and no complaint about slow machines."""
    return settings(
        max_examples=examples,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )
