"""The heads of a run, those first that most deserve a look."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnprobe.logs.episodes import Episode
from attnprobe.logs.logged import LoggedRun
from attnprobe.run_summary.course import probes_of, statistics_of, values_at
from attnprobe.run_summary.spread import difference, spread

#: A head's peers are the heads of its layer, since layers differ by nature; all heads, where fewer than these are left.
PEERS = 4


class HeadAlarm(NamedTuple):
    """An alarm that concerned a head; whether it still does at the last probe."""

    name: str
    severity: str
    standing: bool


class StandsOut(NamedTuple):
    """The statistic in which a head is furthest from the median of its ``peers``, see ``spread``."""

    statistic: str
    value: float
    median: float
    distance: float


@dataclass(frozen=True)
class Head:
    """One head.

    Attributes:
        layer, head: its name.
        row: of its layer in the run's arrays.
        alarms: those that stand first, each name once.
        stands_out: at the last valid probe; None where nothing was measured there, or the head is like the others.
        measured: whether any valid probe measured anything.
    """

    layer: str
    row: int
    head: int
    alarms: tuple[HeadAlarm, ...]
    stands_out: StandsOut | None
    measured: bool

    @property
    def urgency(self) -> tuple[float, ...]:
        """The smaller the sooner: alarms that stand, alarms that were cleared, what stands out most."""
        standing = [alarm for alarm in self.alarms if alarm.standing]
        cleared = [alarm for alarm in self.alarms if not alarm.standing]
        distance = self.stands_out.distance if self.stands_out else -float(not self.measured)
        return (0 if standing else 1 if cleared else 2, *_severe(standing), *_severe(cleared), -distance)


def _severe(alarms: list[HeadAlarm]) -> tuple[int, int]:
    return -sum(alarm.severity != "information" for alarm in alarms), -len(alarms)


def worst_first(run: LoggedRun) -> list[Head]:
    """Every head of the run; of two alike the one that comes first in the model."""
    probes = probes_of(run)
    lately = values_at(run, probes[-1]) if probes else {}
    outstanding = stand_out(lately, (len(run.layers), max(run.heads, default=0)))
    measured = _measured(run, lately.values())
    heads = [
        Head(
            layer,
            row,
            head,
            tuple(_alarms(run.alarms, layer, head)),
            outstanding.get((row, head)),
            bool(measured[row, head]),
        )
        for row, (layer, count) in enumerate(zip(*run.layout, strict=True))
        for head in range(count)
    ]
    return sorted(heads, key=lambda head: head.urgency)


def stand_out(statistics: dict[str, NDArray[np.float64]], shape: tuple[int, int]) -> dict[tuple[int, int], StandsOut]:
    """Row and head -> where it stands out most among ``[layers, heads]``; without those that are like their peers."""
    best = np.zeros(shape)
    found: dict[tuple[int, int], StandsOut] = {}
    for name, values in statistics.items():
        for row, one in enumerate(values):
            peers = spread(one if np.isfinite(one).sum() >= PEERS else values)
            distance = peers.measure(difference(one, peers.median))
            for head in np.flatnonzero(distance > best[row]):
                found[row, int(head)] = StandsOut(name, float(one[head]), peers.median, float(distance[head]))
            best[row] = np.fmax(best[row], distance)
    return found


def _measured(run: LoggedRun, lately: Iterable[NDArray[np.float64]]) -> NDArray[np.bool_]:
    """``[layers, heads]``; the earlier probes are only read where the last one leaves a head open."""
    there = np.arange(max(run.heads, default=0)) < np.array(run.heads, int)[:, None]
    known = np.zeros(there.shape, bool)
    for values in lately:
        known |= ~np.isnan(values)
    for name in statistics_of(run):
        if not (there & ~known).any():
            break
        known |= ~np.isnan(run[name][run.valid]).all(axis=0)
    return known


def _alarms(episodes: Iterable[Episode], layer: str, head: int) -> Iterator[HeadAlarm]:
    concerned = [episode for episode in episodes if episode.last.layer == layer and head in episode.heads]
    found = {(each.last.name, each.standing and head in each.last.heads): each.last.severity for each in concerned}
    names = {name: severity for (name, standing), severity in found.items() if standing}
    yield from (HeadAlarm(name, severity, True) for name, severity in names.items())
    yield from (HeadAlarm(name, severity, False) for (name, _), severity in found.items() if name not in names)
