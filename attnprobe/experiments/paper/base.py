"""What an experiment on the paper is, and the run that leaves a picture, numbers and TensorBoard events."""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from attnprobe.errors import ConfigurationError, UnknownNameError
from attnprobe.experiments.ensemble.intervals import Interval, differences
from attnprobe.experiments.ensemble.parallel import cores
from attnprobe.experiments.ensemble.result import new_directory, write_result

#: Name on the command line -> what it asks; the module of that name in this package answers.
EXPERIMENTS = {
    "compatibility": "Do compatible queries and values find each other? Maps of b, A and attention over training",
    "manifold": "Do values come to lie on a low-dimensional manifold that the task's variable parametrises?",
    "architecture": "Do LayerNorm on values, residual connections and four heads change the picture?",
    "diversity": "How diverse have queries to be before heads and values specialise?",
    "timescales": "Does attention settle before values, under SGD, momentum, Adam and AdamW?",
    "specialization": "Do heads take disjoint sets of queries, and do lower layers settle first?",
    "beyond_softmax": "Does the advantage have an analogue in linear attention and in a selective state-space layer?",
}


@dataclass(frozen=True)
class Setting:
    """Sizes of an experiment, and where its events go."""

    seeds: tuple[int, ...]
    steps: int
    jobs: int
    directory: Path


class Experiment(Protocol):
    """What a module of this package offers.

    ``CLAIM`` is what the paper says, in our words. ``measure`` returns numbers that JSON can hold, the same for the
    same seeds; ``draw`` fills a matplotlib Figure from these; ``describe`` puts them into words.
    """

    CLAIM: str
    SEEDS: int
    STEPS: int

    def measure(self, setting: Setting) -> dict[str, Any]: ...

    def draw(self, result: dict[str, Any], figure: Any) -> None: ...

    def describe(self, result: dict[str, Any]) -> list[str]: ...


def find(name: str) -> Experiment:
    """The experiment of a name.

    Raises:
        UnknownNameError: there is none; the message lists what there is.
    """
    if name not in EXPERIMENTS:
        raise UnknownNameError.among("experiment", name, EXPERIMENTS)
    return cast(Experiment, importlib.import_module(f"attnprobe.experiments.paper.{name}"))


def run(name: str, out: Path, *, seeds: int | None = None, steps: int | None = None, jobs: int | None = None) -> str:
    """Run one experiment and write ``result.json``, ``figure.png`` and event files to a new directory below ``out``.

    Args:
        name: one of ``EXPERIMENTS``.
        out: the run goes to the first free ``run-NNN`` of ``out``/name.
        seeds, steps: sizes; None for the experiment's own.
        jobs: trainings at once; None for one on each core. The numbers do not depend on it.

    Returns:
        The text for the terminal.
    """
    experiment = find(name)
    counts = {
        "seeds": experiment.SEEDS if seeds is None else seeds,
        "steps": experiment.STEPS if steps is None else steps,
        "jobs": cores() if jobs is None else jobs,
    }
    for what, count in counts.items():
        if count < 1:
            raise ConfigurationError(f"{what} must be at least 1, got {count}")
    directory = new_directory(out / name)
    began = time.perf_counter()
    setting = Setting(tuple(range(counts["seeds"])), counts["steps"], counts["jobs"], directory)
    sizes = {"experiment": name, "claim": experiment.CLAIM, "seeds": list(setting.seeds), "steps": setting.steps}
    path = directory / "result.json"
    result = write_result(path, {**sizes, **experiment.measure(setting)})
    picture = _draw(experiment, result, directory / "figure.png")
    return "\n".join(
        [
            f"{name}: {EXPERIMENTS[name]}",
            f"The paper: {experiment.CLAIM}",
            f"{len(setting.seeds)} seeds, {setting.steps} steps, {time.perf_counter() - began:.0f} s",
            "",
            *experiment.describe(result),
            "",
            f"Numbers: {path}",
            f"Picture: {picture}" if picture else "No picture: matplotlib is missing (pip install 'attnprobe[plots]')",
            f"Every head over the steps: tensorboard --logdir {directory}",
        ]
    )


def _draw(experiment: Experiment, result: dict[str, Any], path: Path) -> Path | None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure: Any = Figure(layout="constrained", dpi=110)
    experiment.draw(result, figure)
    figure.savefig(path)
    return path


def interval(values: Sequence[float | None] | np.ndarray[Any, Any]) -> dict[str, Any]:
    """Mean and 95% interval of one value per seed, for JSON, with the values themselves."""
    given = [None if value is None or not np.isfinite(value) else float(value) for value in values]
    return {**Interval.over(given).to_dict(), "values": given}


def difference(found: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The ``interval`` of one minus another, seed by seed."""
    return interval(differences(found["values"], other["values"]))


def text(found: dict[str, Any], digits: int = 3) -> str:
    """An ``interval`` in words."""
    return Interval.from_dict(found).text(digits)
