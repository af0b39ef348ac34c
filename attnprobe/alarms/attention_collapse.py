"""Heads that froze onto single keys without the loss having asked for it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from attnprobe.alarms.base import AlarmRule, Reading, Tunable, head_values
from attnprobe.alarms.history import History
from attnprobe.report import StepReport


@dataclass(frozen=True, kw_only=True)
class AttentionCollapse(AlarmRule):
    """At least ``share`` of a layer's heads are one-hot, and either the scores explode or the loss is stuck.

    Sharp heads alone are healthy (previous token, copying, sinks), hence the second condition.
    The value of the alarm is the share of one-hot heads.

    Attributes:
        share: of the layer's heads.
        spread: a head is one-hot if its ``1 - concentration`` is below.
        logit_threshold: ``logit_spread`` of any head of the layer above which scores explode.
        stall_step: training step from which a loss without progress counts.
    """

    name = "attention_collapse"
    advice = (
        "Lower the learning rate or lengthen the warm-up; normalise queries and keys (QK-norm, arXiv 2010.04245) or "
        "bound the spectral norm of their weights (sigma-reparametrisation, arXiv 2303.06296)."
    )
    tunable = (Tunable("spread", -1, high=1.0),)
    needs = ("concentration", "logit_spread")

    share: float = 0.5
    spread: float = 0.05
    logit_threshold: float = 250.0
    stall_step: int = 100
    release: float = 0.8
    patience: int = 3
    min_step: int = 0

    def readings(self, report: StepReport, history: History) -> Iterator[Reading]:
        progress = history.loss.progress()
        stuck = progress is False and report.step >= self.stall_step
        logits = dict(head_values(report, report["logit_spread"]))
        for layer, concentration in head_values(report, report["concentration"]):
            largest = max(logits.get(layer, {}).values(), default=math.nan)
            exploding = largest > self.logit_threshold
            sharp = _one_hot(concentration, self.spread)
            nearly = _one_hot(concentration, self.spread / self.release)
            firing = len(sharp) >= self.share * len(concentration) and (exploding or stuck)
            holding = len(nearly) >= self.release * self.share * len(concentration) and (
                largest > self.release * self.logit_threshold or progress is not True
            )
            heads = sharp if firing else nearly
            detail = f"Scores explode (logit_spread {largest:.4g})." if exploding else "The loss makes no progress."
            yield Reading(
                layer, heads, len(heads) / len(concentration), self.share, firing, holding, detail if firing else ""
            )


def _one_hot(concentration: dict[int, float], spread: float) -> tuple[int, ...]:
    return tuple(head for head, value in concentration.items() if 1 - value < spread)
