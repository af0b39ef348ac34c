"""Means over seeds, with 95% confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean over seeds; ``low`` and ``high`` bound it with 95% confidence (Student's t), NaN for a single seed.

    Attributes:
        mean, std: over the seeds that have a value (``std`` with n - 1).
        low, high: the interval.
        count, of: seeds with a value, and all seeds.
    """

    mean: float
    std: float
    low: float
    high: float
    count: int
    of: int

    @classmethod
    def over(cls, values: Iterable[float | None]) -> Interval:
        """Of one value per seed; None or NaN where a seed has none."""
        given = [math.nan if value is None else float(value) for value in values]
        known = np.array([value for value in given if not math.isnan(value)])
        n = len(known)
        mean = float(known.mean()) if n else math.nan
        std = float(known.std(ddof=1)) if n > 1 else math.nan
        half = float(stats.t.ppf(0.975, n - 1)) * std / math.sqrt(n) if n > 1 else math.nan
        return cls(mean, std, mean - half, mean + half, n, len(given))

    def text(self, digits: int = 3) -> str:
        """``0.500 [0.450, 0.550]``, with how many seeds have a value where some have none."""
        if not self.count:
            return f"none of {self.of}"
        missing = "" if self.count == self.of else f" ({self.count} of {self.of})"
        if self.count == 1:
            return f"{self.mean:.{digits}f}{missing}"
        return f"{self.mean:.{digits}f} [{self.low:.{digits}f}, {self.high:.{digits}f}]{missing}"

    def short(self, digits: int = 4) -> str:
        """``0.5000 +-0.0500``: the mean and half the interval."""
        if not self.count:
            return f"none of {self.of}"
        half = "" if math.isnan(self.high) else f" +-{self.high - self.mean:.{digits}f}"
        missing = "" if self.count == self.of else f" ({self.count} of {self.of})"
        return f"{self.mean:.{digits}f}{half}{missing}"

    def to_dict(self) -> dict[str, Any]:
        """For JSON: None where undefined."""
        return {name: None if isinstance(x, float) and math.isnan(x) else x for name, x in asdict(self).items()}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Interval:
        """What ``to_dict`` made, other keys aside."""
        mean, std, low, high = (
            math.nan if found[name] is None else float(found[name]) for name in ("mean", "std", "low", "high")
        )
        return cls(mean, std, low, high, found["count"], found["of"])


def differences(left: Iterable[float | None], right: Iterable[float | None]) -> list[float | None]:
    """One minus another, seed by seed; None where either has none."""
    return [None if a is None or b is None else a - b for a, b in zip(left, right, strict=True)]


def first_below(losses: Sequence[float] | np.ndarray[Any, Any], threshold: float) -> int | None:
    """The first step before which the loss is below ``threshold``."""
    below = np.flatnonzero(np.asarray(losses) < threshold)
    return int(below[0]) if below.size else None
