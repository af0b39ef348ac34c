"""Runs on disk, by their content: what was trained once is read again until anything that it depends on changes."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import inspect
import json
import math
import os
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import torch

import attnprobe
from attnprobe.logs import report_of
from attnprobe.writers.jsonl import to_dict
from attnprobe.writers.strict_json import dumps
from benchmarks.faults import model, tasks, train
from benchmarks.faults.injections import Fault, _scale
from benchmarks.faults.setup import Setup

#: Parts of the package on which a run's statistics do not depend.
_AFTERWARDS = {
    "alarms", "writers", "experiments", "cli", "logs", "run_summary", "calibrate", "lightning", "huggingface",
    "schedules", "report",
}  # fmt: skip


class Cache:
    """Runs in a directory, one file each; safe for several processes.

    Args:
        directory: made where missing.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def path(self, setup: Setup) -> Path:
        return self.directory / f"{key(setup)}.json.gz"

    def missing(self, setups: Iterable[Setup]) -> list[Setup]:
        return [setup for setup in dict.fromkeys(setups) if not self.path(setup).exists()]

    def fill(self, setup: Setup) -> None:
        """Train the run, and keep it."""
        run = train.train(setup)
        line = dumps(
            {
                "setup": dataclasses.asdict(setup),
                "losses": run.losses,
                "gradients": run.gradients,
                "probes": [to_dict(report) for report in run.reports],
            }
        )
        path = self.path(setup)
        partly = path.with_suffix(f".{os.getpid()}")
        partly.write_bytes(gzip.compress(line.encode(), 3))
        partly.replace(path)  # whole or not at all

    def read(self, setup: Setup) -> train.Run:
        data = json.loads(gzip.decompress(self.path(setup).read_bytes()))
        losses, gradients = (list(map(_number, data[name])) for name in ("losses", "gradients"))
        return train.Run(setup, losses, gradients, [report_of(probe) for probe in data["probes"]])


def _number(value: float | str | None) -> float:
    return math.nan if value is None else float(value)


def key(setup: Setup) -> str:
    told = [json.dumps(dataclasses.asdict(setup)), _sources(), _fault(setup.injected)]
    return hashlib.sha256("\n".join(told).encode()).hexdigest()[:32]


@cache
def _fault(fault: Fault) -> str:
    """Source of the fault, and of what faults share."""
    return inspect.getsource(type(fault)) + inspect.getsource(_scale)


@cache
def _sources() -> str:
    """Digest of all that statistics and training depend on, whatever the run."""
    texts = [inspect.getsource(each).encode() for each in (model, tasks, train, Fault)]
    texts += [path.read_bytes() for path in _package()]
    return hashlib.sha256(b"\0".join(texts) + torch.__version__.encode()).hexdigest()


def _package() -> Iterator[Path]:
    root = Path(attnprobe.__file__).parent
    for path in sorted(root.rglob("*")):
        part = path.relative_to(root).parts[0].removesuffix(".py")
        if path.suffix in (".py", ".c", ".h") and part not in _AFTERWARDS:
            yield path
