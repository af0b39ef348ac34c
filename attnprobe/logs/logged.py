"""A logged run as arrays: what ``attnprobe.load`` gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attnprobe.errors import UnknownNameError
from attnprobe.logs.episodes import Episode
from attnprobe.logs.source import Layout, Numbers, Source

#: Arrays that are no statistics, by the first part of their name.
_OTHERS = {"residual", "nonfinite", "map", "usage"}


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
        found = self.source.dimensions.items()
        return tuple(name for name, number in found if number == dimensions and name.split("/")[0] not in _OTHERS)

    @property
    def alarms(self) -> tuple[Episode, ...]:
        """Every alarm from when to when, in the order raised."""
        return tuple(self.source.episodes)

    @property
    def maps(self) -> tuple[tuple[str, int], ...]:
        """(layer, head) of the heads whose pictures were recorded."""
        names = [name.removeprefix("map/") for name in self.source.dimensions if name.startswith("map/")]
        return tuple((layer, int(head)) for layer, _, head in (name.rpartition("/head") for name in names))

    def __contains__(self, name: str) -> bool:
        return name in self.source.dimensions

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
        if self.source.dimensions.get(name) not in (1, 2) or name.startswith("usage/"):
            raise UnknownNameError.among("statistic", name, self._names(2) + self._names(1))
        layers, heads = self.layout
        shape = (len(layers), max(heads, default=0))[: self.source.dimensions[name]]
        rows = [[layers.index(layer) for layer in each.layers] for each in self.source.layouts]
        found = self.source.arrays(name, probes)
        result: Numbers | None = None
        for index, (probe, values) in enumerate(zip(probes, found, strict=True)):
            if values is not None:
                if result is None:
                    result = np.full((len(probes), *shape), np.nan, values.dtype)
                where = rows[self.source.probes[probe].layout]
                result[(index, where, *(slice(size) for size in values.shape[1:]))] = values
        return np.full((len(probes), *shape), np.nan, np.float32) if result is None else result

    def curve(self, name: str, layer: str, head: int) -> Numbers:
        """``[probes]``: one head's value of a statistic, NaN where there is none."""
        return self.source.curve(name, layer, head)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One plain dictionary per probe, layer and head: statistics of the head, and those of its layer."""
        arrays = {name: self[name] for name in (*self.statistics, *self.layer_statistics)}
        layers, heads = self.layout
        for index, probe in enumerate(self.source.probes):
            for row, layer in enumerate(layers):
                for head in range(heads[row]):
                    numbers = {
                        name: float(values[index, row] if values.ndim == 2 else values[index, row, head])
                        for name, values in arrays.items()
                    }
                    yield {"step": probe.step, "layer": layer, "head": head} | numbers

    def to_frame(self) -> Any:
        """One row per probe, layer and head: a pandas DataFrame, or a list of dictionaries without pandas."""
        try:
            import pandas
        except ImportError:
            return list(self.rows())
        layers, heads = self.layout
        there = [(row, head) for row, number in enumerate(heads) for head in range(number)]
        row, head = (np.array([each[axis] for each in there], np.intp) for axis in (0, 1))
        columns: dict[str, Any] = {
            "step": np.repeat(self.steps, len(there)),
            "layer": np.tile(np.array(layers, object)[row], len(self)),
            "head": np.tile(head, len(self)),
        }
        for name in self.statistics:
            columns[name] = self[name][:, row, head].ravel()
        for name in self.layer_statistics:
            columns[name] = self[name][:, row].ravel()
        return pandas.DataFrame(columns)
