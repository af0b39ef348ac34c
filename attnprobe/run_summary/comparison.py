"""Two runs beside each other: their alarms, their layers, and the heads that differ most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnprobe.logs.logged import LoggedRun
from attnprobe.run_summary.alarm_pairs import AlarmPair, alarm_pairs
from attnprobe.run_summary.course import probes_of, values_at
from attnprobe.run_summary.spread import difference, spread


class Place(NamedTuple):
    """A head that both runs have, and the rows of its layer in their arrays."""

    layer: str
    head: int
    row_a: int
    row_b: int


class Difference(NamedTuple):
    """The statistic in which a head differs most between the runs, in widths of the ``spread`` of all their heads."""

    place: Place
    statistic: str
    a: float
    b: float
    distance: float


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found.

    Attributes:
        a, b: the runs.
        probes: the probe of each whose heads are compared; None where one of them measured nothing.
        same_step: whether these are of one step: the last that both measured. Otherwise each is the last of its run.
        alarms: those that only ``a`` raised, only ``b``, and both.
        only_a, only_b: layers that the other run does not have.
        resized: layer -> its number of heads in each, where it differs.
        medians: statistic -> that of all heads of each.
        alone: statistics that only one of the two probes has, and that are not compared.
        differences: of every head that is not the same in both, the largest first.
    """

    a: LoggedRun
    b: LoggedRun
    probes: tuple[int, int] | None
    same_step: bool
    alarms: tuple[AlarmPair, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    resized: dict[str, tuple[int, int]]
    medians: dict[str, tuple[float, float]]
    alone: tuple[str, ...]
    differences: tuple[Difference, ...]


def compare(a: LoggedRun, b: LoggedRun) -> Comparison:
    """Layers and heads are matched by name and number."""
    probes, same_step = _probes(a, b)
    found_a, found_b = (values_at(a, probes[0]), values_at(b, probes[1])) if probes else ({}, {})
    sizes_a, sizes_b = (dict(zip(*run.layout, strict=True)) for run in (a, b))
    shared = [layer for layer in a.layers if layer in sizes_b]
    places = [
        Place(layer, head, a.layers.index(layer), b.layers.index(layer))
        for layer in shared
        for head in range(min(sizes_a[layer], sizes_b[layer]))
    ]
    return Comparison(
        a,
        b,
        probes,
        same_step,
        alarm_pairs(a, b),
        only_a=tuple(layer for layer in a.layers if layer not in sizes_b),
        only_b=tuple(layer for layer in b.layers if layer not in sizes_a),
        resized={layer: (sizes_a[layer], sizes_b[layer]) for layer in shared if sizes_a[layer] != sizes_b[layer]},
        medians={
            name: (spread(found_a[name]).median, spread(found_b[name]).median) for name in found_a if name in found_b
        },
        alone=tuple(name for name in {**found_a, **found_b} if (name in found_a) != (name in found_b)),
        differences=tuple(differences(found_a, found_b, places)),
    )


def _probes(a: LoggedRun, b: LoggedRun) -> tuple[tuple[int, int] | None, bool]:
    """The last probes of one step, and True; else the last of each run, and False."""
    of_a, of_b = probes_of(a), probes_of(b)
    if not of_a or not of_b:
        return None, False
    steps = {int(b.steps[index]): index for index in of_b}
    common = [(index, steps[step]) for index in of_a if (step := int(a.steps[index])) in steps]
    return (common[-1], True) if common else ((of_a[-1], of_b[-1]), False)


def differences(
    a: Mapping[str, NDArray[np.float64]], b: Mapping[str, NDArray[np.float64]], places: Sequence[Place]
) -> list[Difference]:
    """The heads at ``places`` that differ, the largest difference first; statistic -> ``[layers, heads]`` of each run.

    Of two statistics that differ alike the first counts, and a value that only one run measured does not.
    """
    rows_a, rows_b, heads = (np.array([place[axis] for place in places], np.intp) for axis in (2, 3, 1))
    best = np.zeros(len(places))
    found: dict[int, Difference] = {}
    for name in (name for name in a if name in b):
        everyone = spread(np.concatenate([a[name].ravel(), b[name].ravel()]))
        values_a, values_b = a[name][rows_a, heads], b[name][rows_b, heads]
        distance = everyone.measure(difference(values_a, values_b))
        for (index,) in np.argwhere(distance > best):
            numbers = (float(values[index]) for values in (values_a, values_b, distance))
            found[int(index)] = Difference(places[index], name, *numbers)
        best = np.fmax(best, distance)
    return sorted((found[index] for index in sorted(found)), key=lambda one: -one.distance)
