"""Heads that say nothing, or that nobody listens to."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from attnprobe.alarms.base import AlarmRule, Reading, Tunable, head_values
from attnprobe.alarms.history import History
from attnprobe.report import StepReport


@dataclass(frozen=True, kw_only=True)
class InactiveHead(AlarmRule):
    """A head's output, or the error that comes back to it, is next to nothing beside that of the others.

    Outputs are compared within the layer, errors with the largest of the run. The value of the alarm is the smallest
    of these ratios. Weights that start at zero, as some residual branches do, have left it by the second probe.

    Attributes:
        threshold: ratio below which an output or an error is nothing.
    """

    name = "inactive_head"
    advice = (
        "Look at the output projection, at head masks and at what multiplies the attention's branch: with an error of "
        "zero the head gets no gradient; where heads are to spare, prune them (arXiv 1905.10650)."
    )
    tunable = (Tunable("threshold", -1, high=1.0),)
    needs = ("output_norm", "error_norm")

    threshold: float = 1e-4
    release: float = 0.8
    patience: int = 3
    min_step: int = 0

    def readings(self, report: StepReport, history: History) -> Iterator[Reading]:
        errors = dict(head_values(report, report["error_norm"]))
        largest_error = max((value for row in errors.values() for value in row.values()), default=0.0)
        # Nothing is left to learn, or nothing was asked; beside an infinite error all others are nothing.
        idle = report.loss == 0 or math.isinf(largest_error)
        for layer, outputs in head_values(report, report["output_norm"]):
            largest = max(outputs.values())
            if math.isinf(largest):
                continue
            ratios = {head: _ratio(value, largest) for head, value in outputs.items()}
            for head, value in errors.get(layer, {}).items():
                if not idle:
                    ratios[head] = min(ratios.get(head, 1.0), _ratio(value, largest_error))
            silent = tuple(head for head, ratio in ratios.items() if ratio < self.threshold)
            nearly = tuple(head for head, ratio in ratios.items() if ratio < self.threshold / self.release)
            smallest = min(ratios.values())
            yield Reading(layer, silent or nearly, smallest, self.threshold, bool(silent), bool(nearly))


def _ratio(value: float, largest: float) -> float:
    return value / largest if largest > 0 else 0.0
