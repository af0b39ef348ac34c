"""Heads of a layer that say the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attnprobe.alarms.base import AlarmRule, Reading, Tunable, above, head_values
from attnprobe.alarms.history import History
from attnprobe.report import StepReport


@dataclass(frozen=True, kw_only=True)
class RedundantHeads(AlarmRule):
    """Two heads of a layer have outputs whose linear CKA exceeds ``threshold``: one is a copy of the other."""

    name = "redundant_heads"
    advice = (
        "Look for weights that are shared, tied or initialised alike; where heads became alike by themselves, use "
        "fewer of them (arXiv 1905.10650)."
    )
    tunable = (Tunable("threshold", 1, high=1.0),)
    needs = ("head_similarity",)

    threshold: float = 0.99999
    patience: int = 3
    min_step: int = 50

    def readings(self, report: StepReport, history: History) -> Iterator[Reading]:
        for layer, similarity in head_values(report, report["head_similarity"]):
            yield above(layer, similarity, self.threshold, release=1.0)
