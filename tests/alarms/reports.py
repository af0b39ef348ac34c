"""Synthetic reports for the alarm tests."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from attnprobe.alarms import AlarmEngine, AlarmRule, History, Reading
from attnprobe.report import Alarm, StepReport

NAN = math.nan

#: What a head in training looks like; every rule is content with it.
HEALTHY = {
    "logit_spread": 5.0,
    "value_rms": 1.0,
    "concentration": 0.3,
    "output_norm": 1.0,
    "error_norm": 1e-3,
    "sink_mass": 0.02,
    "head_similarity": 0.5,
    "output_stable_rank": 4.0,
    "future_mass": 0.0,
    "padding_mass": 0.0,
    "hidden_tokens": 0.0,
    "attention_displacement": 0.1,
    "value_displacement": 0.1,
}
HEALTHY_LAYER = {"shared_dead_columns": 0.0, "entropy_8": 0.3}


@dataclass(frozen=True, kw_only=True)
class Script(AlarmRule):
    """Fires (F), holds (H), is quiet (.), not measured (-) or crashes (x), as its text says for the step."""

    name = "script"
    advice = "Read on."
    text: str = ""
    layer: str = "a"
    patience: int = 2
    min_step: int = 0

    def readings(self, report: StepReport, history: History) -> Iterator[Reading]:
        letter = self.text[report.step]
        if letter == "x":
            raise RuntimeError("boom")
        if letter != "-":
            yield Reading(self.layer, (1,), float(report.step), 0.5, letter == "F", letter in "FH")


def make_report(
    step: int,
    *,
    layers: Sequence[str] = ("attn",),
    heads: int = 2,
    loss: float = NAN,
    invalid: str = "",
    nonfinite: Mapping[str, Sequence[Sequence[float]] | Sequence[float]] | None = None,
    **values: Sequence[Sequence[float]] | Sequence[float],
) -> StepReport:
    """A report of healthy layers, except for the statistics given: ``[L][H]``, or ``[L]`` at layer level."""
    statistics = {name: [[value] * heads for _ in layers] for name, value in HEALTHY.items()}
    statistics |= {name: rows for name, rows in values.items() if name in HEALTHY}
    layer = {name: [value] * len(layers) for name, value in HEALTHY_LAYER.items()}
    layer |= {name: row for name, row in values.items() if name in HEALTHY_LAYER}
    assert not values.keys() - HEALTHY.keys() - HEALTHY_LAYER.keys()
    clean = {kind: torch.zeros(len(layers), heads) for kind in ("query", "key", "value", "error")}
    return StepReport(
        step=step,
        layers=tuple(layers),
        heads=(heads,) * len(layers),
        statistics={name: torch.tensor(rows, dtype=torch.float64) for name, rows in statistics.items()},
        layer={name: torch.tensor(row, dtype=torch.float64) for name, row in layer.items()},
        nonfinite=clean | {kind: torch.tensor(counts) for kind, counts in (nonfinite or {}).items()},
        loss=loss,
        invalid=invalid,
    )


def feed(engine: AlarmEngine, reports: Iterable[StepReport]) -> Iterator[tuple[Alarm, ...]]:
    """The alarms that stand after each report, and not one failed rule."""
    for report in reports:
        yield engine.update(report)
        assert engine.failures == []


def alarms_of(
    rule: AlarmRule, reports: Iterable[StepReport], uninformed_loss: float | None = None
) -> list[tuple[Alarm, ...]]:
    return list(feed(AlarmEngine([rule], uninformed_loss=uninformed_loss), reports))


def standing(alarms: Iterable[tuple[Alarm, ...]]) -> list[bool]:
    """Whether at least one alarm stood, probe by probe."""
    return [bool(some) for some in alarms]
