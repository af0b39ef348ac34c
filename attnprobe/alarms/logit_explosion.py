"""Scores so far apart that the softmax is a hard choice and its gradient vanishes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attnprobe.alarms.base import AlarmRule, Reading, Tunable, above, head_values
from attnprobe.alarms.history import History
from attnprobe.report import StepReport


@dataclass(frozen=True, kw_only=True)
class LogitExplosion(AlarmRule):
    """A head's largest score stands more than ``threshold`` above the mean of its row.

    Kimi K2 clips at 100; the healthy runs by which the threshold was chosen stayed below 160.
    """

    name = "logit_explosion"
    advice = (
        "Lower the learning rate of queries and keys or lengthen the warm-up; normalise queries and keys "
        "(QK-norm, arXiv 2010.04245), clip their weights (QK-Clip, arXiv 2507.20534) or cap the scores "
        "(soft-capping, arXiv 2408.00118)."
    )
    tunable = (Tunable("threshold", 1),)
    needs = ("logit_spread",)

    threshold: float = 250.0
    release: float = 0.8
    patience: int = 2
    min_step: int = 0

    def readings(self, report: StepReport, history: History) -> Iterator[Reading]:
        for layer, spread in head_values(report, report["logit_spread"]):
            yield above(layer, spread, self.threshold, self.release)
