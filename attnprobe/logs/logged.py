"""A logged run as arrays: what ``attnprobe.load`` gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnprobe.errors import UnknownNameError
from attnprobe.logs.episodes import Episode
from attnprobe.logs.source import PICTURES, Layout, Numbers, Source, picture_name

#: How the names of arrays begin that are no statistics.
_OTHERS = ("nonfinite/", *PICTURES)


class LoggedRun:
    """Every probe of one run: ``run["entropy"]`` is ``[probes, layers, heads]``.

    Nothing but the probes' steps is read before it is asked for.

    Attributes:
        name: the log's path relative to where it was looked for.
        source: the log itself.
    """

    def __init__(self, name: str, source: Source) -> None:
        self.name = name
        self.source = source

    def __len__(self) -> int:
        return len(self.source.probes)

    def __repr__(self) -> str:
        layers, heads = self.layout
        return f"LoggedRun({self.name!r}: {len(self)} probes, {len(layers)} layers, {sum(heads)} heads)"

    @property
    def steps(self) -> NDArray[np.int64]:
        """``[probes]``."""
        return np.array([probe.step for probe in self.source.probes], np.int64)

    @property
    def loss(self) -> NDArray[np.float64]:
        """``[probes]``, NaN where unknown."""
        return np.array([probe.loss for probe in self.source.probes], np.float64)

    @property
    def valid(self) -> NDArray[np.bool_]:
        """``[probes]``, False where nothing could be measured; why is in ``invalid``."""
        return np.array([not probe.invalid for probe in self.source.probes], np.bool_)

    @property
    def invalid(self) -> dict[int, str]:
        """Step -> why this probe measured nothing trustworthy."""
        return {probe.step: probe.invalid for probe in self.source.probes if probe.invalid}

    @property
    def layout(self) -> Layout:
        """Every layer that a probe saw, in the order of first sight, and the most heads that it had."""
        most: dict[str, int] = {}
        for layers, heads in self.source.layouts:
            for layer, number in zip(layers, heads, strict=True):
                most[layer] = max(number, most.get(layer, 0))
        return Layout(tuple(most), tuple(most.values()))

    @property
    def layers(self) -> tuple[str, ...]:
        return self.layout.layers

    @property
    def heads(self) -> tuple[int, ...]:
        return self.layout.heads

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the statistics with a number per head."""
        return self._names(2)

    @property
    def layer_statistics(self) -> tuple[str, ...]:
        """Names of the statistics with a number per layer."""
        return self._names(1)

    def _names(self, dimensions: int) -> tuple[str, ...]:
        found = [name for name, number in self.source.dimensions.items() if number == dimensions]
        return tuple(name for name in found if name != "residual" and not name.startswith(_OTHERS))

    @property
    def alarms(self) -> tuple[Episode, ...]:
        """Every alarm from when to when, in the order raised."""
        return tuple(self.source.episodes)

    @property
    def maps(self) -> tuple[tuple[str, int], ...]:
        """(layer, head) of the heads whose pictures were recorded."""
        there = [(layer, head) for layer, number in zip(*self.layout, strict=True) for head in range(number)]
        found = self.source.dimensions
        return tuple((layer, head) for layer, head in there if picture_name("map", layer, head) in found)

    def __contains__(self, name: str) -> bool:
        return self.source.dimensions.get(name) in (1, 2) and not name.startswith("usage/")

    def __getitem__(self, name: str) -> NDArray[np.float64]:
        """The statistic ``name``: ``[probes, layers, heads]``, or ``[probes, layers]`` for one of a layer.

        NaN where it was not measured. Also ``residual`` and ``nonfinite/<kind>``.

        Raises:
            UnknownNameError: no probe of this run holds that statistic; the message lists what they hold.
        """
        return self.values(name, range(len(self))).astype(np.float64)

    def values(self, name: str, probes: range) -> Numbers:
        """The same for some of the probes, in the precision in which it was logged.

        Raises:
            UnknownNameError: as above.
        """
        if name not in self:
            raise UnknownNameError.among("statistic", name, self._names(2) + self._names(1))
        layers, heads = self.layout
        shape = (len(layers), max(heads, default=0))[: self.source.dimensions[name]]
        rows = self._rows()
        found = self.source.arrays(name, probes)
        result: Numbers | None = None
        for index, (probe, values) in enumerate(zip(probes, found, strict=True)):
            if values is not None:
                if result is None:
                    result = np.full((len(probes), *shape), np.nan, values.dtype)
                where = rows[self.source.probes[probe].layout]
                if values.ndim == 1:
                    result[index, where] = values
                else:
                    result[index, where, : values.shape[1]] = values
        return np.full((len(probes), *shape), np.nan, np.float32) if result is None else result

    def _rows(self) -> list[NDArray[np.intp]]:
        """Which row of ours each layer of each of the source's layouts is."""
        layers = self.layout.layers
        return [np.array([layers.index(layer) for layer in each.layers], np.intp) for each in self.source.layouts]

    def curve(self, name: str, layer: str, head: int) -> Numbers:
        """``[probes]``: one head's value of a statistic, NaN where there is none.

        Raises:
            UnknownNameError: no probe of this run holds that statistic for each head.
        """
        if name not in self or self.source.dimensions[name] != 2:
            raise UnknownNameError.among("statistic", name, self._names(2))
        return self.source.curve(name, layer, head)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One plain dictionary per probe, layer and head: statistics of the head, and those of its layer."""
        columns = self._columns()
        for row in zip(*(column.tolist() for column in columns.values()), strict=True):
            yield dict(zip(columns, row, strict=True))

    def to_frame(self) -> Any:
        """One row per probe, layer and head: a pandas DataFrame, or a list of dictionaries without pandas."""
        try:
            import pandas
        except ImportError:
            return list(self.rows())
        return pandas.DataFrame(self._columns())

    def _columns(self) -> dict[str, NDArray[Any]]:
        layers, heads = self.layout
        rows = self._rows()
        there = np.zeros((len(self), len(layers), max(heads, default=0)), np.bool_)
        for index, probe in enumerate(self.source.probes):
            for row, number in zip(rows[probe.layout], self.source.layouts[probe.layout].heads, strict=True):
                there[index, row, :number] = True
        at, row, head = np.nonzero(there)
        columns = {"step": self.steps[at], "layer": np.array(layers, object)[row], "head": head}
        columns |= {name: self[name][at, row, head] for name in self.statistics}
        return columns | {name: self[name][at, row] for name in self.layer_statistics}
