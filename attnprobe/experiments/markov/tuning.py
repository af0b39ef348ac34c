"""The base rate with which an arm reaches SGD's final loss soonest, on seeds that are not evaluated."""

from __future__ import annotations

import dataclasses
import math

import torch

from attnprobe.errors import ConfigurationError
from attnprobe.experiments.ensemble.arms import RATE, Arm
from attnprobe.experiments.ensemble.model import Ensemble, seed_losses
from attnprobe.experiments.ensemble.training import Task
from attnprobe.experiments.markov.model import FORM
from attnprobe.experiments.markov.task import Protocol, task

#: Of SGD; Adam and AdamW, whose steps do not shrink with the gradient, start at a tenth of it.
GRID = tuple(RATE * 10 ** (half / 2) for half in range(7))
SEEDS = tuple(range(10_000, 10_005))


def tuned(arm: Arm, protocol: Protocol, *, steps: int, length: int) -> Arm:
    """``arm`` at the rate of the grid that needs the fewest steps.

    Raises:
        ConfigurationError: plain SGD diverges on this task, so that there is no loss to reach.
    """
    data = task(protocol, length, SEEDS)
    thresholds = torch.full((len(SEEDS),), -math.inf)
    _, thresholds = _steps_below(Arm("sgd"), data, steps, thresholds)
    if not thresholds.isfinite().all():
        raise ConfigurationError(f"plain SGD ends with losses {thresholds.tolist()}; there is nothing to tune for")
    taken: dict[float, float] = {}
    for rate in [rate * (0.1 if arm.optimizer.startswith("adam") else 1) for rate in GRID]:
        # Where one seed alone needs longer than the best rate's seeds together, this rate is not the best.
        most = min([steps, *(math.ceil(len(SEEDS) * mean) + 1 for mean in taken.values())])
        taken[rate], _ = _steps_below(dataclasses.replace(arm, rate=rate), data, most, thresholds)
    return dataclasses.replace(arm, rate=min(taken, key=taken.__getitem__))


def _steps_below(arm: Arm, data: Task, steps: int, thresholds: torch.Tensor) -> tuple[float, torch.Tensor]:
    """Mean number of steps until each seed's loss is below its threshold, and the losses at the end.

    A seed that does not get there counts as ``steps``.
    """
    model = Ensemble(FORM, SEEDS)
    optimizer = arm.build(model)
    reached = torch.full((len(SEEDS),), float(steps))
    losses = thresholds
    for step in range(steps):
        each = seed_losses(model(data.x), data.y)
        losses = each.detach()
        reached = torch.where(losses < thresholds, reached.clamp(max=step), reached)
        if (reached < steps).all() or not losses.isfinite().any():
            break
        optimizer.zero_grad()
        each.sum().backward()
        optimizer.step()
    return float(reached.mean()), losses
