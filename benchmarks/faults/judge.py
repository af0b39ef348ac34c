"""Which rule spoke when, over a run that was logged."""

from __future__ import annotations

from collections.abc import Sequence

from attnprobe.alarms import ALL_ALARMS, AlarmEngine, AlarmRule, MaskViolation
from attnprobe.probe import EARLY_INTERVAL, EARLY_PROBES
from attnprobe.report import StepReport
from benchmarks.faults.setup import Setup
from benchmarks.faults.tasks import TASKS
from benchmarks.faults.train import Run


def rules_for(setup: Setup) -> tuple[AlarmRule, ...]:
    """All rules as a user would choose them who knows whether the model is meant to be causal."""
    causal = TASKS[setup.task].causal
    return tuple(MaskViolation(causal=causal) if rule.name == "mask_violation" else rule for rule in ALL_ALARMS)


def judge(run: Run, *, every: int = 10, informed: bool = False) -> dict[str, int]:
    """The first step at which each alarm, or information, was raised, in that order.

    Args:
        every: distance between probes, a multiple of that in the log.
        informed: whether the user says what the loss of an uninformed model is.
    """
    uninformed = TASKS[run.setup.task].uninformed() if informed else None
    engine = AlarmEngine(rules_for(run.setup), uninformed_loss=uninformed, strict=True)
    heard: dict[str, int] = {}
    for report in thinned(run.reports, every):
        for alarm in engine.update(report):
            if alarm.name not in heard:
                heard[alarm.name] = alarm.step
    return heard


def thinned(reports: Sequence[StepReport], every: int) -> list[StepReport]:
    """The reports that a probe every so many steps would have made."""
    chosen, due = [], 0
    for report in reports:
        if report.step >= due:
            chosen.append(report)
            due = report.step + (every if len(chosen) >= EARLY_PROBES else min(every, EARLY_INTERVAL))
    return chosen
