"""The paper's attention model, once for each seed: every seed is a head of one attention call.

Shapes: ``S`` seeds, ``B`` sequences, ``T`` tokens, ``N`` width, ``H`` heads of each model, ``D`` width of queries and
keys, ``E`` of values, ``C`` classes. Nothing joins two seeds, and optimizers work on single numbers: each seed trains
as it would alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: A target without a loss.
IGNORED = -100


@dataclass(frozen=True)
class Architecture:
    """What one model looks like; the defaults are the paper's single head.

    Attributes:
        width, classes: ``N`` and ``C``.
        heads, layers: of each model.
        key_width, value_width: ``D`` and ``E`` of each head.
        residual: layers add to their input instead of replacing it.
        value_norm: LayerNorm (without weights) on each value vector.
        causal: token ``i`` sees tokens ``j <= i``.
        initial_scale: standard deviation of every weight at the start.
    """

    width: int
    classes: int
    heads: int = 1
    layers: int = 1
    key_width: int = 10
    value_width: int = 15
    residual: bool = False
    value_norm: bool = False
    causal: bool = True
    initial_scale: float = 0.1


class Attention(nn.Module):
    """One layer of every seed's model; head ``h`` of seed ``s`` is head ``s * H + h`` of the call."""

    def __init__(self, form: Architecture, generators: Sequence[torch.Generator], projected: bool) -> None:
        super().__init__()
        self.form = form
        shape = (form.heads, form.width)
        self.W_Q = _weights(generators, (*shape, form.key_width), form)
        self.W_K = _weights(generators, (*shape, form.key_width), form)
        self.W_V = _weights(generators, (*shape, form.value_width), form)
        self.W_P = _weights(generators, (form.heads * form.value_width, form.width), form) if projected else None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, ``[B, S * H, T, E]``: narrower queries and keys end in zeros, without effect.

        Torch's fused kernel on the CPU wants one width for all three, and is seven times as fast then.
        """
        width = max(self.form.key_width, self.form.value_width)
        weights = (F.pad(weight, (0, width - weight.shape[-1])) for weight in (self.W_Q, self.W_K))
        query, key = (torch.einsum("bstn,shnd->bshtd", x, weight).flatten(1, 2) for weight in weights)
        value = torch.einsum("bstn,shne->bshte", x, self.W_V).flatten(1, 2)
        if self.form.value_norm:
            value = F.layer_norm(value, value.shape[-1:])
        return query, key, value

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, T, N]`` to ``[B, S, T, N]``, or ``[B, S, T, H * E]`` without a projection."""
        return self.join(self.mix(*self.project(x)))

    def mix(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """``[B, S * H, T, E]``: what every head reads."""
        return F.scaled_dot_product_attention(query, key, value, is_causal=self.form.causal, scale=self.scale)

    def join(self, output: Tensor) -> Tensor:
        """The heads of each seed side by side, projected where there is a projection."""
        output = output.unflatten(1, (-1, self.form.heads)).transpose(2, 3).flatten(3)
        return output if self.W_P is None else output @ self.W_P

    @property
    def scale(self) -> float:
        """Of the scores: the zeros that are appended do not count."""
        return float(self.form.key_width**-0.5)

    def scores(self, x: Tensor) -> Tensor:
        """``[B, S * H, T, T]``, -inf where masked: for the eye, where sequences are short."""
        query, key, _ = self.project(x)
        scores = self.scale * query @ key.mT
        if self.form.causal:
            scores = scores.masked_fill(torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1), float("-inf"))
        return scores


class Ensemble(nn.Module):
    """One model for each seed, with weights drawn from the seed alone."""

    def __init__(self, form: Architecture, seeds: Sequence[int]) -> None:
        super().__init__()
        self.form, self.seeds = form, tuple(seeds)
        generators = weight_generators(seeds)
        last = form.layers - 1
        self.attention = nn.ModuleList(
            Attention(form, generators, projected=form.residual or layer < last) for layer in range(form.layers)
        )
        read = form.width if form.residual else form.heads * form.value_width
        self.W_O = _weights(generators, (read, form.classes), form)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, S, T, N]`` to logits ``[B, S, T, C]``."""
        return self.before(self.form.layers, x) @ self.W_O

    def layer(self, index: int) -> Attention:
        """One of its layers."""
        return cast(Attention, self.attention[index])

    def before(self, index: int, x: Tensor) -> Tensor:
        """What goes into a layer, ``[B, S, T, N]``."""
        for layer in self.attention[:index]:
            x = self.add(x, layer(x))
        return x

    def add(self, x: Tensor, made: Tensor) -> Tensor:
        """What a layer passes on, of its input and what it made."""
        return x + made if self.form.residual else made


def seed_losses(logits: Tensor, y: Tensor) -> Tensor:
    """``[S]``: mean cross-entropy of logits ``[B, S, T, C]`` over the targets ``[B, S, T]`` that are not ignored."""
    each = F.cross_entropy(logits.flatten(0, 2), y.flatten(), ignore_index=IGNORED, reduction="none").view_as(y)
    return each.sum((0, 2)) / (y != IGNORED).sum((0, 2))


def weight_generators(seeds: Sequence[int]) -> list[torch.Generator]:
    """Random numbers for each seed's weights: not those that its data are made of, which start from the seed itself."""
    return [torch.Generator().manual_seed(1_000_000 + seed) for seed in seeds]


def _weights(generators: Sequence[torch.Generator], shape: tuple[int, ...], form: Architecture) -> nn.Parameter:
    return nn.Parameter(form.initial_scale * torch.stack([torch.randn(shape, generator=g) for g in generators]))
