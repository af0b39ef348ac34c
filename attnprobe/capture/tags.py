"""Tags: what is known of a tensor between the product that makes scores and the one that uses the weights.

Everything in a tag has the dimensions of the tagged tensor, whatever these stand for (``[B, H, T, S]``,
``[B, T, S, H]`` ...), and follows it through transpositions. Leading dimensions may be folded in between; what was
tagged before keeps its own until both are fitted together in the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scores:
    """Tag of ``query @ key^T`` and of what was made of it.

    Attributes:
        left, right: the operands in the dimensions of the scores, with size 1 where the other one's tokens are,
            and their width as one more dimension at the end.
        own: which axis of the scores, counted from the end, holds the tokens of ``left`` and of ``right``.
        masks: what hides pairs, expanded to the scores.
        shift: what was taken off every score of a row, ``[..., T, 1]``.
        heads: number of heads where they were seen apart from the batch.
        extra: how many more columns than keys there are, and whether they come first.
    """

    left: Tensor
    right: Tensor
    own: tuple[int, int]
    masks: tuple[Tensor, ...] = ()
    shift: tuple[Tensor, ...] = ()
    heads: int | None = None
    extra: tuple[int, bool] = (0, False)

    @property
    def depth(self) -> int:
        """How many axes from the end must stay what they are."""
        return max(2, *(-axis for axis in self.own))

    def moved(self, order: Sequence[int]) -> Scores | None:
        if any(part.ndim != len(order) for part in (*self.masks, *self.shift)) or self.left.ndim != len(order) + 1:
            return None  # leading dimensions were folded meanwhile
        width = [*order, len(order)]
        return replace(
            self,
            left=self.left.permute(width),
            right=self.right.permute(width),
            own=(moved_axis(self.own[0], order), moved_axis(self.own[1], order)),
            masks=tuple(mask.permute(*order) for mask in self.masks),
            shift=tuple(part.permute(*order) for part in self.shift),
        )


@dataclass(frozen=True)
class Projection:
    """Tag of a tensor whose last axis a parameter made: its softmax is a gate or a class, it attends to nothing."""


@dataclass(frozen=True)
class Altered:
    """Tag of what would be attention weights, were they a softmax of the scores; ``how`` says why they are none."""

    how: str


@dataclass(frozen=True)
class Weights:
    """Tag of a softmax over keys and of what was made of it.

    Attributes:
        logits: the softmax's input.
        version: of the logits, as the softmax saw them.
        axis: over which the softmax went, counted from the end.
        scores: what is known of the logits.
        sink: logits of columns that stand for no key and were cut off after the softmax.
        dropout: probability with which weights were dropped since.
        drops: the weights before and after that.
        heads: number of heads where they were seen apart from the batch.
        softmax: which softmax of the session it was.
    """

    logits: Tensor
    version: int
    axis: int
    scores: Scores | None
    sink: Tensor | None = None
    dropout: float = 0.0
    drops: tuple[Tensor, ...] = ()
    heads: int | None = None
    softmax: int = 0

    @property
    def depth(self) -> int:
        return max(2, -self.axis, self.scores.depth if self.scores else 0)

    def moved(self, order: Sequence[int]) -> Weights | None:
        scores = self.scores.moved(order) if self.scores else None
        if any(x.ndim != len(order) for x in (self.logits, *self.drops)) or (self.scores and scores is None):
            return None
        return replace(
            self,
            drops=tuple(x.permute(*order) for x in self.drops),
            logits=self.logits.permute(*order),
            axis=moved_axis(self.axis, order),
            scores=scores,
            sink=None if self.sink is None else self.sink.permute(*order),
        )


def moved_axis(axis: int, order: Sequence[int]) -> int:
    """Where an axis, counted from the end, is after ``permute(order)``."""
    return list(order).index(axis + len(order)) - len(order)


def order_of(function: Callable[..., Any], tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int]:
    """The permutation that a function such as ``transpose`` or ``movedim`` amounts to."""
    sizes = range(2, 2 + tensor.ndim)
    trial = function(torch.empty(*sizes, device="meta"), *args, **kwargs)
    return [size - 2 for size in trial.shape]


def fitted(tensor: Tensor, lead: torch.Size, kept: int) -> Tensor | None:
    """With leading dimensions, in front of the last ``kept``, that broadcast to ``lead``; None if they do not fit."""
    own, rest = tensor.shape[: tensor.ndim - kept], tensor.shape[tensor.ndim - kept :]
    if len(own) != len(lead) and math.prod(own) == math.prod(lead):
        return tensor.reshape(*lead, *rest)
    aligned = (1,) * (len(lead) - len(own)) + own
    fits = len(aligned) == len(lead) and all(x in (1, y) for x, y in zip(aligned, lead, strict=True))
    return tensor.reshape(*aligned, *rest) if fits else None


def shrunk(tensor: Tensor) -> Tensor:
    """Without the copies that ``expand`` made."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
