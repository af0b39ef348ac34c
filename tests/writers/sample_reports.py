"""Reports of every kind that a probe can produce, as the writers' tests need them."""

from __future__ import annotations

import math

import torch

from attnprobe.catalog import STATISTICS
from attnprobe.report import Alarm, HeadMap, StepReport

HOSTILE = "h.0\n**b**<script>alert(1)</script>[x](javascript:y)\x1b[31m\u202e../..\\ud:\ud800|_a_ `c`"


def full_report(
    step: int = 0, heads: tuple[int, ...] = (4, 2, 3), layers: tuple[str, ...] | None = None, **changes: object
) -> StepReport:
    """Every statistic of the catalogue, random, with NaN where a layer has fewer heads."""
    generator = torch.Generator().manual_seed(step)
    beyond = torch.arange(max(heads))[None] >= torch.tensor(heads)[:, None]

    def numbers() -> torch.Tensor:
        values = torch.rand(len(heads), max(heads), generator=generator, dtype=torch.float64)
        return values.masked_fill(beyond, math.nan)

    defaults: dict[str, object] = {
        "statistics": {name: numbers() for name, entry in STATISTICS.items() if entry.level == "head"},
        "layer": {name: numbers()[:, 0] for name, entry in STATISTICS.items() if entry.level == "layer"},
        "residual": numbers() * 1e-6,
        "nonfinite": {kind: torch.zeros(len(heads), max(heads)) for kind in ("query", "key", "value", "error")},
        "loss": 2.5,
        "notes": ("padding unknown",),
    }
    names = layers or tuple(f"transformer.h.{index}.attn" for index in range(len(heads)))
    return StepReport(step=step, layers=names, heads=heads, **(defaults | changes))  # type: ignore[arg-type]


def alarm(step: int = 0, new: bool = True, name: str = "logit_explosion", layer: str = "transformer.h.0.attn") -> Alarm:
    return Alarm(name, layer, (0, 2), step, 0, 123.456, 50.0, "Lower the learning rate.", new)


def head_map(
    layer: str = "transformer.h.0.attn", head: int = 1, rows: int = 64, columns: int = 64, forward_only: bool = False
) -> HeadMap:
    generator = torch.Generator().manual_seed(head)
    hidden = torch.ones(rows, columns).triu(1).bool()
    scores = torch.randn(rows, columns, generator=generator)
    attention = scores.masked_fill(hidden, -math.inf).softmax(-1).masked_fill(hidden, math.nan)
    compatibility = torch.randn(rows, columns, generator=generator).masked_fill(hidden, math.nan) * 1e-3
    values = torch.randn(columns, 8, generator=generator)
    return HeadMap(
        layer,
        head,
        attention,
        None if forward_only else compatibility,
        None if forward_only else -compatibility,
        values,
        tuple(range(0, 3 * columns, 3)),
    )


def every_kind() -> list[StepReport]:
    """One report of each kind, in the order of a run that goes wrong in every way."""
    infinite = torch.full((3, 4), math.inf, dtype=torch.float64)
    nothing = torch.full((3, 4), math.nan, dtype=torch.float64)
    return [
        full_report(0),
        StepReport(step=1),
        StepReport(step=2, layers=("a",), heads=(0,), statistics={"entropy": torch.empty(1, 0, dtype=torch.float64)}),
        full_report(3, statistics={"entropy": nothing, "max_logit": infinite, "advantage_max": -infinite}),
        full_report(4, heads=(1, 12, 3, 5), loss=math.nan, residual=None),
        StepReport(step=5, invalid="no backward ran"),
        full_report(6, alarms=(alarm(6), alarm(6, new=False, name="dead_head")), warnings=("h.3: autograd.Function",)),
        full_report(7, maps=(head_map(), head_map(forward_only=True, head=2), head_map(head=3, rows=5, columns=40))),
        full_report(8, nonfinite={"error": torch.tensor([[0.0, 7, 0, 0], [0] * 4, [0] * 4])}),
        full_report(
            9,
            layers=(HOSTILE, "", "x" * 400),
            statistics={HOSTILE: infinite, "entropy": infinite},
            invalid="",
            warnings=(HOSTILE,),
            notes=(HOSTILE,),
            alarms=(alarm(9, name=HOSTILE, layer=HOSTILE),),
            maps=(head_map(layer=HOSTILE), head_map(layer="x" * 400), head_map(layer="../../outside")),
        ),
        StepReport(step=10, invalid=HOSTILE),
        full_report(7, maps=(head_map(),)),  # resumed from a checkpoint: steps come again
    ]
