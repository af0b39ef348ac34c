"""The base rate with which an arm reaches SGD's final loss soonest, on seeds that are not evaluated."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from attnprobe.errors import ConfigurationError
from attnprobe.experiments.ensemble.arms import RATE, Arm
from attnprobe.experiments.ensemble.model import Ensemble
from attnprobe.experiments.ensemble.training import Task, train
from attnprobe.experiments.markov.model import FORM
from attnprobe.experiments.markov.task import Protocol, task

#: Of SGD; Adam and AdamW, whose steps do not shrink with the gradient, start at a tenth of it.
GRID = tuple(RATE * 10 ** (half / 2) for half in range(7))
SEEDS = tuple(range(10_000, 10_005))


def tuned(arm: Arm, protocol: Protocol, *, steps: int, length: int) -> Arm:
    """``arm`` at the rate of the grid that needs the fewest steps, of those whose loss is still below it at the end.

    Raises:
        ConfigurationError: plain SGD diverges on this task, so that there is no loss to reach, or no rate reaches it.
    """
    data = task(protocol, length, SEEDS)
    thresholds = _losses(Arm("sgd"), data, steps)[-1]
    if not thresholds.isfinite().all():
        raise ConfigurationError(f"plain SGD ends with losses {thresholds.tolist()}; there is nothing to tune for")
    taken: dict[float, float] = {}
    for rate in [rate * (0.1 if arm.optimizer.startswith("adam") else 1) for rate in GRID]:
        losses = _losses(dataclasses.replace(arm, rate=rate), data, steps)
        if bool((losses[-1] <= thresholds).all()):
            below = losses < thresholds
            first = torch.where(below.any(0), below.int().argmax(0), steps)
            taken[rate] = float(first.double().mean())
    if not taken:
        raise ConfigurationError(f"{arm.label} does not stay below SGD's final loss at any rate of {GRID}")
    return dataclasses.replace(arm, rate=min(taken, key=taken.__getitem__))


def _losses(arm: Arm, data: Task, steps: int) -> Tensor:
    """``[steps, S]``, before each step."""
    training = train(Ensemble(FORM, SEEDS), data, arm, steps, check_every=steps)
    return torch.from_numpy(training.losses)
