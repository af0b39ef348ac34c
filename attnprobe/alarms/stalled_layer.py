"""A layer that does not move while the others train."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attnprobe.alarms.base import AlarmRule, Reading, Tunable, head_values
from attnprobe.alarms.history import History
from attnprobe.report import StepReport


@dataclass(frozen=True, kw_only=True)
class StalledLayer(AlarmRule):
    """On the reference batch neither attention nor values of any head of the layer moved since the last probe.

    The value of the alarm is the larger of the two displacements. A layer whose weights are frozen, but whose input
    learns, moves: only what is frozen up to the input is found.

    Attributes:
        threshold: displacement below which nothing moved.
    """

    name = "stalled_layer"
    advice = (
        "Look for requires_grad=False, parameters that the optimizer was not given, a learning rate of zero, and "
        "updates that are lost in the precision of the weights (arXiv 1710.03740)."
    )
    tunable = (Tunable("threshold", -1),)
    needs = ("attention_displacement", "value_displacement")

    threshold: float = 1e-6
    patience: int = 3
    min_step: int = 0

    def readings(self, report: StepReport, history: History) -> Iterator[Reading]:
        losses = {loss for _, loss in history.loss.recent}
        values = dict(head_values(report, report["value_displacement"]))
        for layer, attention in head_values(report, report["attention_displacement"]):
            moved = max(*attention.values(), *values.get(layer, {0: 0.0}).values())
            stalled = moved < self.threshold and len(losses) > 1
            yield Reading(layer, (), moved, self.threshold, stalled, stalled)
