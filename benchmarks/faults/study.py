"""From setups to verdicts: what is missing is trained, and every run is judged by its loss, the rules, and others."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import torch

from attnprobe.alarms import ALL_ALARMS
from attnprobe.alarms.losses import INFORMED
from benchmarks.faults.accepted import ACCEPTED
from benchmarks.faults.cache import Cache
from benchmarks.faults.judge import judge
from benchmarks.faults.naive import NAIVE
from benchmarks.faults.outcome import LAST, ends_above, leaves_band
from benchmarks.faults.setup import Setup
from benchmarks.faults.tasks import TASKS

#: Distances between probes at which runs are judged, and whether the rules know the uninformed loss.
PROTOCOLS = {(every, informed): f"every {every} steps{'' if informed else ', uninformed loss unknown'}"
             for every in (10, 50) for informed in (True, False)}  # fmt: skip
MAIN = (10, True)
INFORMATION = {rule.name for rule in ALL_ALARMS if rule.severity == "information"}
In = TypeVar("In")
Out = TypeVar("Out")


@dataclass(frozen=True)
class Verdict:
    """What is known of one run.

    Attributes:
        start: step of the injection.
        left: the step at which the loss left its healthy twin's band; None if it never did.
        disturbed: whether the loss ended above it.
        alarms: of each protocol, the first step at which each alarm was raised after the injection, in that order.
        naive: the first step after the injection at which each naive rule fires, where it does.
        learned: whether the loss ended below 98% of the uninformed one.
        information: under ``MAIN``, the first step at which each thing was told that is no alarm.
    """

    setup: Setup
    start: int
    left: int | None
    disturbed: bool
    alarms: dict[tuple[int, bool], dict[str, int]]
    naive: dict[str, int]
    learned: bool
    information: dict[str, int] = field(default_factory=dict)

    @property
    def counted(self) -> bool:
        """Whether an accepted alarm is due."""
        return ACCEPTED[self.setup.fault].due(self.setup.severity, disturbed=self.disturbed)

    def accepted(self, protocol: tuple[int, bool]) -> dict[str, int]:
        """The accepted alarms that were raised, and when."""
        right = ACCEPTED[self.setup.fault].alarms
        return {name: step for name, step in self.alarms[protocol].items() if name in right}

    def found(self, protocol: tuple[int, bool]) -> int | None:
        """The step of the first accepted alarm; None where the fault was missed."""
        return min(self.accepted(protocol).values(), default=None)


def fill(cache: Cache, setups: Iterable[Setup], jobs: int) -> None:
    """Train what the cache does not have; may be interrupted at any time."""
    missing = cache.missing(setups)
    started = time.perf_counter()
    for number, setup in enumerate(parallel(partial(_fill, cache.directory), missing, jobs), 1):
        if number % 20 == 0 or number == len(missing):
            taken = time.perf_counter() - started
            print(f"{number} of {len(missing)} runs in {taken:.0f} s, last: {setup}", file=sys.stderr, flush=True)


def verdicts(cache: Cache, setups: Sequence[Setup], jobs: int) -> list[Verdict]:
    """In the order of ``setups``."""
    return list(parallel(partial(_verdict, cache.directory), setups, jobs))


def parallel(work: Callable[[In], Out], items: Sequence[In], jobs: int) -> Iterable[Out]:
    """``work`` on every item, in processes of one thread each."""
    if not items:
        return
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        yield from pool.map(work, items)


def _fill(directory: Path, setup: Setup) -> Setup:
    Cache(directory).fill(setup)
    return setup


def _verdict(directory: Path, setup: Setup) -> Verdict:
    cache = Cache(directory)
    run = cache.read(setup)
    start = setup.injected.start
    twin = cache.read(setup.twin).losses if setup.fault else run.losses
    left, disturbed = leaves_band(run.losses, twin, start), ends_above(run.losses, twin)
    heard = {(every, informed): judge(run, every=every, informed=informed) for every, informed in PROTOCOLS}
    alarms = {
        protocol: {name: step for name, step in raised.items() if step >= start and name not in INFORMATION}
        for protocol, raised in heard.items()
    }
    information = {name: step for name, step in heard[MAIN].items() if name in INFORMATION}
    fired = {name: [step for step in rule(run) if step >= start] for name, rule in NAIVE.items()}
    naive = {name: steps[0] for name, steps in fired.items() if steps}
    last = run.losses[-LAST:]
    learned = sum(last) / len(last) < INFORMED * TASKS[setup.task].uninformed()
    return Verdict(setup, start, left, disturbed, alarms, naive, learned, information)
