"""Which probes and pictures of a run go into a page of bounded size."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from attnprobe.logs.logged import LoggedRun
from attnprobe.logs.source import Numbers, picture_name
from attnprobe.view import answers
from attnprobe.view.packing import BYTES
from attnprobe.view.thinning import evenly

#: Probes of a run that are embedded, if they fit; those of alarms and extremes are added, if they fit as well.
PROBES, FEWEST = 200, 20
#: Alarms whose probes are embedded in any case.
ALARMS = 100


def probes(run: LoggedRun, room: int) -> list[int]:
    """Ascending indices of the probes to embed: evenly spaced, where alarms changed, and each statistic's extremes.

    Args:
        room: bytes that the evenly spaced ones may fill, and again the others.
    """
    layers, heads = run.layout
    size = BYTES * len(layers) * max(heads, default=1) * max(1, len(run.statistics))
    fitting = max(FEWEST, room // max(1, size))
    most = min(PROBES, fitting)
    if len(run) <= most:
        return list(range(len(run)))
    alarms = run.alarms[:ALARMS]
    raised, last = ([getattr(alarm, end).step for alarm in alarms] for end in ("first", "last"))
    turns = [np.searchsorted(run.steps, steps).tolist() for steps in (raised, last)]
    needed = dict.fromkeys(index for index in (*turns[0], *_extremes(run), *turns[1]) if index < len(run))
    return evenly(len(run), most, [*needed][:fitting])


def _extremes(run: LoggedRun) -> Iterator[int]:
    """The probes at which a statistic's largest or smallest finite number of the run is."""
    for name in (*run.statistics, *run.layer_statistics):
        ends = []
        for start in range(0, len(run), answers.BLOCK):
            values = answers.frames(run, name, start, start + answers.BLOCK)
            values = np.where(np.isfinite(values), values, np.nan).reshape(len(values), -1)
            low = np.fmin.reduce(values, axis=1, initial=np.inf)
            ends.append(np.stack([low, np.fmax.reduce(values, axis=1, initial=-np.inf)]))
        low, high = np.concatenate(ends, axis=1)
        yield from (int(low.argmin()), int(high.argmax()))


def pictured(run: LoggedRun, room: int) -> dict[tuple[str, int], int]:
    """(layer, head) -> at how many steps its pictures are embedded: of all heads, those of alarms first, that fit."""
    alarming = {(alarm.first.layer, head) for alarm in run.alarms for head in alarm.heads}
    order = sorted(run.maps, key=lambda where: where not in alarming)
    sizes = {}
    for layer, head in order:
        found = answers.pictures(run, layer, head, np.inf)
        usage = answers.usage(run, layer, head)
        if found:
            sizes[layer, head] = BYTES * found[1].size, BYTES * usage[1].size if usage else 0
            room -= sum(sizes[layer, head])
            if room < 0:
                del sizes[layer, head]
                break
    spare = max(0, room) // max(1, sum(size for size, _ in sizes.values()))
    return {where: 1 + min(11, spare) for where in sizes}


def pictures(run: LoggedRun, layer: str, head: int, most: int) -> Iterator[tuple[int, Numbers]]:
    """(step, pictures) at so many steps, the last one always."""
    name = picture_name("map", layer, head)
    held = run.source.holds(name)
    chosen = [held[index] for index in evenly(len(held), most)] if most > 1 else held[-1:]
    for probe, values in zip(chosen, run.source.arrays(name, chosen), strict=True):
        if values is not None:
            yield run.source.probes[probe].step, values
