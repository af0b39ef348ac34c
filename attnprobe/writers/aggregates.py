"""About fifty scalars of a report, for displays that cannot show one number per head."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from attnprobe.catalog import STATISTICS
from attnprobe.writers.text import printable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from attnprobe.report import StepReport

PREFIX = "attention"
ALARMS = f"{PREFIX}/alarms"

# Core statistics whose curve says nothing that another of the core set does not say.
_REDUNDANT = {"concentration", "value_rms", "advantage_std"}

_KINDS = ("min", "mean", "max")


def aggregates(report: StepReport) -> dict[str, float]:
    """Scalar tag -> value, ready for any logger.

    ``attention/<statistic>/min``, ``mean`` and ``max`` over all heads of all layers; for a statistic of a layer
    ``attention/<statistic>/max`` or ``min``, whichever is worse; ``attention/alarms``, the number of alarms that stand.
    Left out of all this are NaN and infinite values, and a tag for which nothing is left; an invalid report has no
    aggregates. Of the catalogue, the core set and what is on request is aggregated; of a report without these,
    everything. Statistics of the user's own always are.
    """
    if not report.valid:
        return {}
    result: dict[str, float] = {}
    names = [name for name in report.statistics if _chosen(name)] or list(report.statistics)
    for name, ends in zip(names, _ends([report.statistics[name].numpy() for name in names]), strict=True):
        if ends is not None:
            result |= {f"{PREFIX}/{printable(name)}/{kind}": end for kind, end in zip(_KINDS, ends, strict=True)}
    for name, tensor in report.layer.items():
        values = tensor.numpy()
        if (finite := values[np.isfinite(values)]).size:
            kind = worst(name)
            result[f"{PREFIX}/{printable(name)}/{kind}"] = finite.max() if kind == "max" else finite.min()
    return {tag: float(value) for tag, value in result.items()} | {ALARMS: float(len(report.alarms))}


def worst(name: str) -> Literal["min", "max"]:
    """The end of a layer statistic's range that deserves attention."""
    return "max" if name in STATISTICS and STATISTICS[name].better == "low" else "min"


def _ends(tables: list[NDArray[np.float64]]) -> list[tuple[float, ...] | None]:
    """(min, mean, max) of the finite values of each table, None where there are none; all in one go, for speed."""
    if not tables:
        return []
    values = np.stack(tables).reshape(len(tables), -1)
    finite = np.isfinite(values)
    count = finite.sum(1)
    low = np.where(finite, values, np.inf).min(1, initial=np.inf)
    mean = np.where(finite, values, 0).sum(1) / np.maximum(count, 1)
    high = np.where(finite, values, -np.inf).max(1, initial=-np.inf)
    columns = zip(low.tolist(), mean.tolist(), high.tolist(), strict=True)
    return [ends if number else None for ends, number in zip(columns, count.tolist(), strict=True)]


def _chosen(name: str) -> bool:
    entry = STATISTICS.get(name)
    return entry is None or entry.on_request or (entry.core and name not in _REDUNDANT)
