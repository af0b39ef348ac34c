"""The logged runs of several places, each once."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path

import torch

from attnprobe.errors import AttnProbeWarning
from attnprobe.logs import read_run
from attnprobe.report import StepReport


def read_runs(places: Iterable[str | PathLike[str]]) -> dict[str, list[StepReport]]:
    """The reports of every log in or beneath the places, by the log's path.

    A log that two places lead to is one run, as are two logs of the same numbers, of which the second is left out with
    a warning: twice, a run would vouch for its own thresholds.

    Raises:
        LogError: a place holds no log, or a log cannot be read.
    """
    found: dict[Path, tuple[str, list[StepReport]]] = {}
    for place in places:
        root = Path(place).expanduser()
        base = root.parent if root.is_file() else root
        for log, reports in read_run(root).items():
            found.setdefault((base / log).resolve(), ((base / log).as_posix(), reports))
    runs: dict[str, list[StepReport]] = {}
    for name, reports in found.values():
        twin = next((other for other, known in runs.items() if _same(known, reports)), None)
        if twin is None:
            runs[name] = reports
        else:
            warnings.warn(f"{name} holds the same numbers as {twin} and is left out", AttnProbeWarning, stacklevel=2)
    return runs


def _same(one: Sequence[StepReport], other: Sequence[StepReport]) -> bool:
    """Whether two logs are of one run: the same steps, and the same numbers as far as formats keep them."""
    if not one or [report.step for report in one] != [report.step for report in other]:
        return False
    return all(map(_same_numbers, one, other))


def _same_numbers(one: StepReport, other: StepReport) -> bool:
    if (one.layers, one.heads) != (other.layers, other.heads):
        return not (one.valid and other.valid)  # of an invalid probe event files know no more than the reason
    pairs = [(one.statistics[name], other.statistics[name]) for name in {*one.statistics} & {*other.statistics}]
    pairs.append((torch.tensor(one.loss), torch.tensor(other.loss)))
    # Nine digits in JSONL, float32 in event files.
    return all(torch.allclose(a.double(), b.double(), rtol=1e-6, atol=0, equal_nan=True) for a, b in pairs)
