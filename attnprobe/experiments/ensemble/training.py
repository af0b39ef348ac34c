"""Train an ensemble under one arm, watched by the probe."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from attnprobe.experiments.ensemble.arms import Arm
from attnprobe.experiments.ensemble.intervals import first_below
from attnprobe.experiments.ensemble.model import seed_losses
from attnprobe.probe import AttentionProbe
from attnprobe.report import Alarm, HeadMap, StepReport
from attnprobe.writers import TensorBoardWriter

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Task:
    """What every seed's model learns: its own sequences.

    Attributes:
        x, y: training sequences ``[B, S, T, N]`` and targets ``[B, S, T]``.
        held_x, held_y: the same for sequences that are not trained on.
        batch: how many of the ``B`` sequences a step takes, in turn; None for all of them.
    """

    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor
    batch: int | None = None

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """The sequences and targets of one step."""
        size = self.batch or len(self.x)
        start = step * size % len(self.x)
        return self.x[start : start + size], self.y[start : start + size]


@dataclass
class Course:
    """How a training went, as plain arrays.

    Attributes:
        arm: how it was trained.
        losses: ``[steps, S]``, before each step, in nats.
        held_steps, held_out: ``[n]`` and ``[n, S]``: the loss on held-out sequences.
        probe_steps: ``[p]``.
        statistics: name -> ``[p, layers, S * H]``.
        alarms: those that were raised.
        maps: of the last probe that had some.
    """

    arm: Arm
    losses: Array
    held_steps: Array
    held_out: Array
    probe_steps: Array
    statistics: dict[str, Array] = field(default_factory=dict)
    alarms: list[Alarm] = field(default_factory=list)
    maps: tuple[HeadMap, ...] = ()

    def held_below(self, thresholds: Iterable[float]) -> list[float | None]:
        """For each seed the first step at which its held-out loss was found below its threshold."""
        found = [first_below(losses, threshold) for losses, threshold in zip(self.held_out.T, thresholds, strict=True)]
        return [None if index is None else float(self.held_steps[index]) for index in found]

    def final(self, name: str, layer: int = 0) -> Array:
        """``[S * H]``, a statistic at the last probe."""
        values: Array = self.statistics[name][-1, layer]
        return values


class Training:
    """The loss of the next step, written down together with the loss on the held-out sequences."""

    def __init__(self, model: nn.Module, task: Task, check_every: int = 10) -> None:
        self.model, self.task, self.check_every = model, task, check_every
        self._losses: list[Tensor] = []
        self._held: dict[int, Tensor] = {}

    def loss(self) -> Tensor:
        """Sum over the seeds; call it once a step."""
        if len(self._losses) % self.check_every == 0:
            self.check()
        x, y = self.task.at(len(self._losses))
        losses = seed_losses(self.model(x), y)
        self._losses.append(losses.detach())
        return losses.sum()

    @torch.no_grad()
    def check(self) -> None:
        """Measure the loss on the held-out sequences now."""
        held = seed_losses(self.model(self.task.held_x), self.task.held_y)
        self._held[len(self._losses)] = held

    def course(self, arm: Arm, reports: list[StepReport]) -> Course:
        """All that was written down, with what the probe found."""
        valid = [report for report in reports if report.valid and report.layers]
        names = valid[-1].statistics if valid else ()
        return Course(
            arm=arm,
            losses=_array(self._losses),
            held_steps=np.array(list(self._held), dtype=float),
            held_out=_array(list(self._held.values())),
            probe_steps=np.array([report.step for report in valid], dtype=float),
            statistics={name: _array([report[name] for report in valid]) for name in names},
            alarms=[alarm for report in reports for alarm in report.alarms if alarm.new],
            maps=next((report.maps for report in reversed(valid) if report.maps), ()),
        )


def train(
    model: nn.Module,
    task: Task,
    arm: Arm,
    steps: int,
    *,
    check_every: int = 10,
    probe: dict[str, Any] | None = None,
    events: Path | None = None,
    observe: Callable[[int, nn.Module], None] | None = None,
) -> Course:
    """A plain loop: ``steps`` steps of ``arm``.

    Args:
        model: an ``Ensemble``, or what maps ``[B, S, T, N]`` to logits ``[B, S, T, C]``.
        task: what it learns.
        arm: how.
        steps: how long.
        check_every: distance between two looks at the held-out sequences.
        probe: options of an ``AttentionProbe`` that watches; None for none.
        events: directory for TensorBoard events: both losses, and what the probe finds.
        observe: called before each step, and after the last, with the number of steps done.
    """
    training = Training(model, task, check_every)
    optimizer = arm.build(model)
    reports: list[StepReport] = []
    with ExitStack() as stack:
        board = None if events is None else stack.enter_context(SummaryWriter(str(events)))
        watching = None
        if probe is not None:
            writers = () if board is None else TensorBoardWriter(board)
            watching = stack.enter_context(AttentionProbe(model, writers=writers, action="record", **probe))
        for step in range(steps):
            if observe is not None:
                observe(step, model)
            loss = training.loss()
            loss.backward()
            optimizer.step()
            if watching is not None and (report := watching.step(loss / task.y.shape[1])) is not None:
                reports.append(report)
            optimizer.zero_grad()
        if observe is not None:
            observe(steps, model)
        training.check()
        course = training.course(arm, reports)
        if board is not None:
            _write_losses(board, course)
    return course


def _write_losses(board: Any, course: Course) -> None:
    """Means over the seeds."""
    for step, value in zip(course.held_steps.tolist(), course.held_out.mean(1).tolist(), strict=True):
        board.add_scalar("loss/held_out", value, int(step))
    for step in range(0, len(course.losses), 10):
        board.add_scalar("loss/training", float(course.losses[step].mean()), step)


def _array(tensors: list[Tensor]) -> Array:
    return torch.stack(tensors).double().numpy() if tensors else np.empty((0,))
