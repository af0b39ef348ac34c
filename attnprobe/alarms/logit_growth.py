"""Scores on their way to an explosion."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from attnprobe.alarms.base import AlarmRule, Reading, Tunable, head_values
from attnprobe.alarms.history import History
from attnprobe.report import StepReport


@dataclass(frozen=True, kw_only=True)
class LogitGrowth(AlarmRule):
    """A head's ``logit_spread`` grew at each of the last ``probes`` probes, and the loss got nothing for it.

    The value of the alarm is the factor by which it grew over them. Scores that grow while the loss falls are how
    attention learns.

    Attributes:
        threshold: factor from which it is a trend.
        floor: spread below which growth does not matter.
        fall: share of the first losses by which a falling loss excuses it.
        probes: how many steps of growth in a row.
    """

    name = "logit_growth"
    advice = (
        "Early warning: scores grow and the loss does not gain by it. Lower the learning rate of queries and keys, "
        "give their weights decay, normalise them (QK-norm, arXiv 2010.04245) or clip their weights (QK-Clip, arXiv "
        "2507.20534) before the softmax saturates."
    )
    tunable = (Tunable("threshold", 1, low=1.0),)
    needs = ("logit_spread",)
    remembers = ("logit_spread",)

    threshold: float = 2.5
    floor: float = 60.0
    fall: float = 0.02
    probes: int = 4
    patience: int = 1
    min_step: int = 0

    def readings(self, report: StepReport, history: History) -> Iterator[Reading]:
        fall = history.loss.fall()
        for layer, spread in head_values(report, report["logit_spread"]):
            spread = {head: value for head, value in spread.items() if math.isfinite(value)}
            if not spread:
                continue
            growth = {head: self._growth(history, layer, head) for head in spread}
            heads = tuple(
                head for head, value in spread.items() if value > self.floor and growth[head] > self.threshold
            )
            firing = bool(heads) and fall is not None and fall < self.fall
            growing = tuple(head for head, value in spread.items() if value > self.floor and growth[head] > 1)
            value = max(growth[head] for head in heads or growing or spread)
            yield Reading(layer, heads or growing, value, self.threshold, firing, holding=bool(growing))

    def _growth(self, history: History, layer: str, head: int) -> float:
        """Factor over the last probes; 1 if it did not grow at each of them."""
        recent = [value for _, value in history.past("logit_spread", layer, head).recent][-self.probes - 1 :]
        steady = all(before < after for before, after in pairwise(recent))
        return recent[-1] / recent[0] if steady and len(recent) > self.probes and recent[0] > 0 else 1.0
