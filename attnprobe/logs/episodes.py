"""Alarms over time: from the probe that raised one to the last probe at which it stood."""

from __future__ import annotations

import math
from collections.abc import Iterable

from attnprobe.report import Alarm


class Episode:
    """One alarm in one layer.

    Attributes:
        first, last: the alarm when it was raised, and at the last probe at which it stood.
        peak: the alarm whose value went furthest over the threshold, in the direction in which the first one did.
        heads: every head that was concerned.
        standing: whether it stands at the last probe of the run.
    """

    def __init__(self, alarm: Alarm) -> None:
        self.first = self.last = self.peak = alarm
        self.heads = set(alarm.heads)
        self.standing = True
        self._below = alarm.value < alarm.threshold

    def extend(self, alarm: Alarm) -> None:
        self.last = alarm
        self.heads.update(alarm.heads)
        if math.isnan(self.peak.value):
            self.peak, self._below = alarm, alarm.value < alarm.threshold
        elif alarm.value < self.peak.value if self._below else alarm.value > self.peak.value:
            self.peak = alarm


class Episodes:
    """Every alarm of a run, layer by layer, in the order raised; one that was cleared and raised again is two."""

    def __init__(self, probes: Iterable[Iterable[Alarm]] = ()) -> None:
        self.found: list[Episode] = []
        self._standing: dict[tuple[str, str], Episode] = {}
        for alarms in probes:
            self.add(alarms)

    def add(self, alarms: Iterable[Alarm]) -> None:
        """The alarms that stand after the next probe."""
        before, self._standing = self._standing, {}
        for alarm in alarms:
            key = (alarm.name, alarm.layer)
            if episode := before.pop(key, None):
                episode.extend(alarm)
            else:
                self.found.append(episode := Episode(alarm))
            self._standing[key] = episode
        for episode in before.values():
            episode.standing = False
