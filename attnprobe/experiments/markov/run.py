"""Both schedules on the same data from the same initialisation, watched by AttentionMonitor."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import TQDMProgressBar
from pytorch_lightning.loggers import TensorBoardLogger
from torch.utils.data import DataLoader, Dataset

from attnprobe.errors import AttnProbeWarning, ConfigurationError
from attnprobe.experiments.markov.model import MarkovModel, Schedule
from attnprobe.experiments.markov.task import SYMBOLS, Protocol, Sequence, entropy_rate, sequences
from attnprobe.lightning import AttentionMonitor
from attnprobe.report import Alarm, StepReport
from attnprobe.writers import JSONLWriter, MemoryWriter
from attnprobe.writers.base import writable_directory

SCHEDULES: tuple[Schedule, ...] = ("sgd", "em")
AUTHORS_SEEDS = (42, 2024, 1337, 7777, 9999)


@dataclass
class Run:
    """One training: which, and what came of it."""

    schedule: Schedule
    seed: int
    losses: list[float]
    held_out: dict[int, float]
    reports: list[StepReport] = field(repr=False)

    @property
    def name(self) -> str:
        return f"{self.schedule}/seed{self.seed}"

    @property
    def probes(self) -> list[StepReport]:
        return [report for report in self.reports if report.valid]

    @property
    def alarms(self) -> list[Alarm]:
        return [alarm for report in self.reports for alarm in report.alarms if alarm.new]

    def to_dict(self) -> dict[str, Any]:
        return {
            "schedule": self.schedule,
            "seed": self.seed,
            "losses": self.losses,
            "held_out": self.held_out,
            "normalized_entropy": {r.step: float(r["normalized_entropy"][0, 0]) for r in self.probes},
            "alarms": [alarm.to_dict() for alarm in self.alarms],
        }


class _Repeated(Dataset[tuple[Any, Any]]):
    """The full batch, once per step."""

    def __init__(self, sequence: Sequence, steps: int) -> None:
        self.sequence, self.steps = sequence, steps

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.sequence.x, self.sequence.y


class _Bar(TQDMProgressBar):  # type: ignore[misc]
    def __init__(self, name: str) -> None:
        super().__init__(refresh_rate=20)
        self.name = name

    def on_train_epoch_start(self, trainer: Any, *_: Any) -> None:
        super().on_train_epoch_start(trainer)
        self.train_progress_bar.set_description(self.name)


def seeds_of(protocol: Protocol, count: int) -> list[int]:
    """The authors' five seeds, then, as in the clean protocol, 0, 1, 2 ..."""
    named = AUTHORS_SEEDS if protocol == "authors" else ()
    return [*named, *range(count)][:count]


def new_directory(logdir: Path) -> Path:
    """The first free ``run-001``, ``run-002`` ... in ``logdir``, created.

    Raises:
        WriterError: ``logdir`` cannot be written.
    """
    parent = writable_directory(logdir)
    for number in range(1, 100_000):
        with contextlib.suppress(FileExistsError):
            (parent / f"run-{number:03d}").mkdir()
            return parent / f"run-{number:03d}"
    raise ConfigurationError(f"{parent} is full of runs; choose another --logdir")


def train(schedule: Schedule, seed: int, protocol: Protocol, *, steps: int, length: int, directory: Path) -> Run:
    """One training with Lightning, writing events and JSONL to ``directory``/schedule/seed."""
    training, held_out = sequences(protocol, length, seed)
    model = MarkovModel(schedule, held_out, seed)
    memory = MemoryWriter()
    logger = TensorBoardLogger(directory, name=schedule, version=f"seed{seed}")
    monitor = AttentionMonitor(
        every_n_steps=50,
        statistics="all",
        maps="attention",
        writers=[memory, JSONLWriter(logger.log_dir)],
        uninformed_loss=math.log(SYMBOLS),
    )
    with _quiet():
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            devices=1,
            logger=logger,
            log_every_n_steps=10,
            enable_checkpointing=False,
            enable_model_summary=False,
            callbacks=[monitor, _Bar(f"{schedule} seed {seed}")],
        )
        trainer.fit(model, DataLoader(_Repeated(training, steps), batch_size=None))
    return Run(schedule, seed, model.losses, model.held_out, memory.reports)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Lightning's remarks on hardware and workers do not help the reader of a demo.

    One thread: at this size more of them wait for each other longer than they compute.
    """
    threads, disabled = torch.get_num_threads(), logging.root.manager.disable
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", AttnProbeWarning)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
            logging.disable(disabled)


def run(logdir: Path, *, steps: int, seeds: int, length: int, protocol: Protocol) -> str:
    """Train every seed under both schedules; print, draw and save what came of it.

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
    runs = [
        train(schedule, seed, protocol, steps=steps, length=length, directory=directory)
        for seed in seeds_of(protocol, seeds)
        for schedule in SCHEDULES
    ]
    result = summarize(runs, protocol, steps=steps, length=length)
    result["seconds"] = round(time.perf_counter() - began, 1)
    saved = {**result, "entropy_rate": entropy_rate(protocol), "runs": [each.to_dict() for each in runs]}
    (directory / "summary.json").write_text(json.dumps(saved, indent=1) + "\n")
    picture = draw(runs, result, directory / "summary.png")
    return describe(runs, result, directory, picture)
