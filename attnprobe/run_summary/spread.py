"""How far values lie apart, in a measure that a few odd ones do not move."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

#: Times its median absolute deviation, or its mean one, a normal distribution has its standard deviation.
MEDIAN_DEVIATION, MEAN_DEVIATION = 1.4826, 1.2533
#: Least width relative to the typical size: values that are closer than this are practically the same.
FLOOR = 0.01
#: Of distances. What is smaller is rounding, which differs between float32 and float64 logs.
DECIMALS = 3


class Spread(NamedTuple):
    """Centre and width of the finite values among some: NaN where there are none, width 0 where all are equal."""

    median: float
    width: float

    def measure(self, difference: NDArray[np.float64]) -> NDArray[np.float64]:
        """Absolute differences in widths, to three decimals; infinite for an infinite one, NaN for NaN."""
        with np.errstate(over="ignore", invalid="ignore"):
            return np.round(np.abs(difference) / (self.width if self.width > 0 else 1.0), DECIMALS)


def spread(values: NDArray[np.float64]) -> Spread:
    """Median, and 1.4826 times the median absolute deviation from it, of what is finite in an array of any shape.

    That is 0 where more than half of the values are equal: then it is 1.2533 times the mean absolute deviation
    (Iglewicz and Hoaglin, How to Detect and Handle Outliers, 1993). It is not below 1% of the median absolute value.
    """
    finite = values[np.isfinite(values)]
    if not finite.size:
        return Spread(np.nan, np.nan)
    with np.errstate(over="ignore"):
        median = float(np.median(finite))
        deviations = np.abs(finite - median)
        width = MEDIAN_DEVIATION * float(np.median(deviations)) or MEAN_DEVIATION * float(deviations.mean())
        least = FLOOR * float(np.median(np.abs(finite)))
    return Spread(median, max(width, least) if width else 0.0)


def difference(a: NDArray[np.float64], b: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """``a - b``; NaN where either is, and where both are the same infinity."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.subtract(a, b)
