"""The chain, its noisy observations, and the protocols under which the paper's claims are measured."""

from __future__ import annotations

from collections.abc import Sequence as Items
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnprobe.experiments.ensemble.training import Task

SYMBOLS, WIDTH = 8, 20
STAY = 0.3

Protocol = Literal["clean", "authors", "varied"]


def transitions(protocol: Protocol) -> Tensor:
    """``[8, 8]`` transition probabilities: stay with 0.3, else prefer near neighbours on the circle.

    The authors' script mixes the probability of staying in twice, which makes its diagonal 0.3498. In ``varied`` the
    symbols stay with 0.05 to 0.95, so that the next one is hard to foretell after some and easy after others.
    """
    index = torch.arange(SYMBOLS, dtype=torch.float64)
    gap = (index[:, None] - index).abs()
    distance = torch.minimum(gap, SYMBOLS - gap)
    weights = torch.where(distance > 0, 1 / distance, STAY if protocol == "authors" else 0)
    weights = weights / weights.sum(-1, keepdim=True)
    stay = torch.full((SYMBOLS,), STAY, dtype=torch.float64)
    if protocol == "varied":
        # Not in the order of the circle: where a symbol stands and how long it stays are two different things.
        stay = torch.linspace(0.05, 0.95, SYMBOLS, dtype=torch.float64)[torch.tensor([0, 5, 2, 7, 4, 1, 6, 3])]
    return torch.diag(stay) + (1 - stay[:, None]) * weights


def stationary(chain: Tensor) -> Tensor:
    """``[8]``, how often each symbol comes in the long run."""
    shares: Tensor = torch.linalg.matrix_power(chain, 4096)[0]
    return shares


def entropy_rate(protocol: Protocol) -> float:
    """Lowest reachable loss in nats: the entropy of the next symbol for one who knows the present one."""
    chain = transitions(protocol)
    return float(stationary(chain) @ torch.special.entr(chain).sum(-1))


@dataclass(frozen=True)
class Sequence:
    """Observations ``x`` ``[T, 20]`` of the previous symbol ``z`` ``[T]``, and targets ``y`` ``[T]``, the present one.

    ``means`` ``[8, 20]`` are what each symbol looks like without noise.
    """

    x: Tensor
    y: Tensor
    z: Tensor
    means: Tensor


def sequences(protocol: Protocol, length: int, seed: int, count: int = 2) -> list[Sequence]:
    """``count`` independent sequences of one chain and one set of symbol means (training, held-out ...)."""
    random = torch.Generator().manual_seed(seed)
    chain = transitions(protocol)
    means = torch.randn(SYMBOLS, WIDTH, generator=random)
    made = []
    for _ in range(count):
        symbols = torch.empty(length + 1, dtype=torch.long)
        symbols[0] = torch.randint(SYMBOLS, (), generator=random)
        draws = torch.rand(length, generator=random, dtype=torch.float64)
        cumulative = chain.cumsum(-1)
        for t in range(length):
            symbols[t + 1] = torch.searchsorted(cumulative[symbols[t]], draws[t]).clamp(max=SYMBOLS - 1)
        noise = torch.randn(length, WIDTH, generator=random)
        made.append(Sequence(means[symbols[:-1]] + noise, symbols[1:], symbols[:-1], means))
    return made


def task(protocol: Protocol, length: int, seeds: Items[int], *, count: int = 1, held_out: int = 1) -> Task:
    """``count`` training sequences, of which each step takes the next one, and ``held_out`` others, for each seed."""
    made = [sequences(protocol, length, seed, count + held_out) for seed in seeds]
    x = torch.stack([torch.stack([one.x for one in of_seed]) for of_seed in made], 1)
    y = torch.stack([torch.stack([one.y for one in of_seed]) for of_seed in made], 1)
    return Task(x[:count], y[:count], x[count:], y[count:], batch=1)


def predictive(protocol: Protocol, sequence: Sequence) -> Tensor:
    """``[T, 8]``, the best possible prediction of each target: ``p(y_t | x_1 ... x_t)`` by the forward algorithm."""
    chain = transitions(protocol)
    distance = torch.cdist(sequence.x.double(), sequence.means.double())
    likelihood = torch.softmax(-(distance**2) / 2, -1)
    belief = torch.full((SYMBOLS,), 1 / SYMBOLS, dtype=torch.float64)
    made = []
    for seen in likelihood:
        belief = belief * seen
        belief = (belief / belief.sum()) @ chain
        made.append(belief)
    return torch.stack(made)
