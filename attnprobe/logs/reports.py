"""A run out of the reports that were kept of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from attnprobe.logs.episodes import Episodes
from attnprobe.logs.source import Layout, Numbers, Probe, picture_name

if TYPE_CHECKING:
    from attnprobe.report import StepReport


class ReportSource:
    """The reports of one run, in the order of their steps, as JSONLWriter and MemoryWriter keep them."""

    def __init__(self, reports: Iterable[StepReport]) -> None:
        self.reports = list(reports)
        layouts = [Layout(report.layers, report.heads) for report in self.reports]
        self.layouts = list(dict.fromkeys(layouts))
        self.probes = [
            Probe(report.step, self.layouts.index(layout), report.loss, report.invalid)
            for report, layout in zip(self.reports, layouts, strict=True)
        ]
        self.episodes = Episodes(report.alarms for report in self.reports).found
        self.warnings = list(dict.fromkeys(text for report in self.reports for text in report.warnings))
        self.notes = list(dict.fromkeys(text for report in self.reports for text in report.notes))
        self.problems: Sequence[str] = ()
        self._arrays = [dict(_arrays(report)) for report in self.reports]
        self.dimensions = {name: array.ndim for arrays in self._arrays for name, array in arrays.items()}

    def holds(self, name: str) -> list[int]:
        return [index for index, arrays in enumerate(self._arrays) if name in arrays]

    def arrays(self, name: str, probes: Iterable[int]) -> Iterator[Numbers | None]:
        for index in probes:
            tensor = self._arrays[index].get(name)
            yield None if tensor is None else tensor.double().numpy()

    def curve(self, name: str, layer: str, head: int) -> Numbers:
        values = np.full(len(self.reports), np.nan)
        for index, (report, arrays) in enumerate(zip(self.reports, self._arrays, strict=True)):
            if name in arrays and layer in report.layers and 0 <= head < arrays[name].shape[1]:
                values[index] = float(arrays[name][report.layers.index(layer), head])
        return values


def _arrays(report: StepReport) -> Iterator[tuple[str, Tensor]]:
    yield from report.statistics.items()
    yield from report.layer.items()
    if report.residual is not None:
        yield "residual", report.residual
    for kind, counts in report.nonfinite.items():
        yield f"nonfinite/{kind}", counts
    for picture in report.maps:
        yield picture_name("map", picture.layer, picture.head), torch.stack(picture.panels())
        if picture.usage is not None:
            yield picture_name("usage", picture.layer, picture.head), picture.usage
