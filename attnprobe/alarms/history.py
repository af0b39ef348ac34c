"""What a rule may look at beside the current report: the run so far, in bounded memory."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from attnprobe.alarms.base import head_values, layer_values
from attnprobe.alarms.losses import LossHistory
from attnprobe.report import StepReport

#: Probes that make a baseline.
BASELINE = 5


class History:
    """The losses, each head's first value norms and each layer's least share of dead keys, over the valid probes.

    Attributes:
        loss: average, trend and progress of the loss.
    """

    def __init__(self, uninformed_loss: float | None = None) -> None:
        self.loss = LossHistory(uninformed_loss)
        self._value_rms: dict[str, dict[int, list[float]]] = {}
        self._least_dead: dict[str, float] = {}

    def observe(self, report: StepReport) -> None:
        """Take in a report; the engine does so before the rules read it, and leaves out invalid ones."""
        self.loss.observe(report.step, report.loss)
        if "value_rms" in report:
            for layer, values in head_values(report, report["value_rms"]):
                for head, value in values.items():
                    first = self._value_rms.setdefault(layer, {}).setdefault(head, [])
                    if len(first) < BASELINE and 0 < value < math.inf:
                        first.append(value)
        if "shared_dead_columns" in report.layer:
            for layer, share in layer_values(report, report.layer["shared_dead_columns"]):
                self._least_dead[layer] = min(share, self._least_dead.get(layer, share))

    def value_baseline(self, layer: str, head: int) -> float | None:
        """Median of the first five ``value_rms`` of the head, positive and finite; None while there are fewer."""
        first = self._value_rms.get(layer, {}).get(head, [])
        return median(first) if len(first) == BASELINE else None

    def least_dead(self, layer: str) -> float:
        """The smallest ``shared_dead_columns`` that any probe found in the layer, NaN where none looked."""
        return self._least_dead.get(layer, math.nan)

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        # Heads as text: a dictionary that went through JSON has no other keys.
        value_rms = {
            layer: {str(head): list(first) for head, first in heads.items()} for layer, heads in self._value_rms.items()
        }
        return {"loss": self.loss.state_dict(), "value_rms": value_rms, "least_dead": dict(self._least_dead)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss.load_state_dict(state["loss"])
        self._value_rms = {
            layer: {int(head): list(first) for head, first in heads.items()}
            for layer, heads in state["value_rms"].items()
        }
        self._least_dead = dict(state["least_dead"])
