"""Softmax attention and its gradients by hand: advantage-based routing, responsibility-weighted values."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from attnprobe.errors import ConfigurationError


@dataclass(frozen=True, eq=False)
class Routing:
    """Everything that attention computed.

    Attributes:
        query: ``[..., H, T, D]``. key: ``[..., G, S, D]``. value: ``[..., G, S, E]``.
        scores: ``[..., H, T, S]``, ``s = scale q k^T``; -inf where not visible.
        attention: ``[..., H, T, S]``, alpha; a row that sees nothing is 0.
        output: ``[..., H, T, E]``, ``o = alpha~ v``, with ``alpha~ = alpha`` unless there was dropout.
        scale: of the scores.
        dropout: ``m / (1 - p)``, the factor from alpha to alpha~; None without dropout.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    scores: Tensor
    attention: Tensor
    output: Tensor
    scale: float
    dropout: Tensor | None


@dataclass(frozen=True, eq=False)
class RoutingGradients:
    """What the routing law is made of, and the gradients.

    Attributes:
        error: ``[..., H, T, E]``, ``u_i = dL/do_i``, given.
        compatibility: ``[..., H, T, S]``, ``b_ij = u_i . v_j``, with dropout ``m_ij u_i . v_j / (1 - p)``.
        expected: ``[..., H, T]``, ``E_i = sum_j alpha_ij b_ij``, which is ``u_i . o_i``.
        advantage: ``[..., H, T, S]``, ``A_ij = E_i - b_ij``: gradient descent raises ``s_ij`` where it is positive.
        scores: ``[..., H, T, S]``, ``dL/ds_ij = -alpha_ij A_ij``; 0 where not visible.
        query, key, value: like the tensors that they belong to; ``dL/dv_j = sum_i alpha~_ij u_i``.
    """

    error: Tensor
    compatibility: Tensor
    expected: Tensor
    advantage: Tensor
    scores: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    visible: Tensor | None = None,
    kept: Tensor | None = None,
    dropout: float = 0.0,
    scale: float | None = None,
) -> Routing:
    """Softmax attention of one head, ``[T, D]``, or of many, ``[..., H, T, D]`` with ``[..., G, S, D]`` keys.

    Args:
        query: ``[..., H, T, D]``. key: ``[..., G, S, D]``. value: ``[..., G, S, E]``.
        visible: boolean, broadcastable to ``[..., H, T, S]``: which key each query sees; None is all of them.
        kept: boolean, broadcastable likewise: the weights that dropout with probability ``dropout`` left.
        scale: None is ``1 / sqrt(D)``.
    """
    for name, mask in (("visible", visible), ("kept", kept)):
        if mask is not None and mask.dtype != torch.bool:
            raise ConfigurationError(f"{name} must be boolean (True where a pair counts), got {mask.dtype}")
    if not 0 <= dropout < 1 or (dropout > 0 and kept is None):
        raise ConfigurationError(f"dropout must lie in [0, 1) and come with the weights it kept, got dropout={dropout}")
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = scale * query @ _per_query_head(key, query).mT
    if visible is not None:
        scores = scores.masked_fill(~visible, -math.inf)
    # On few numbers torch.softmax mostly waits for its threads. A row that sees nothing attends to nothing.
    total = scores.logsumexp(-1, keepdim=True)
    attention = (scores - total.masked_fill(total == -math.inf, 0)).exp()
    factor = None if kept is None else kept.to(scores) / (1 - dropout)
    weights = attention if factor is None else attention * factor
    output = weights @ _per_query_head(value, query)
    return Routing(query, key, value, scores, attention, output, scale, factor)


def attention_gradients(routing: Routing, error: Tensor) -> RoutingGradients:
    """The gradients at ``routing`` for an upstream gradient ``error``, ``dL/do`` ``[..., H, T, E]``."""
    query, attention, factor = routing.query, routing.attention, routing.dropout
    compatibility = error @ _per_query_head(routing.value, query).mT
    if factor is not None:
        compatibility = factor * compatibility
    expected = (attention * compatibility).sum(-1)
    advantage = expected[..., None] - compatibility
    scores = -attention * advantage
    weights = attention if factor is None else attention * factor
    return RoutingGradients(
        error=error,
        compatibility=compatibility,
        expected=expected,
        advantage=advantage,
        scores=scores,
        query=routing.scale * scores @ _per_query_head(routing.key, query),
        key=_per_key_head(routing.scale * scores.mT @ query, routing.key),
        value=_per_key_head(weights.mT @ error, routing.value),
    )


def _per_query_head(tensor: Tensor, query: Tensor) -> Tensor:
    """``[..., G, S, D]`` -> ``[..., H, S, D]``: each query head's keys or values."""
    if query.ndim < 3 or tensor.shape[-3] == query.shape[-3]:
        return tensor
    if query.shape[-3] % tensor.shape[-3]:
        raise ConfigurationError(
            f"{query.shape[-3]} query heads cannot share {tensor.shape[-3]} key/value heads evenly"
        )
    return tensor.repeat_interleave(query.shape[-3] // tensor.shape[-3], -3)


def _per_key_head(gradient: Tensor, like: Tensor) -> Tensor:
    """``[..., H, S, D]`` -> ``[..., G, S, D]``: a shared key or value head has the sum of its readers' gradients."""
    return gradient if gradient.shape == like.shape else gradient.unflatten(-3, (like.shape[-3], -1)).sum(-3)
