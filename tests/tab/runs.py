"""Small runs, and what they hold as plain arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attnprobe.logs.events import EventSource
from attnprobe.logs.logged import LoggedRun
from attnprobe.logs.reports import ReportSource
from attnprobe.report import Alarm, HeadMap, StepReport
from attnprobe.writers import TensorBoardWriter

HOSTILE = "h.0/<b>&\"'\n\t\x1b[31m\u202e ünï \U0001f600 %2e%2e/..\\?run=#x+y"


def report(step: int, heads: Sequence[int] = (2, 3), layers: Sequence[str] = (), **changes: Any) -> StepReport:
    """Statistics of heads and of layers, of the catalogue and of one's own, at random, rounded to float32."""
    generator = torch.Generator().manual_seed(step + 1000 * len(heads))
    beyond = torch.arange(max(heads))[None] >= torch.tensor(heads)[:, None]

    def numbers() -> torch.Tensor:
        values = torch.randn(beyond.shape, generator=generator)
        return values.double().masked_fill(beyond, math.nan)

    defaults = {
        "loss": float(torch.rand((), generator=generator)),
        "statistics": {"my/own": numbers(), "max_logit": numbers() * 50, "entropy": numbers().abs()},
        "layer": {"shared_dead_columns": numbers()[:, 0], "own layer": numbers()[:, 0]},
        "residual": numbers() * 1e-6,
    }
    names = tuple(layers) or tuple(f"h.{index}" for index in range(len(heads)))
    return StepReport(step, names, tuple(heads), **(defaults | changes))


def alarm(step: int, name: str = "logit_explosion", layer: str = "h.0", value: float = 9.5) -> Alarm:
    return Alarm(
        name, layer, (0,), step, step, value, 2.0, "Lower it.", True, "alarm", ((step, value),), False, ("max_logit",)
    )


def head_map(seed: int, layer: str = "h.0", head: int = 1, columns: int = 4, usage: bool = True) -> HeadMap:
    generator = torch.Generator().manual_seed(seed)
    attention, compatibility = torch.rand(2, 3, columns, generator=generator)
    seen = torch.rand(columns, generator=generator) if usage else None
    return HeadMap(
        layer, head, attention, compatibility, -compatibility, torch.ones(columns, 2), tuple(range(columns)), seen
    )


def eventful() -> list[StepReport]:
    """What a training may do: layers that come later, NaN, infinities, a probe of nothing, alarms, pictures."""
    gap = report(4)
    gap.statistics["entropy"][0, 1] = math.nan
    gap.statistics["max_logit"][1] = torch.tensor([math.inf, -math.inf, 0.0])
    counts = {"error": torch.tensor([[0.0, 3.0, math.nan], [0.0, 0.0, 1.0]])}
    return [
        report(0, maps=(head_map(0), head_map(1, head=0, usage=False))),
        report(2, alarms=(alarm(2),), warnings=("careful",)),
        gap,
        StepReport(6, invalid="no backward ran"),
        report(8, heads=(2, 3, 5), maps=(head_map(2, columns=6),), nonfinite={}),
        report(10, heads=(3,), layers=("h.1",), loss=math.nan, notes=("so it is",)),
        report(12, nonfinite=counts, alarms=(alarm(12, "other"),), maps=(head_map(3),)),
        report(15, heads=(1, 2), layers=(HOSTILE, "h.0"), loss=math.inf, maps=(head_map(4, HOSTILE, 0),)),
    ]


def kept(reports: Sequence[StepReport]) -> LoggedRun:
    return LoggedRun("kept", ReportSource(reports))


def write(directory: Path, *reports: StepReport) -> Path:
    writer = TensorBoardWriter(directory)
    for each in reports:
        writer.write(each)
    writer.close()
    return directory


def logged(directory: Path, *reports: StepReport) -> LoggedRun:
    source = EventSource(write(directory, *reports), verify=True)
    source.refresh()
    assert not source.problems
    return LoggedRun("logged", source)


def table(reports: Sequence[StepReport], name: str) -> NDArray[np.float64]:
    """``[probes, layers, heads]`` of a statistic number by number; one head where it is the layer's."""
    layers = list(dict.fromkeys(layer for each in reports for layer in each.layers))
    most = max(count for each in reports for count in each.heads)
    found = [_tensor(each, name) for each in reports]
    level = next(values.ndim for values in found if values is not None)
    result = np.full((len(reports), len(layers), most if level == 2 else 1), math.nan)
    for probe, (each, values) in enumerate(zip(reports, found, strict=True)):
        for row, layer in enumerate(each.layers if values is not None else ()):
            for head in range(each.heads[row] if level == 2 else 1):
                number = values[row, head] if level == 2 else values[row]
                result[probe, layers.index(layer), head] = number
    return result


def _tensor(each: StepReport, name: str) -> Any:
    if name == "residual":
        return each.residual
    if name.startswith("nonfinite/"):
        return each.nonfinite.get(name.removeprefix("nonfinite/"))
    return each.statistics.get(name, each.layer.get(name))
