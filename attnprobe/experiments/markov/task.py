"""The chain, its noisy observations, and the two protocols under which the paper's claim is measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SYMBOLS, WIDTH = 8, 20
STAY = 0.3

Protocol = Literal["clean", "authors"]


def transitions(protocol: Protocol) -> Tensor:
    """``[8, 8]`` transition probabilities: stay with 0.3, else prefer near neighbours on the circle.

    The authors' script mixes the probability of staying in twice, which makes its diagonal 0.3498.
    """
    index = torch.arange(SYMBOLS, dtype=torch.float64)
    gap = (index[:, None] - index).abs()
    distance = torch.minimum(gap, SYMBOLS - gap)
    weights = torch.where(distance > 0, 1 / distance, STAY if protocol == "authors" else 0)
    stay = STAY * torch.eye(SYMBOLS, dtype=torch.float64)
    return stay + (1 - STAY) * weights / weights.sum(-1, keepdim=True)


def entropy_rate(protocol: Protocol) -> float:
    """Lowest reachable loss in nats: the entropy of the next symbol for one who knows the present one."""
    chain = transitions(protocol)
    return float(-(chain * chain.log()).sum(-1).mean())  # circulant: the stationary distribution is uniform


@dataclass(frozen=True)
class Sequence:
    """Observations ``x`` ``[T, 20]`` of the previous symbol and targets ``y`` ``[T]``, the present one."""

    x: Tensor
    y: Tensor


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
        made.append(Sequence(means[symbols[:-1]] + noise, symbols[1:]))
    return made
