"""The text of ``attnprobe report``: one section for each log."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from attnprobe.logs.logged import LoggedRun
from attnprobe.run_summary.alarm_table import alarm_lines
from attnprobe.run_summary.blocks import prose
from attnprobe.run_summary.head_table import head_lines
from attnprobe.writers.columns import number
from attnprobe.writers.text import plural, printable

#: Of a run's warnings so many are shown.
WARNINGS = 3


def summarize(runs: Mapping[str, LoggedRun], heads: int = 10) -> str:
    """Probes, loss, warnings, every alarm, and the heads that most deserve a look, of each log.

    Args:
        runs: name -> log, as ``logs.read_logs`` gives them.
        heads: show so many heads of each at most; 0 shows all.
    """
    return "\n\n".join(
        "\n".join([printable(name), *(f"  {line}" for line in _section(run, heads))]) for name, run in runs.items()
    )


def _section(run: LoggedRun, heads: int) -> Iterator[str]:
    yield from _several("problem", run.source.problems)
    if not len(run):
        yield "no probes: nothing was logged yet, or the run ended before the first probed step"
        return
    yield f"{plural(len(run), 'probe')}, step {run.steps[0]} to {run.steps[-1]}; {_loss(run)}"
    if invalid := run.invalid:
        step, reason = [*invalid.items()][-1]
        yield from prose(f"{len(invalid)} of them invalid, the last at step {step}: {reason}")
    yield from _several("warning", [*run.source.warnings])
    if run.alarms:
        yield f"{plural(len(run.alarms), 'alarm')}:"
        yield from alarm_lines(run.alarms)
    else:
        yield "no alarms"
    if sum(run.heads):
        yield from head_lines(run, heads)


def _loss(run: LoggedRun) -> str:
    known = np.flatnonzero(~np.isnan(run.loss))
    if not known.size:
        return "loss unknown"
    first, last = (f"{number(run.loss[index])} (step {run.steps[index]})" for index in known[[0, -1]])
    return f"loss {first} -> {last}"


def _several(what: str, texts: Sequence[str]) -> Iterator[str]:
    """How many there are, and the first of them."""
    if texts:
        first = f", the first {WARNINGS}" if len(texts) > WARNINGS else ""
        yield f"{plural(len(texts), what)}{first}:"
        yield from (f"  {line}" for text in texts[:WARNINGS] for line in prose(text))
