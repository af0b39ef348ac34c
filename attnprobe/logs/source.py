"""What a log of a run gives, whatever its format: the probes, and any statistic of them, read when asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from attnprobe.logs.episodes import Episode
from attnprobe.writers.text import printable

Numbers: TypeAlias = "NDArray[np.float32] | NDArray[np.float64]"

#: How the names of arrays begin that are no statistics and have shapes of their own.
PICTURES = ("map/", "usage/")

_Step = TypeVar("_Step")


class Layout(NamedTuple):
    """The layers that a probe saw, and their numbers of query heads."""

    layers: tuple[str, ...] = ()
    heads: tuple[int, ...] = ()


class Probe(NamedTuple):
    """What there is to know of a probe without its heads' numbers; ``layout`` counts in the source's list."""

    step: int
    layout: int
    loss: float = math.nan
    invalid: str = ""


class Source(Protocol):
    """One log of one run.

    Attributes:
        probes: in the order of their steps, without those that a resumed run took again. New ones are appended to this
            list; where known ones change, it is another list.
        layouts: every layout that a probe had, in the order of first sight.
        episodes: the alarms.
        warnings, notes: every different one, in the order of first sight.
        problems: what could not be read of the log.
        dimensions: name of every array -> its number of dimensions: 2 is ``[layers, heads]``, 1 is ``[layers]``.
            Beside statistics: ``residual``, ``nonfinite/<kind>``, ``map/<layer>/head<h>`` ``[panels, rows, columns]``
            and ``usage/<layer>/head<h>`` ``[columns]``.
    """

    @property
    def probes(self) -> Sequence[Probe]: ...
    @property
    def layouts(self) -> Sequence[Layout]: ...
    @property
    def episodes(self) -> Sequence[Episode]: ...
    @property
    def warnings(self) -> Iterable[str]: ...
    @property
    def notes(self) -> Iterable[str]: ...
    @property
    def problems(self) -> Sequence[str]: ...
    @property
    def dimensions(self) -> Mapping[str, int]: ...

    def holds(self, name: str) -> list[int]:
        """The probes that have the array ``name``."""

    def arrays(self, name: str, probes: Iterable[int]) -> Iterator[Numbers | None]:
        """The array ``name`` at each of these probes, in the probe's own layout; None where it has none."""

    def curve(self, name: str, layer: str, head: int) -> Numbers:
        """``[probes]``: one head's value of a statistic of two dimensions, NaN where there is none."""


def not_superseded(found: Iterable[_Step], step: Callable[[_Step], int]) -> list[_Step]:
    """Without the steps that a run, resumed from an earlier checkpoint, took again."""
    kept: list[_Step] = []
    for one in found:
        while kept and step(kept[-1]) >= step(one):
            kept.pop()
        kept.append(one)
    return kept


def picture_name(kind: str, layer: str, head: int) -> str:
    """Name of the array ``map`` or ``usage`` of one head, as the writer's tags have it."""
    return f"{kind}/{printable(layer)}/head{head}"
