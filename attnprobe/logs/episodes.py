"""Alarms over time: from the probe that raised one to the last probe at which it stood."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import Any

from attnprobe.report import Alarm

#: Turns of an episode that are remembered.
TURNS = 200


class Episode:
    """One alarm in one layer.

    Attributes:
        first, last: the alarm when it was raised, and at the last probe at which it stood.
        peak: the alarm whose value went furthest over the threshold, in the direction in which the first one did.
        heads: every head that was concerned.
        turns: (step, heads) wherever other heads were concerned than at the probe before, the latest ones.
        standing: whether it stands at the last probe of the run.
    """

    def __init__(self, alarm: Alarm) -> None:
        self.first = self.last = self.peak = alarm
        self.heads = set(alarm.heads)
        self.turns = deque([(alarm.step, alarm.heads)], TURNS)
        self.standing = True
        self._below = alarm.value < alarm.threshold

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON; without the peak's value, the turns and what the rule reads."""
        return {
            "name": self.first.name,
            "severity": self.last.severity,
            "layer": self.first.layer,
            "heads": sorted(self.heads),
            "since": self.first.since,
            "raised": self.first.step,
            "last": self.last.step,
            "standing": self.standing,
            "threshold": self.peak.threshold,
            "advice": self.last.advice,
            "evidence": self.last.evidence,
            "snoozed": self.last.snoozed,
        }

    def extend(self, alarm: Alarm) -> None:
        if alarm.heads != self.last.heads:
            self.turns.append((alarm.step, alarm.heads))
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
