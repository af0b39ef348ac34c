"""Heads that came to park their attention on the first token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attnprobe.alarms.base import AlarmRule, Reading, above, head_values
from attnprobe.alarms.history import History
from attnprobe.report import StepReport


@dataclass(frozen=True, kw_only=True)
class SinkFormation(AlarmRule):
    """A head gives the first token more than ``threshold`` of its attention, and did not when the run began.

    Information, not an alarm: sinks are how heads rest.
    """

    name = "sink_formation"
    severity = "information"
    advice = (
        "Nothing has to be done. Keep the first token in a cache that drops tokens (arXiv 2309.17453); where outliers "
        "hurt quantisation, give heads a learned sink or gated attention (arXiv 2306.12929)."
    )
    needs = ("sink_mass",)
    remembers = ("sink_mass",)

    threshold: float = 0.3
    patience: int = 3
    min_step: int = 0

    def readings(self, report: StepReport, history: History) -> Iterator[Reading]:
        for layer, mass in head_values(report, report["sink_mass"]):
            grown = {
                head: value
                for head, value in mass.items()
                if (before := history.past("sink_mass", layer, head).baseline) is not None
                and before < self.threshold / 2
            }
            if grown:
                yield above(layer, grown, self.threshold)
