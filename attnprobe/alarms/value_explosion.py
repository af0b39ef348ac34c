"""Values that outgrow their own beginnings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attnprobe.alarms.base import AlarmRule, Reading, Tunable, above, head_values
from attnprobe.alarms.history import History
from attnprobe.report import StepReport


@dataclass(frozen=True, kw_only=True)
class ValueExplosion(AlarmRule):
    """A head's values are more than ``threshold`` times as large as its median over the first probes.

    The value of the alarm is that ratio. The healthy runs by which the threshold was chosen stayed below 32, those
    of the evaluation below 60: small values grow as they learn.
    """

    name = "value_explosion"
    advice = (
        "Lower the learning rate of the value projection, give it weight decay or clip gradients; a LayerNorm on "
        "the values bounds them (arXiv 2512.22473)."
    )
    tunable = (Tunable("threshold", 1),)
    needs = ("value_rms",)
    remembers = ("value_rms",)

    threshold: float = 100.0
    release: float = 0.8
    patience: int = 2
    min_step: int = 0

    def readings(self, report: StepReport, history: History) -> Iterator[Reading]:
        for layer, values in head_values(report, report["value_rms"]):
            ratios = {
                head: value / baseline
                for head, value in values.items()
                if (baseline := history.past("value_rms", layer, head).baseline) is not None
            }
            if ratios:
                yield above(layer, ratios, self.threshold, self.release)
