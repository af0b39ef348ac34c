"""What a rule may look at beside the current report: the run so far, in bounded memory."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median
from typing import Any

from attnprobe.alarms.base import head_values, layer_values
from attnprobe.alarms.losses import LossHistory
from attnprobe.report import StepReport

#: Probes that make a baseline.
BASELINE = 5
#: Probes whose values are kept.
RECENT = 10


class Past:
    """What one number was, from probe to probe; values that are not finite are left out.

    Attributes:
        first: the first positive values, up to five.
        recent: ``(step, value)`` of the last ten, the newest last.
        least: the smallest.
    """

    def __init__(self) -> None:
        self.first: list[float] = []
        self.recent: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self.least = math.inf

    def observe(self, step: int, value: float) -> None:
        if not math.isfinite(value):
            return
        if len(self.first) < BASELINE and value > 0:
            self.first.append(value)
        self.recent.append((step, value))
        self.least = min(self.least, value)

    @property
    def baseline(self) -> float | None:
        """Median of ``first``; None while there are fewer than five."""
        return median(self.first) if len(self.first) == BASELINE else None


class History:
    """The losses, and the past of the statistics that rules remember, over the valid probes.

    Args:
        uninformed_loss: loss of a model that knows nothing of the input; None where unknown.
        remembered: names of head or layer statistics.

    Attributes:
        loss: average, trend and progress of the loss.
    """

    def __init__(self, uninformed_loss: float | None = None, remembered: Iterable[str] = ()) -> None:
        self.loss = LossHistory(uninformed_loss)
        self._pasts: dict[str, dict[str, dict[int, Past]]] = {name: {} for name in remembered}

    def observe(self, report: StepReport) -> None:
        """Take in a report; the engine does so before the rules read it, and leaves out invalid ones."""
        self.loss.observe(report.step, report.loss)
        for name, layers in self._pasts.items():
            if name in report:
                for layer, values in head_values(report, report[name]):
                    pasts = layers.setdefault(layer, {})
                    for head, value in values.items():
                        pasts.setdefault(head, Past()).observe(report.step, value)
            if name in report.layer:
                for layer, value in layer_values(report, report.layer[name]):
                    layers.setdefault(layer, {}).setdefault(0, Past()).observe(report.step, value)

    def past(self, name: str, layer: str, head: int = 0) -> Past:
        """Of a statistic that a rule remembers; ``head`` does not matter for one of the layer."""
        return self._pasts[name].get(layer, {}).get(head) or Past()

    def state_dict(self) -> dict[str, Any]:
        """Plain Python values."""
        pasts = {
            name: {
                # Heads as text: a dictionary that went through JSON has no other keys.
                layer: {str(head): [past.first, [*map(list, past.recent)], past.least] for head, past in heads.items()}
                for layer, heads in layers.items()
            }
            for name, layers in self._pasts.items()
        }
        return {"loss": self.loss.state_dict(), "pasts": pasts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss.load_state_dict(state["loss"])
        for name in self._pasts:
            self._pasts[name] = {
                layer: {int(head): _past(*values) for head, values in heads.items()}
                for layer, heads in state.get("pasts", {}).get(name, {}).items()
            }


def _past(first: list[float], recent: list[list[float]], least: float) -> Past:
    past = Past()
    past.first, past.least = list(first), least
    past.recent.extend((int(step), value) for step, value in recent)
    return past
