"""What became of a run's loss beside that of its healthy twin: by this, and not by any alarm, a run is judged."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: Steps over which losses are averaged.
WINDOW = 10
#: Half the band's width: so many standard errors of the twin's mean loss, at least this share of the
#: loss that the twin began with.
DEVIATIONS, LEAST = 3.0, 0.05
#: Steps that a loss has to stay out.
FOR_SOME_TIME = 30
#: Steps by which the end of a run is judged.
LAST = 50


def leaves_band(losses: Sequence[float], twin: Sequence[float], start: int = 0) -> int | None:
    """The first step, from ``start`` on, from which the average loss is out of the twin's band for some time.

    Up to its injection a run is bit for bit its twin. Below the band counts as out of it: a model that sees the
    future learns too well. A loss that is not finite is out. None if it never leaves.
    """
    faulty, healthy = np.asarray(losses, float), np.asarray(twin, float)
    mean, error = _rolling(healthy)
    half = np.maximum(DEVIATIONS * error, LEAST * healthy[:WINDOW].mean())
    with np.errstate(invalid="ignore"):
        outside = ~(np.abs(_rolling(faulty)[0] - mean) <= half)
    for window in range(max(0, start - WINDOW + 1), len(outside) - FOR_SOME_TIME + 1):
        if outside[window : window + FOR_SOME_TIME].all():
            return window + WINDOW - 1
    return None


def ends_above(losses: Sequence[float], twin: Sequence[float]) -> bool:
    """Whether the mean over the last fifty steps is above the band, or not finite: the run ends worse."""
    faulty, healthy = np.asarray(losses[-LAST:], float), np.asarray(twin[-LAST:], float)
    half = max(DEVIATIONS * float(healthy.std()) / LAST**0.5, LEAST * float(np.mean(twin[:WINDOW])))
    with np.errstate(invalid="ignore", over="ignore"):
        return not float(faulty.mean()) - float(healthy.mean()) <= half


def _rolling(losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean of every window, and its standard error."""
    windows = np.lib.stride_tricks.sliding_window_view(losses, WINDOW)
    with np.errstate(invalid="ignore", over="ignore"):
        return windows.mean(-1), windows.std(-1) / WINDOW**0.5
