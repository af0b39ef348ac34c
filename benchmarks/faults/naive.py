"""Rules that one writes in five minutes, for comparison: each gives the steps at which it fires."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import numpy as np

from attnprobe.report import StepReport
from benchmarks.faults.train import Run

LOW, HIGH = 0.1, 0.9
TIMES = 10
#: Steps without which a median says nothing.
ENOUGH = 20
#: A spike is a loss so many standard deviations above the mean of the last hundred.
SPIKE, PAST = 4.0, 100


def sharp(run: Run) -> list[int]:
    """Normalised entropy of some head below 0.1."""
    return _probes(run.reports, lambda entropy: bool((entropy < LOW).any()))


def diffuse(run: Run) -> list[int]:
    """Normalised entropy of some head above 0.9."""
    return _probes(run.reports, lambda entropy: bool((entropy > HIGH).any()))


def large_gradient(run: Run) -> list[int]:
    """Gradient norm above ten times the median so far."""
    return _steps(run.gradients, lambda past, now: now > TIMES * median(past) if len(past) >= ENOUGH else False)


def loss_spike(run: Run) -> list[int]:
    """Loss four standard deviations above the mean of the last hundred steps."""

    def spikes(past: Sequence[float], now: float) -> bool:
        recent = past[-PAST:]
        return len(recent) >= ENOUGH and bool(now > np.mean(recent) + SPIKE * np.std(recent))

    return _steps(run.losses, spikes)


NAIVE: dict[str, Callable[[Run], list[int]]] = {
    "entropy < 0.1": sharp,
    "entropy > 0.9": diffuse,
    "gradient > 10 x median": large_gradient,
    "loss spike": loss_spike,
}


def _probes(reports: Sequence[StepReport], fires: Callable[..., bool]) -> list[int]:
    return [r.step for r in reports if "normalized_entropy" in r and fires(r["normalized_entropy"])]


def _steps(values: Sequence[float], fires: Callable[[Sequence[float], float], bool]) -> list[int]:
    """One that is not finite fires."""
    return [step for step, value in enumerate(values) if not np.isfinite(value) or fires(values[:step], value)]
