"""Models and batches that are the same each time, whatever the state of torch's generator, and leave it alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)

VOCABULARY, SPECIAL = 40, 3  # the first ids are padding, end and beginning


def fresh(build: Callable[[], Model]) -> Model:
    """The model in training mode, its weights of unit gain: usual initialisations leave attention almost uniform.

    Vectors move off their values, as some architectures start with branches of weight 0.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = build().train()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


class Draw:
    """Random tensors from a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def ids(self, *shape: int) -> Tensor:
        return torch.randint(SPECIAL, VOCABULARY, shape, generator=self.generator)

    def classes(self, count: int, *shape: int) -> Tensor:
        return torch.randint(count, shape, generator=self.generator)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)


def lengths_mask(lengths: Sequence[int], tokens: int) -> Tensor:
    """``[B, T]``, 1 for real tokens and 0 for padding on the right."""
    return (torch.arange(tokens) < torch.tensor(lengths)[:, None]).long()
