"""The ends of a statistic's numbers over a run that grows."""

from __future__ import annotations

import numpy as np

from attnprobe.logs.logged import LoggedRun
from attnprobe.view.answers import BLOCK, frames


class Limits:
    """``low`` and ``high`` of all finite numbers, and the smallest that is positive; every probe is read once.

    Args:
        name: the statistic.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._clear(None)

    def _clear(self, probes: object) -> None:
        self._probes = probes
        self._read = 0
        self._low = self._high = self._positive = np.nan

    def of(self, run: LoggedRun) -> dict[str, float]:
        """They of one run, always the same; NaN where there is none.

        Raises:
            UnknownNameError: no probe of this run holds that statistic.
            OSError: a file of the run is gone.
        """
        # A source whose known probes changed, as those of a resumed run do, begins another list.
        if run.source.probes is not self._probes:
            self._clear(run.source.probes)
        while self._read < len(run):
            values = frames(run, self.name, self._read, self._read + BLOCK)
            values = values[np.isfinite(values)]
            if values.size:
                self._low = np.fmin(self._low, values.min())
                self._high = np.fmax(self._high, values.max())
            if (positive := values[values > 0]).size:
                self._positive = np.fmin(self._positive, positive.min())
            self._read = min(len(run), self._read + BLOCK)
        return {"low": float(self._low), "high": float(self._high), "positive": float(self._positive)}
