"""Every arm on the same data from the same initialisations, watched; printed, drawn and saved."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from attnprobe.errors import ConfigurationError
from attnprobe.experiments.ensemble.arms import Arm
from attnprobe.experiments.ensemble.parallel import cores, each
from attnprobe.experiments.ensemble.result import new_directory, write_result
from attnprobe.experiments.ensemble.training import Course
from attnprobe.experiments.markov.model import fit
from attnprobe.experiments.markov.task import Protocol, task
from attnprobe.experiments.markov.tuning import tuned

AUTHORS_SEEDS = (42, 2024, 1337, 7777, 9999)


@dataclass(frozen=True)
class Job:
    """One arm's training, as a process of its own gets it."""

    arm: Arm
    protocol: Protocol
    seeds: tuple[int, ...]
    steps: int
    length: int
    directory: Path

    def train(self) -> Course:
        arm = self.arm
        if arm.tuned:
            arm = tuned(arm, self.protocol, steps=self.steps, length=self.length)
        data = task(self.protocol, self.length, self.seeds)
        return fit(arm, data, self.seeds, steps=self.steps, directory=self.directory)


def seeds_of(protocol: Protocol, count: int) -> tuple[int, ...]:
    """The authors' five seeds, then, as in the clean protocol, 0, 1, 2 ..."""
    named = AUTHORS_SEEDS if protocol == "authors" else ()
    return (*named, *range(count))[:count]


def run(
    logdir: Path,
    *,
    steps: int,
    seeds: int,
    length: int,
    protocol: Protocol,
    arms: Iterable[Arm] = (Arm.of("sgd"), Arm.of("v10")),
    jobs: int | None = None,
) -> str:
    """Train every seed under every arm; print, draw and save what came of it.

    Args:
        logdir: where the run gets a directory.
        steps, seeds, length: sizes.
        protocol: which chain, and which threshold.
        arms: what is compared with plain SGD, which is always among them.
        jobs: arms that train at once, each in a process of its own; None for one on each core.

    Returns:
        The text for the terminal.

    Raises:
        WriterError: ``logdir`` cannot be written. ConfigurationError: a size that cannot work.
    """
    from attnprobe.experiments.markov.picture import draw
    from attnprobe.experiments.markov.summary import describe, summarize

    for name, value, least in (("steps", steps, 1), ("seeds", seeds, 1), ("length", length, 2)):
        if value < least:
            raise ConfigurationError(f"{name} must be at least {least}, got {value}")
    directory = new_directory(logdir)
    began = time.perf_counter()
    job = Job(Arm("sgd"), protocol, seeds_of(protocol, seeds), steps, length, directory)
    jobs_to_do = [dataclasses.replace(job, arm=arm) for arm in dict.fromkeys((job.arm, *arms))]
    courses = each(Job.train, jobs_to_do, jobs=cores() if jobs is None else jobs)
    result = write_result(directory / "summary.json", summarize(courses, job))
    seconds = time.perf_counter() - began
    picture = draw(courses, result, directory / "summary.png")
    return describe(courses, result, directory, picture, seconds)
