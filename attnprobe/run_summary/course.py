"""Where a number began, where it ended, and what it went through."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnprobe.catalog import STATISTICS
from attnprobe.logs.logged import LoggedRun
from attnprobe.writers.columns import number

#: Of a trend; the same to these digits is no change.
DIGITS = 3
RISE, FALL, SAME = "^", "v", "="


class Course(NamedTuple):
    """Of the probes that measured it, the first and last value, the least and the greatest; NaN where none did."""

    first: NDArray[np.float64]
    last: NDArray[np.float64]
    least: NDArray[np.float64]
    most: NDArray[np.float64]


def course(values: NDArray[np.float64]) -> Course:
    """Of ``values [probes, ...]``; each result is ``[...]``."""
    empty = np.full((1, *values.shape[1:]), np.nan)  # of no probe there is a result as well
    values = np.concatenate([values, empty])
    return Course(_first(values), _first(values[::-1]), np.fmin.reduce(values), np.fmax.reduce(values))


def _first(values: NDArray[np.float64]) -> NDArray[np.float64]:
    index = (~np.isnan(values)).argmax(axis=0)
    return np.asarray(np.take_along_axis(values, index[None], axis=0)[0])


def statistics_of(run: LoggedRun) -> list[str]:
    """The statistics of the run's heads in the order of the catalogue, then those of the user's own."""
    found = set(run.statistics)
    return [name for name in STATISTICS if name in found] + sorted(found - set(STATISTICS))


def probes_of(run: LoggedRun) -> list[int]:
    """The valid probes that measured any layer."""
    layouts = run.source.layouts
    return [
        index for index, probe in enumerate(run.source.probes) if not probe.invalid and layouts[probe.layout].layers
    ]


def values_at(run: LoggedRun, probe: int) -> dict[str, NDArray[np.float64]]:
    """Statistic -> ``[layers, heads]`` at one probe."""
    found = ((name, run.values(name, range(probe, probe + 1))[0]) for name in statistics_of(run))
    return {name: values.astype(np.float64) for name, values in found}


def course_of(run: LoggedRun, name: str) -> Course:
    """``[layers, heads]`` each, of the valid probes."""
    return course(run[name][run.valid])


def brief(value: float) -> str:
    """Three significant digits; ``-`` for what was not measured."""
    return number(value) if np.isnan(value) else f"{value:.{DIGITS}g}"


def trend(first: float, last: float) -> str:
    """``first -> last`` with the way it went, or only ``last`` where ``first`` is unknown."""
    start, end = brief(first), brief(last)
    if np.isnan(first):
        return end
    return f"{start} -> {end} {SAME if start == end else RISE if last > first else FALL}"
