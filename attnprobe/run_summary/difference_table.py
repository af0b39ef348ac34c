"""The heads in which two runs differ most, in text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from attnprobe.run_summary.blocks import blocks
from attnprobe.run_summary.comparison import Comparison, Difference
from attnprobe.run_summary.course import brief, probes_of, values_at
from attnprobe.run_summary.head_table import named, rest, widths
from attnprobe.writers.columns import aligned, left, number, right
from attnprobe.writers.console import COLUMNS
from attnprobe.writers.text import plural, printable


def difference_lines(found: Comparison, limit: int) -> Iterator[str]:
    """The table of differences, at most ``limit`` heads of it (0: all), and what there is to know about it."""
    runs = (found.a, found.b)
    if found.probes is None:
        nothing = [letter for letter, run in zip("AB", runs, strict=True) if not probes_of(run)]
        yield f"no heads to compare: nothing was measured in {' and '.join(nothing)}"
        return
    step_a, step_b = (run.steps[probe] for run, probe in zip(runs, found.probes, strict=True))
    when = (
        f"at step {step_a}, the last that both probed"
        if found.same_step
        else f"at the last step of each, {step_a} and {step_b}: they probed no step in common"
    )
    if not found.differences:
        yield f"no head that both have differs ({when})"
        return
    shown = found.differences[: limit or None]
    yield f"{plural(len(found.differences), 'head')} that differ, most first ({when}):"
    yield from (f"  {line}" for line in _differences(shown).split("\n"))
    yield from rest(len(found.differences) - len(shown))
    yield "difference: in robust standard deviations (1.4826 MAD) of the statistic over all heads of both runs"
    values_a, values_b = (values_at(run, probe) for run, probe in zip(runs, found.probes, strict=True))
    if names := [name for name in COLUMNS if name in values_a and name in values_b]:
        yield "A | B:"
        columns = [right([name, *_beside(values_a[name], values_b[name], shown)]) for name in names]
        yield from (f"  {line}" for line in blocks(_named(shown), columns))


def _named(shown: Sequence[Difference]) -> list[list[str]]:
    return named([(one.place.layer, one.place.head) for one in shown])


def _differences(shown: Sequence[Difference]) -> str:
    return aligned(
        [
            *_named(shown),
            left(["statistic", *(printable(one.statistic) for one in shown)]),
            right(["A", *(number(one.a) for one in shown)]),
            right(["B", *(number(one.b) for one in shown)]),
            right(["difference", *(widths(one.distance) for one in shown)]),
        ]
    )


def _beside(a: NDArray[np.float64], b: NDArray[np.float64], shown: Sequence[Difference]) -> Iterator[str]:
    """A cell for each head, out of ``[layers, heads]`` of each run."""
    cells_a = right([brief(a[one.place.row_a, one.place.head]) for one in shown])
    cells_b = left([brief(b[one.place.row_b, one.place.head]) for one in shown])
    return (f"{of_a} | {of_b}" for of_a, of_b in zip(cells_a, cells_b, strict=True))
