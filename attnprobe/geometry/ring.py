"""Whether points lie on a ring in the order of a phase."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from attnprobe.errors import ConfigurationError
from attnprobe.geometry.points import ROUNDING, Array, Numbers, as_points, as_variable, varies

#: Phases in the same one of so many equal parts of a turn are one class. A power of 2: the phases of a ring of 2^k
#: symbols lie in the middle of such parts, where rounding cannot move them to the next.
_PARTS = 2**20


@dataclass(frozen=True)
class RingFit:
    """How much of the class means' variance goes round with the phase.

    Attributes:
        r2: share of the variance that ``cos`` and ``sin`` of the phase explain, 0 to 1.
        order: share of the pairs next to each other round the means' first two principal components whose phases are
            next to each other as well, 0 to 1. Direction does not count.
        chance: what to expect of either for points that have nothing to do with the phase, ``2 / (classes - 1)``.
        classes: how many different phases there are.
        reason: why numbers are NaN; ``""`` where none is.
    """

    r2: float = math.nan
    order: float = math.nan
    chance: float = math.nan
    classes: int = 0
    reason: str = ""


def ring_fit(points: Numbers, phase: Numbers, *, weights: Literal["equal", "counts"] = "equal") -> RingFit:
    """Fit the first harmonic of ``phase`` to the points.

    Points of one phase are a class, and only class means are looked at: noise around them does not count. Where every
    phase is different each point is its own mean.

    Args:
        points: ``[n, E]``.
        phase: ``[n]``, radians; ``2 pi y / C`` for symbol ``y`` of ``C`` on a ring.
        weights: of the classes, ``"equal"`` or by ``"counts"`` of points.

    Returns:
        NaN with a reason for fewer than four phases, which three parameters fit whatever they are, and where the
        means do not differ.

    Raises:
        ConfigurationError: NaN or Inf, a shape or an option that cannot work.
    """
    points = as_points(points)
    phase = as_variable(phase, len(points), "phase")
    if weights not in ("equal", "counts"):
        raise ConfigurationError(f"weights must be 'equal' or 'counts', got {weights!r}")
    means, phases, counts = _classes(points, phase)
    classes = len(phases)
    if classes < 4:
        return RingFit(classes=classes, reason=f"undefined: {classes} phases are fitted exactly whatever they are")
    if not varies(means):
        return RingFit(classes=classes, reason="undefined: the class means do not differ")
    share = counts / counts.sum() if weights == "counts" else np.full(classes, 1 / classes)
    root = np.sqrt(share)[:, None]
    centred = root * (means - share @ means)
    # The constant is a column of the design, so the fit explains nothing but what is left of it.
    design = root * np.stack([np.ones(classes), np.cos(phases), np.sin(phases)], 1)
    fitted = design @ np.linalg.lstsq(design, centred, rcond=None)[0]
    r2 = float(np.sum(fitted**2) / np.sum(centred**2))
    order = _order(centred, centred / root)
    reason = "order undefined: on a line there is no way round" if math.isnan(order) else ""
    return RingFit(min(r2, 1.0), order, 2 / (classes - 1), classes, reason)


def _classes(points: Array, phase: Array) -> tuple[Array, Array, Array]:
    """Means ``[C, E]``, phases ``[C]``, ascending, and counts ``[C]`` of the different phases."""
    part = np.round(phase / (2 * math.pi) * _PARTS) % _PARTS
    _, first, label, counts = np.unique(part, return_index=True, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), points.shape[1]))
    np.add.at(sums, label, points)
    return sums / counts[:, None], phase[first], counts.astype(np.float64)


def _order(weighted: Array, means: Array) -> float:
    _, size, axes = np.linalg.svd(weighted, full_matrices=False)
    if len(size) < 2 or size[1] <= ROUNDING * size[0]:
        return math.nan
    first, second = (means @ axes[:2].T).T
    round_trip = np.argsort(np.arctan2(second, first))
    step = (np.roll(round_trip, -1) - round_trip) % len(means)
    return float(np.isin(step, (1, len(means) - 1)).mean())
