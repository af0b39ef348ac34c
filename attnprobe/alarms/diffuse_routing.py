"""A model that never learned where to look: every layer near uniform, and the loss stuck."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from attnprobe.alarms.base import AlarmRule, Reading, Tunable, head_values, layer_values
from attnprobe.alarms.history import History
from attnprobe.report import StepReport


@dataclass(frozen=True, kw_only=True)
class DiffuseRouting(AlarmRule):
    """Every layer's entropy exceeds ``threshold``, and the loss neither is better than uninformed nor falls; or all
    scores are still alike, whatever the loss does.

    A finding about the whole run, whose value is the sharpest layer's entropy. Near-uniform attention alone is
    healthy: every model starts so, and averaging can be the right answer.

    Attributes:
        alike: ``logit_spread`` that no head exceeds where routing never began.
    """

    name = "diffuse_routing"
    advice = (
        "Check that labels and data fit together and hold something to attend to; raise the learning rate of queries "
        "and keys, or use Adam instead of SGD (arXiv 2402.16788); lower it where the loss was unstable before."
    )
    tunable = (Tunable("threshold", 1, high=1.0),)
    needs = ("entropy_8", "logit_spread")

    threshold: float = 0.5
    alike: float = 0.1
    release: float = 0.8
    patience: int = 5
    min_step: int = 200

    def readings(self, report: StepReport, history: History) -> Iterator[Reading]:
        entropies = [entropy for _, entropy in layer_values(report, report.layer["entropy_8"])]
        if not entropies:
            return
        sharpest = min(entropies)
        progress, falling = history.loss.progress(), history.loss.falling()
        spreads = [value for _, heads in head_values(report, report["logit_spread"]) for value in heads.values()]
        alike = max(spreads, default=math.inf) < self.alike
        stuck = progress is False and falling is False
        firing = sharpest > self.threshold and (stuck or alike)
        holding = sharpest > self.release * self.threshold and (alike or not (progress or falling))
        detail = "All scores are alike: look at what scales queries and keys." if alike else ""
        yield Reading("", (), sharpest, self.threshold, firing, holding, detail)
