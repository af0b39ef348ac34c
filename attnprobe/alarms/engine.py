"""From readings to alarms: patience, warm-up, hysteresis, and rules that crash."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from attnprobe.alarms.base import AlarmRule, Reading
from attnprobe.alarms.history import History
from attnprobe.alarms.streak import Streak
from attnprobe.report import Alarm, StepReport


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
        self.history = History(uninformed_loss)
        self.strict = strict
        self.failures: list[tuple[str, Exception]] = []
        self._off: set[str] = set()
        self._streaks: dict[str, dict[str, Streak]] = {rule.name: {} for rule in self.rules}

    def update(self, report: StepReport) -> tuple[Alarm, ...]:
        """The alarms that stand after this report: by rule, then in the order in which the layers fired."""
        if report.valid:
            self.history.observe(report)
        standing: list[Alarm] = []
        for rule in self.rules:
            if rule.name in self._off:
                continue
            streaks = self._streaks[rule.name]
            raised_before = {layer for layer, streak in streaks.items() if streak.raised}
            for reading in self._read(rule, report):
                _advance(streaks, rule, reading, report.step)
            standing += (
                streak.alarm(rule, report.step, new=layer not in raised_before)
                for layer, streak in streaks.items()
                if streak.raised
            )
        return tuple(standing)

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
        return {"history": self.history.state_dict(), "streaks": streaks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state_dict`` was taken; rules that it does not know start afresh."""
        self.history.load_state_dict(state["history"])
        for name in self._streaks:
            saved = state["streaks"].get(name, {})
            self._streaks[name] = {layer: Streak.from_state(streak) for layer, streak in saved.items()}


def _advance(streaks: dict[str, Streak], rule: AlarmRule, reading: Reading, step: int) -> None:
    """Start, extend, raise, clear or end the streak of the reading's layer."""
    layer = reading.layer
    streak = streaks.get(layer)
    if streak is None:
        if not reading.firing:
            return
        streak = streaks[layer] = Streak(step, reading)
    if reading.firing or (streak.raised and reading.holding):
        streak.extend(reading)
        blocked = rule.single and any(other.raised for other in streaks.values())
        if reading.firing and streak.fired >= rule.patience and step >= rule.min_step and not blocked:
            streak.raised = True
    else:
        streak.quiet += 1
        if not streak.raised or streak.quiet >= rule.patience:
            del streaks[layer]
