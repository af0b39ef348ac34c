"""Attention, compatibility and advantage of every pair, where sequences are short enough to look at them all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnprobe.experiments.ensemble.model import Ensemble, seed_losses


@dataclass(frozen=True)
class Pairs:
    """All ``[B, S * H, T, T]``; attention is 0 where masked."""

    scores: Tensor
    attention: Tensor
    compatibility: Tensor
    advantage: Tensor


def pairs(model: Ensemble, x: Tensor, y: Tensor, layer: int = 0) -> Pairs:
    """Of one layer, for the loss that trains the ensemble; the model's gradients stay as they are.

    Args:
        model: the ensemble.
        x: ``[B, S, T, N]``.
        y: ``[B, S, T]``.
        layer: which.
    """
    with torch.no_grad():
        x, watched = model.before(layer, x), model.layer(layer)
        scores = watched.scores(x)
        attention = scores.softmax(-1)
        value = watched.project(x)[2]
    output = (attention @ value).requires_grad_()
    hidden = model.add(x, watched.join(output))
    for after in model.attention[layer + 1 :]:
        hidden = model.add(hidden, after(hidden))
    (error,) = torch.autograd.grad(seed_losses(hidden @ model.W_O, y).sum(), output)
    compatibility = error @ value.mT
    expected = (attention * compatibility).sum(-1, keepdim=True)
    return Pairs(scores, attention, compatibility, expected - compatibility)
