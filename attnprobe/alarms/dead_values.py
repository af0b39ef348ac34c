"""Keys that no head of a layer reads: their values get no gradient and cannot come back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from attnprobe.alarms.base import AlarmRule, Reading, Tunable, layer_values
from attnprobe.alarms.history import BASELINE, History
from attnprobe.report import StepReport


@dataclass(frozen=True, kw_only=True)
class DeadValues(AlarmRule):
    """A share of the keys is read by no head of the layer: ``always`` at every probe, or ``stalled`` with a stuck loss.

    Attributes:
        always: share that all probes since the first, of which there are five at least, may not have found.
        stalled: share from which a loss without progress raises the alarm, whatever earlier probes found.
        stall_step: training step from which a loss without progress counts.
    """

    name = "dead_values"
    advice = (
        "A value's gradient is sum_i alpha_ij u_i (arXiv 2512.22473), nothing where nobody reads: look for a mask or "
        "padding that is not declared, start queries and keys smaller, or lower their learning rate."
    )
    tunable = (Tunable("always", 1, high=1.0), Tunable("stalled", 1, high=1.0))
    needs = ("shared_dead_columns",)
    remembers = ("shared_dead_columns",)

    always: float = 0.05
    stalled: float = 0.3
    stall_step: int = 100
    release: float = 0.8
    patience: int = 1
    min_step: int = 50

    def readings(self, report: StepReport, history: History) -> Iterator[Reading]:
        progress = history.loss.progress()
        stuck = progress is False and report.step >= self.stall_step
        for layer, share in layer_values(report, report.layer["shared_dead_columns"]):
            past = history.past("shared_dead_columns", layer)
            least = past.least if len(past.recent) >= BASELINE else 0.0
            from_the_start = least >= self.always
            with_stuck_loss = share >= self.stalled and stuck
            still_from_the_start = least >= self.release * self.always
            still_stuck = share >= self.release * self.stalled and progress is not True
            by_always = from_the_start or (still_from_the_start and not with_stuck_loss)
            yield Reading(
                layer,
                (),
                share,
                self.always if by_always else self.stalled,
                firing=from_the_start or with_stuck_loss,
                holding=still_from_the_start or still_stuck,
                detail="Dead since the first probe." if from_the_start else "",
            )
