"""The paper's closed form trained on the smallest example: one head, five tokens, three classes, no autograd.

The gradients of cross-entropy through one softmax attention head (arXiv 2512.22473) come from ``closed_form``, so that
the advantage-based routing law and the responsibility-weighted value update can be trained with and drawn. Sizes:
``T`` tokens, ``E`` value width, ``C`` classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from attnprobe.errors import ConfigurationError
from attnprobe.experiments.closed_form.attention import Routing, RoutingGradients
from attnprobe.experiments.closed_form.layer import Parameters, forward, gradients
from attnprobe.experiments.closed_form.loss import CrossEntropy, cross_entropy
from attnprobe.experiments.toy_events import write_events
from attnprobe.experiments.toy_figure import draw
from attnprobe.experiments.toy_report import summary, write_json

#: The little task of ``train``: token ``i`` of five one-hot tokens is to be given this class.
TASK = (0, 0, 1, 1, 2)
CLASSES, KEY_WIDTH, VALUE_WIDTH = 3, 2, 2
#: Standard deviation of the initial weights.
INIT_STD = 0.5


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A training run: ``n`` recorded steps, step ``k`` being the state after ``k`` updates.

    Attributes:
        lr, seed: what the run was started with.
        targets: ``[T]``.
        loss: ``[steps + 1]``, mean cross-entropy before each update and after the last, in nats.
        followed: ``[steps]``, share of the score entries whose change in that update has the sign of their advantage.
        steps: the recorded steps; the first and the last are always among them.
        attention, compatibility, advantage: ``[n, T, T]``.
        values: ``[n, T, E]``.
        error: ``[n, T, E]``.
        probabilities: ``[n, T, C]``.
        start, end: the parameters.
    """

    lr: float
    seed: int
    targets: Tensor
    loss: Tensor
    followed: Tensor
    steps: tuple[int, ...]
    attention: Tensor
    compatibility: Tensor
    advantage: Tensor
    values: Tensor
    error: Tensor
    probabilities: Tensor
    start: Parameters
    end: Parameters

    @property
    def advantage_std(self) -> Tensor:
        """``[n]``, spread of the advantages under attention: sqrt(mean_i sum_j alpha_ij A_ij^2)."""
        return (self.attention * self.advantage**2).sum(2).mean(1).sqrt()

    @property
    def normalized_entropy(self) -> Tensor:
        """``[n]``, mean entropy of the attention rows relative to uniform attention."""
        entropy: Tensor = torch.special.entr(self.attention).sum(2).mean(1)
        return entropy / math.log(self.attention.shape[2])

    @property
    def moments(self) -> tuple[int, ...]:
        """Indices of the first record, the one with the largest advantage spread and the last, without repeats."""
        return tuple(sorted({0, int(self.advantage_std.argmax()), len(self.steps) - 1}))


def train(steps: int = 200, lr: float = 0.5, seed: int = 0, *, every: int = 1) -> Trajectory:
    """Plain gradient descent with the hand-derived gradients on five one-hot tokens, in float64.

    Args:
        steps: number of updates.
        lr: learning rate of W_Q, W_K, W_V and W_O alike.
        seed: of the initial weights; the task is always the same, and torch's global generator is not touched.
        every: record each ``every``-th step; the first and the last always.

    Raises:
        ConfigurationError: an option that cannot work, or a learning rate at which the loss is no longer finite.
    """
    if steps < 1 or every < 1:
        raise ConfigurationError(f"steps and every must be at least 1, got steps={steps}, every={every}")
    if not (math.isfinite(lr) and lr > 0):
        raise ConfigurationError(f"lr must be positive and finite, got lr={lr}")
    targets = torch.tensor(TASK)
    tokens = len(TASK)
    generator = torch.Generator().manual_seed(seed)
    shapes = [(tokens, KEY_WIDTH), (tokens, KEY_WIDTH), (tokens, VALUE_WIDTH), (VALUE_WIDTH, CLASSES)]
    weights = [INIT_STD * torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    start = params = Parameters(torch.eye(tokens, dtype=torch.float64), *weights)
    records: list[tuple[int, Routing, CrossEntropy, RoutingGradients]] = []
    loss, followed = [], []
    state = forward(params)
    for step in range(steps + 1):
        error = cross_entropy(state.output, targets)
        if not error.loss.isfinite():
            raise ConfigurationError(f"the loss is {error.loss} after {step} steps at lr={lr}: use a smaller lr")
        gradient = gradients(params, state, error.delta)
        loss.append(error.loss)
        if step % every == 0 or step == steps:
            records.append((step, state.routing, error, gradient.routing))
        if step == steps:
            break
        moved = {name: getattr(params, name) - lr * getattr(gradient, name) for name in ("W_Q", "W_K", "W_V", "W_O")}
        params = replace(params, **moved)
        before, state = state, forward(params)
        change = state.routing.scores - before.routing.scores
        followed.append((change.sign() == gradient.routing.advantage.sign()).double().mean())
    return Trajectory(
        lr=lr,
        seed=seed,
        targets=targets,
        loss=torch.stack(loss),
        followed=torch.stack(followed),
        steps=tuple(step for step, *_ in records),
        attention=torch.stack([routing.attention for _, routing, _, _ in records]),
        compatibility=torch.stack([gradient.compatibility for *_, gradient in records]),
        advantage=torch.stack([gradient.advantage for *_, gradient in records]),
        error=torch.stack([gradient.error for *_, gradient in records]),
        values=torch.stack([routing.value for _, routing, _, _ in records]),
        probabilities=torch.stack([error.probabilities for _, _, error, _ in records]),
        start=start,
        end=params,
    )


def run(path: Path, *, steps: int = 200, lr: float = 0.5, seed: int = 0) -> str:
    """Train the toy, draw it to ``path`` (a .png), write its numbers (.json) and events beside it; return a summary."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ConfigurationError(f"the picture's path must end in .png, got {path}")
    result = train(steps, lr, seed)
    draw(result, path)
    write_json(result, path.with_suffix(".json"))
    write_events(result, path.with_suffix(""))
    return (
        f"{summary(result)}\nwrote {path} and {path.with_suffix('.json')}\n"
        f"  tensorboard --logdir {path.with_suffix('')}"
    )
