"""What the page asks about runs: pure functions from logged runs to plain values and arrays.

========  =============================  ==============================================================================
question  arguments                      answer
========  =============================  ==============================================================================
runs      -                              names, steps, layers, alarms, and what each statistic means
frames    run, name, start, stop         ``[probes, layers, heads]`` of a statistic; one head where it is the layer's
range     run, name                      the ends of all its numbers: see ``limits``
head      run, layer, head, points       the curves of all statistics, thinned out with extremes kept
map       run, layer, head, step         the last pictures up to a step ``[panels, rows, columns]``, and their step
usage     run, layer, head               the columns' usage over steps ``[probes, columns]``, and these steps
========  =============================  ==============================================================================
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import numpy as np

from attnprobe.catalog import STATISTICS, Statistic
from attnprobe.logs.episodes import Episode
from attnprobe.logs.logged import LoggedRun
from attnprobe.logs.source import Numbers, picture_name
from attnprobe.view.thinning import evenly, extremes_kept
from attnprobe.writers import describe

SCHEMA = 1
#: So many of the newest findings of each kind; a run may have raised thousands.
MOST = 1000
#: A picture of usage over steps has no more rows than a screen.
ROWS = 400
#: Probes that are read at once.
BLOCK = 256

_DIAGNOSTICS = {"residual": describe.RESIDUAL}


def overview(runs: Iterable[LoggedRun]) -> dict[str, Any]:
    """The answer to ``runs``."""
    runs = list(runs)
    dimensions: dict[str, int] = {}
    for run in runs:
        for name in names_of(run):
            dimensions.setdefault(name, run.source.dimensions[name])
    return {
        "schema": SCHEMA,
        "statistics": {name: meaning(name, "layer" if number == 1 else "head") for name, number in dimensions.items()},
        "runs": [run_of(run, dimensions) for run in runs],
    }


def names_of(run: LoggedRun) -> tuple[str, ...]:
    """The statistics of a run in the order of the catalogue, its own ones behind, then what was not understood."""
    found = [*run.statistics, *run.layer_statistics]
    order = {name: index for index, name in enumerate(STATISTICS)}
    extra = [name for name in run.source.dimensions if name == "residual" or name.startswith("nonfinite/")]
    return (*sorted(found, key=lambda name: order.get(name, len(order))), *extra)


def meaning(name: str, level: str) -> dict[str, Any]:
    """What there is to know of a statistic, as the catalogue has it."""
    text = _DIAGNOSTICS.get(name, "A statistic of your own.")
    if name.startswith("nonfinite/"):
        text = f"How many elements of the {name.removeprefix('nonfinite/')} were NaN or infinite."
    entry = STATISTICS.get(name, Statistic(name, text, better="low" if name in _DIAGNOSTICS else ""))
    keys = ("meaning", "formula", "unit", "low", "high", "better", "source")
    return {"level": level} | {key: getattr(entry, key) for key in keys}


def run_of(run: LoggedRun, dimensions: Mapping[str, int]) -> dict[str, Any]:
    """All but the numbers. A statistic that has other ``dimensions`` in the runs beside this one is left out."""
    # The latest findings are those that stood last: the first of them may be from the first probe.
    latest = sorted(run.alarms, key=lambda episode: episode.last.step)[-MOST:]
    return {
        "name": run.name,
        "steps": run.steps,
        "loss": run.loss,
        "layers": run.layers,
        "heads": run.heads,
        "names": [name for name in names_of(run) if run.source.dimensions[name] == dimensions[name]],
        "alarms": [alarm_of(episode) for episode in sorted(latest, key=lambda episode: episode.first.step)],
        "invalid": list(run.invalid.items())[-MOST:],
        "warnings": list(run.source.warnings)[-MOST:],
        "notes": list(run.source.notes)[-MOST:],
        "problems": list(run.source.problems),
        "maps": run.maps,
    }


def alarm_of(episode: Episode) -> dict[str, Any]:
    extra = {"value": episode.peak.value, "turns": list(episode.turns), "reads": episode.first.reads}
    return episode.to_dict() | extra


def frames(run: LoggedRun, name: str, start: int, stop: int) -> Numbers:
    """``[probes, layers, heads]``; of a statistic of the layer ``[probes, layers, 1]``."""
    values = run.values(name, range(len(run))[max(0, start) : max(0, stop)])
    return values[..., None] if values.ndim == 2 else values


def curves(run: LoggedRun, layer: str, head: int, points: int) -> dict[str, Any]:
    """Name -> ``steps`` and ``values`` of one head, each with at most ``points`` points."""
    steps = run.steps
    found: dict[str, Any] = {}
    for name in names_of(run):
        if run.source.dimensions[name] == 2:
            values = run.curve(name, layer, head)
            if not np.isnan(values).all():
                chosen = extremes_kept(values, points)
                found[name] = {"steps": steps[chosen], "values": values[chosen]}
    return found


def pictures(run: LoggedRun, layer: str, head: int, step: float) -> tuple[int, Numbers] | None:
    """(step, ``[panels, rows, columns]``): the last at or before ``step``, or the first; None where there is none."""
    name = picture_name("map", layer, head)
    probes = run.source.holds(name)
    if not probes:
        return None
    before = [probe for probe in probes if run.source.probes[probe].step <= step]
    chosen = before[-1] if before else probes[0]
    (values,) = run.source.arrays(name, [chosen])
    return None if values is None else (run.source.probes[chosen].step, values)


def usage(run: LoggedRun, layer: str, head: int) -> tuple[list[int], Numbers] | None:
    """(steps, ``[probes, columns]``) of the columns' usage; None where none was recorded.

    Sequences differ in length: a narrower one is stretched, by repetition, over the width of the widest.
    """
    name = picture_name("usage", layer, head)
    probes = run.source.holds(name)
    probes = [probes[index] for index in evenly(len(probes), ROWS)]
    found = zip(probes, run.source.arrays(name, probes), strict=True)
    rows = {run.source.probes[probe].step: values for probe, values in found if values is not None and len(values)}
    if not rows:
        return None
    width = max(map(len, rows.values()))
    stretched = [row[np.arange(width) * len(row) // width] for row in rows.values()]
    return list(rows), cast("Numbers", np.stack(stretched))
