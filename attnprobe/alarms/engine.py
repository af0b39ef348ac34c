"""From readings to alarms: patience, warm-up, hysteresis, and rules that crash."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections import deque
from collections.abc import Iterable, Set
from dataclasses import dataclass
from typing import Any

from attnprobe.alarms.base import AlarmRule, Reading
from attnprobe.alarms.history import History
from attnprobe.alarms.nonfinite import NonFinite
from attnprobe.alarms.streak import Streak
from attnprobe.errors import ConfigurationError, UnknownNameError
from attnprobe.report import Alarm, StepReport

#: Readings that an alarm shows.
EVIDENCE = 8
Evidence = deque[tuple[int, float]]


@dataclass(frozen=True)
class Snooze:
    """Which alarms keep quiet: glob patterns of the name and the layer, up to a step."""

    name: str
    layers: str
    until: int

    def covers(self, name: str, layer: str) -> bool:
        # A pattern may match the name: what is not finite is told all the same.
        if name == NonFinite.name:
            return False
        return fnmatch.fnmatchcase(name, self.name) and fnmatch.fnmatchcase(layer, self.layers)


class AlarmEngine:
    """Feeds reports to rules and says which alarms stand.

    Args:
        rules: with different names; see ``resolve``.
        uninformed_loss: loss of a model that knows nothing of the input; None where unknown.
        strict: raise what a rule raises, instead of switching the rule off.

    Attributes:
        failures: ``(rule name, exception)`` of each rule that was switched off; the reader may clear it.
    """

    def __init__(
        self, rules: Iterable[AlarmRule], *, uninformed_loss: float | None = None, strict: bool = False
    ) -> None:
        self.rules = tuple(rules)
        self.history = History(uninformed_loss, {name for rule in self.rules for name in rule.remembers})
        self.strict = strict
        self.failures: list[tuple[str, Exception]] = []
        self._off: set[str] = set()
        self._streaks: dict[str, dict[str, Streak]] = {rule.name: {} for rule in self.rules}
        self._evidence: dict[str, dict[str, Evidence]] = {rule.name: {} for rule in self.rules}
        self.snoozes: list[Snooze] = []

    def update(self, report: StepReport) -> tuple[Alarm, ...]:
        """The alarms that stand after this report: by rule, then in the order in which the layers fired."""
        if report.valid:
            self.history.observe(report)
        self.snoozes = [snooze for snooze in self.snoozes if report.step < snooze.until]
        standing: list[Alarm] = []
        for rule in self.rules:
            if rule.name in self._off:
                continue
            streaks, evidence = self._streaks[rule.name], self._evidence[rule.name]
            readings = self._read(rule, report)
            measured = {reading.layer for reading in readings}
            for reading in readings:
                evidence.setdefault(reading.layer, deque(maxlen=EVIDENCE)).append((report.step, reading.value))
                _advance(streaks, rule, reading, report.step, measured)
            for layer, streak in streaks.items():
                if streak.raised:
                    snoozed = any(snooze.covers(rule.name, layer) for snooze in self.snoozes)
                    new = not streak.told and not snoozed
                    streak.told = (streak.told or new) and not snoozed  # who outlasts a snooze is new again
                    standing.append(streak.alarm(rule, report.step, evidence.get(layer, ()), new=new, snoozed=snoozed))
        return tuple(standing)

    def snooze(self, name: str = "*", layers: str = "*", *, until: int) -> None:
        """Keep alarms quiet up to the step ``until``; see ``AttentionProbe.snooze``."""
        known = [rule.name for rule in self.rules]
        matched = {each for each in known if fnmatch.fnmatchcase(each, name)}
        if matched == {NonFinite.name}:
            raise ConfigurationError(
                f"{NonFinite.name!r}, the only alarm that {name!r} matches, cannot be snoozed: from non-finite numbers "
                "no run recovers by itself"
            )
        if not matched:
            raise UnknownNameError.among("alarm", name, known)
        self.snoozes.append(Snooze(name, layers, until))

    def _read(self, rule: AlarmRule, report: StepReport) -> list[Reading]:
        measured = {*report.statistics, *report.layer}
        if rule.missing(measured) or not (report.valid or rule.judges_invalid):
            return []
        try:
            # Quiet layers first: what they clear makes room where only a single alarm may stand.
            return sorted(rule.readings(report, self.history), key=lambda reading: reading.firing)
        except Exception as error:
            if self.strict:
                raise
            self.failures.append((rule.name, error))
            self._off.add(rule.name)
            self._streaks[rule.name].clear()  # nobody could clear its alarms any more
            return []

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values, without the failures: a resumed run tries every rule again."""
        streaks = {
            name: {layer: streak.state_dict() for layer, streak in layers.items()}
            for name, layers in self._streaks.items()
        }
        evidence = {
            name: {layer: [*map(list, values)] for layer, values in layers.items()}
            for name, layers in self._evidence.items()
        }
        snoozes = [dataclasses.asdict(snooze) for snooze in self.snoozes]
        return {"history": self.history.state_dict(), "streaks": streaks, "evidence": evidence, "snoozes": snoozes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; rules that it does not know start afresh."""
        self.history.load_state_dict(state["history"])
        for name in self._streaks:
            saved = state["streaks"].get(name, {})
            self._streaks[name] = {layer: Streak.from_state(streak) for layer, streak in saved.items()}
            kept = state.get("evidence", {}).get(name, {})
            self._evidence[name] = {
                layer: deque(((int(step), value) for step, value in values), EVIDENCE) for layer, values in kept.items()
            }
        self.snoozes = [Snooze(**snooze) for snooze in state.get("snoozes", ())]


def _advance(streaks: dict[str, Streak], rule: AlarmRule, reading: Reading, step: int, measured: Set[str]) -> None:
    """Start, extend, raise, clear or end the streak of the reading's layer."""
    layer = reading.layer
    streak = streaks.get(layer)
    if streak is None:
        if not reading.firing:
            return
        streak = streaks[layer] = Streak(step, reading)
    if reading.firing or (streak.raised and reading.holding):
        streak.extend(reading)
        # A layer that is measured no more cannot clear its alarm, and must not hide those of others.
        blocked = rule.single and any(streaks[other].raised for other in measured & streaks.keys())
        if reading.firing and streak.fired >= rule.patience and step >= rule.min_step and not blocked:
            streak.raised = True
    else:
        streak.quiet += 1
        if not streak.raised or streak.quiet >= rule.patience:
            del streaks[layer]
