"""Which rule spoke when, over a run that was logged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from attnprobe.alarms import ALL_ALARMS, AlarmEngine, AlarmRule, MaskViolation
from attnprobe.report import StepReport
from benchmarks.faults.setup import Setup
from benchmarks.faults.tasks import TASKS
from benchmarks.faults.train import Run

#: Probes of a run's beginning come every ten steps, whatever the distance of the others.
EARLY = 5


@dataclass(frozen=True)
class Heard:
    """The first step at which each alarm was raised, in that order; information is left out."""

    first: tuple[tuple[str, int], ...]

    def after(self, step: int) -> dict[str, int]:
        """Those from ``step`` on."""
        return {name: raised for name, raised in self.first if raised >= step}


def rules_for(setup: Setup) -> tuple[AlarmRule, ...]:
    """All rules as a user would choose them who knows whether the model is meant to be causal."""
    causal = TASKS[setup.task].causal
    return tuple(MaskViolation(causal=causal) if rule.name == "mask_violation" else rule for rule in ALL_ALARMS)


def judge(run: Run, rules: Iterable[AlarmRule] | None = None, *, every: int = 10, informed: bool = False) -> Heard:
    """What the rules say.

    Args:
        rules: those of ``rules_for``, if None.
        every: distance between probes, a multiple of that in the log.
        informed: whether the user says what the loss of an uninformed model is.
    """
    uninformed = TASKS[run.setup.task].uninformed() if informed else None
    engine = AlarmEngine(rules_for(run.setup) if rules is None else rules, uninformed_loss=uninformed, strict=True)
    heard: dict[str, int] = {}
    for report in thinned(run.reports, every):
        for alarm in engine.update(report):
            if alarm.severity == "alarm" and alarm.name not in heard:
                heard[alarm.name] = alarm.step
    return Heard(tuple(heard.items()))


def thinned(reports: Sequence[StepReport], every: int) -> list[StepReport]:
    """The reports that a probe every so many steps would have made."""
    chosen, due = [], 0
    for report in reports:
        if report.step >= due:
            chosen.append(report)
            due = report.step + (every if len(chosen) >= EARLY else min(every, 10))
    return chosen
