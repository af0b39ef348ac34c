"""Interleaved comparison: all candidates run in turn in every round, so that what disturbs the machine disturbs all.

Times are CPU seconds of one thread. Ratios are taken within a round; their median and quartiles are reported.
"""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

Candidate = TypeVar("Candidate")


@dataclass(frozen=True)
class Spread:
    """A median and its quartiles."""

    median: float
    lower: float
    upper: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        lower, median, upper = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, lower, upper)

    def scaled(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.lower * factor, self.upper * factor)


@dataclass(frozen=True)
class Comparison:
    """CPU seconds of every candidate in every round.

    Attributes:
        seconds: per candidate, one number per round.
        baseline: the candidate that ratios are relative to.
    """

    seconds: Mapping[str, list[float]]
    baseline: str

    def median(self, name: str) -> float:
        """CPU seconds per call."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, baseline: str | None = None) -> Spread:
        """CPU time relative to the baseline's in the same round."""
        base = self.seconds[baseline or self.baseline]
        return Spread.of([mine / other for mine, other in zip(self.seconds[name], base, strict=True)])


def cpu_seconds(call: Callable[[], object]) -> float:
    """CPU time of one call, with the garbage of what ran before collected."""
    gc.collect()
    start = time.process_time()
    call()
    return time.process_time() - start


def compare(
    candidates: Mapping[str, Candidate],
    repeats: int,
    *,
    baseline: str | None = None,
    warmup: int = 1,
    clock: Callable[[Candidate], float] = cpu_seconds,  # type: ignore[assignment]
) -> Comparison:
    """Run every candidate once per round, in an order that is drawn anew for each.

    Args:
        candidates: name -> what to run.
        repeats: rounds that count.
        baseline: name of the candidate that ratios are relative to; the first one if not given.
        warmup: rounds before, which do not count.
        clock: runs a candidate and returns its CPU seconds.
    """
    torch.set_num_threads(1)
    names, generator = [*candidates], random.Random(0)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()  # what is there now need not be looked at again
    try:
        for turn in range(-warmup, repeats):
            for name in generator.sample(names, len(names)):
                elapsed = clock(candidates[name])
                if turn >= 0:
                    seconds[name].append(elapsed)
    finally:
        gc.unfreeze()
    return Comparison(seconds, baseline or names[0])
