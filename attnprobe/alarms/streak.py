"""How long a rule's condition has held in one layer, and the alarm that comes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from attnprobe.alarms.base import AlarmRule, Reading
from attnprobe.report import Alarm


@dataclass
class Streak:
    """An unbroken series of probes in which a rule fired or, once its alarm stands, held.

    Attributes:
        since: step of the first of these probes.
        reading: the last one that fired or held.
        fired: how many fired in a row.
        quiet: how many probes in a row neither fired nor held, since the alarm stands.
        raised: whether the alarm stands.
        told: whether it was reported as new.
    """

    since: int
    reading: Reading
    fired: int = 0
    quiet: int = 0
    raised: bool = False
    told: bool = False

    def extend(self, reading: Reading) -> None:
        self.reading, self.quiet = reading, 0
        self.fired += reading.firing

    def alarm(
        self, rule: AlarmRule, step: int, evidence: Iterable[tuple[int, float]], *, new: bool, snoozed: bool
    ) -> Alarm:
        reading = self.reading
        return Alarm(
            name=rule.name,
            layer=reading.layer,
            heads=reading.heads,
            step=step,
            since=self.since,
            value=reading.value,
            threshold=reading.threshold,
            advice=f"{reading.detail} {rule.advice}".strip(),
            new=new,
            severity=rule.severity,
            evidence=tuple(evidence),
            snoozed=snoozed,
            reads=rule.needs,
        )

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        state = dataclasses.asdict(self)
        state["reading"]["heads"] = list(self.reading.heads)
        return state

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Streak:
        reading = Reading(**{**state["reading"], "heads": tuple(state["reading"]["heads"])})
        return cls(**{**state, "reading": reading})
