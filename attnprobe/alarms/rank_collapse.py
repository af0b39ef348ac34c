"""A layer whose outputs no longer tell the tokens apart."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attnprobe.alarms.base import AlarmRule, Reading, Tunable, head_values
from attnprobe.alarms.history import History
from attnprobe.report import StepReport


@dataclass(frozen=True, kw_only=True)
class RankCollapse(AlarmRule):
    """The outputs of all heads of a layer vary along hardly more than one direction, and the loss makes no progress.

    The value of the alarm is the largest ``output_stable_rank`` of the layer's heads. One direction alone can be all
    that a task needs, hence the second condition.

    Attributes:
        threshold: stable rank below which there is hardly more than one direction.
    """

    name = "rank_collapse"
    advice = (
        "Look at the residual connections and the MLPs, which keep attention from averaging the tokens away (arXiv "
        "2103.03404), at the scale of the initial weights (arXiv 2206.03126) and at the learning rate."
    )
    tunable = (Tunable("threshold", -1, low=1.0),)
    needs = ("output_stable_rank",)

    threshold: float = 1.2
    release: float = 0.8
    patience: int = 5
    min_step: int = 250

    def readings(self, report: StepReport, history: History) -> Iterator[Reading]:
        progress = history.loss.progress()
        for layer, ranks in head_values(report, report["output_stable_rank"]):
            largest = max(ranks.values())
            firing = largest < self.threshold and progress is False
            holding = largest < self.threshold / self.release and progress is not True
            yield Reading(layer, (), largest, self.threshold, firing, holding)
