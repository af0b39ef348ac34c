"""Fewer points that draw the same picture."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray


def extremes_kept(values: NDArray[np.floating], most: int) -> NDArray[np.intp]:
    """Which points of a curve to draw: of every stretch its first, smallest, largest and last (M4, Jugel et al. 2014).

    Infinite values count as extremes; a stretch without a number keeps its first point, so that a gap stays a gap.

    Args:
        values: ``[n]``, may hold NaN.
        most: at most so many points, at least 4.

    Returns:
        Ascending indices, all of them where there are no more than ``most``.
    """
    number = len(values)
    if number <= most:
        return np.arange(number)
    edges = np.linspace(0, number, max(1, most // 4) + 1).astype(np.intp)
    stretch = np.repeat(np.arange(len(edges) - 1), np.diff(edges))
    low = np.lexsort((np.nan_to_num(values, nan=np.inf, posinf=np.inf, neginf=-np.inf), stretch))[edges[:-1]]
    high = np.lexsort((np.nan_to_num(-values, nan=np.inf, posinf=np.inf, neginf=-np.inf), stretch))[edges[:-1]]
    return np.unique(np.concatenate([edges[:-1], edges[1:] - 1, low, high]))


def evenly(number: int, most: int, needed: Iterable[int] = ()) -> list[int]:
    """Ascending indices out of ``number``: evenly spaced with both ends, as many as ``most``, and all ``needed``."""
    spaced = np.linspace(0, number - 1, min(number, most)).round().astype(int).tolist() if number else []
    return sorted({*spaced, *needed})
