"""The text of ``attnprobe report --compare``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from attnprobe.logs.logged import LoggedRun
from attnprobe.run_summary.alarm_pairs import AlarmPair, Raised
from attnprobe.run_summary.alarm_table import at_the_end, ranges, where
from attnprobe.run_summary.blocks import prose
from attnprobe.run_summary.comparison import Comparison
from attnprobe.run_summary.course import course
from attnprobe.run_summary.difference_table import difference_lines
from attnprobe.writers.columns import aligned, left, number, right
from attnprobe.writers.console import COLUMNS
from attnprobe.writers.text import plural, printable

_BY = {"a": "only A", "b": "only B", "both": "both"}


def comparison_text(found: Comparison, names: tuple[str, str], heads: int = 10) -> str:
    """Losses, alarms, layers, and the heads that differ most.

    Args:
        names: what to call the two runs.
        heads: show so many heads at most; 0 shows all.
    """
    return "\n".join(_lines(found, names, heads))


def _lines(found: Comparison, names: tuple[str, str], limit: int) -> Iterator[str]:
    for letter, name, run in zip("AB", names, (found.a, found.b), strict=True):
        yield f"{letter}: {printable(name)} ({printable(run.name)})"
    yield from (f"  {line}" for line in _overview(found))
    if found.alarms:
        yield f"  {plural(len(found.alarms), 'alarm')}:"
        yield from (f"    {line}" for line in _alarms(found.alarms).split("\n"))
    else:
        yield "  no alarms in either"
    yield from (f"  {line}" for text in _unmatched(found) for line in prose(text))
    yield from (f"  {line}" for line in difference_lines(found, limit))


def _unmatched(found: Comparison) -> Iterator[str]:
    for letter, layers in (("A", found.only_a), ("B", found.only_b)):
        if layers:
            yield f"{plural(len(layers), 'layer')} only in {letter}: {', '.join(layers)}"
    for layer, (of_a, of_b) in found.resized.items():
        yield f"{layer}: {plural(of_a, 'head')} in A and {of_b} in B; those of one number are compared"
    if found.alone:
        yield f"not compared, as only one of them has it: {', '.join(found.alone)}"


def _overview(found: Comparison) -> list[str]:
    runs = (found.a, found.b)
    columns = [_run(run) for run in runs]
    for side, (column, run) in enumerate(zip(columns, runs, strict=True)):
        if found.probes and found.same_step:
            probe = found.probes[side]
            column[f"loss at step {run.steps[probe]}"] = number(run.loss[probe])
        for name in COLUMNS:
            if name in found.medians:
                column[f"median {name}"] = number(found.medians[name][side])
    cells = [right([letter, *column.values()]) for letter, column in zip("AB", columns, strict=True)]
    return aligned([left(["", *columns[0]]), *cells]).split("\n")


def _run(run: LoggedRun) -> dict[str, str]:
    loss = course(run.loss)
    return {
        "probes": str(len(run)),
        "invalid": str(len(run.invalid)),
        "first step": str(run.steps[0]) if len(run) else "-",
        "last step": str(run.steps[-1]) if len(run) else "-",
        "first loss": number(float(loss.first)),
        "last loss": number(float(loss.last)),
        "lowest loss": number(float(loss.least)),
    }


def _alarms(pairs: Sequence[AlarmPair]) -> str:
    return aligned(
        [
            left(["alarm", *(printable(pair.name) for pair in pairs)]),
            left(["layer", *(where(pair.layer) for pair in pairs)]),
            left(["raised in", *(_BY[pair.by] for pair in pairs)]),
            left(["A", *(_raised(pair.a) for pair in pairs)]),
            left(["B", *(_raised(pair.b) for pair in pairs)]),
        ]
    )


def _raised(raised: Raised | None) -> str:
    if raised is None:
        return "-"
    heads = f"heads {ranges(raised.heads)}, " if raised.heads else ""
    return heads + at_the_end(raised.standing)
