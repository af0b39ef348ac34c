"""What one training step did to the routing of a mixing layer, next to what the advantage asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


class Mixing(Protocol):
    """A forward pass ``o = M v``: what ``LinearMixing`` and ``SelectiveMixing`` have in common.

    ``weights`` ``[..., T, T]`` are what descent raises where the advantage is positive.
    """

    @property
    def mixing(self) -> Tensor: ...
    @property
    def weights(self) -> Tensor: ...
    @property
    def value(self) -> Tensor: ...
    def gradients(self, error: Tensor) -> Any: ...


@dataclass(frozen=True, eq=False)
class Observation:
    """Routing in one forward and backward pass; all are ``[...]``, one number for each seed.

    With ``p_ij = |M_ij| / sum_j |M_ij|``, over the rows that see at least two tokens and are not all zero:

    Attributes:
        gradients: all of ``Mixing.gradients``, the advantage among them.
        normalized_entropy: mean of ``-sum_j p_ij ln p_ij / ln i``; 1 is diffuse, 0 is one token.
        advantage_std: ``sqrt(mean_i sum_j p_ij (A_ij - sum_l p_il A_il)^2)``: for softmax ``advantage_std`` of probes.
        relative_advantage_std: that, relative to the root mean squares of the norms of ``u_i`` and ``v_j``.
        advantage_rms: ``sqrt(mean_i sum_j p_ij A_ij^2)``: larger than ``advantage_std`` by what all tokens have in
            common, which a baseline takes away.
    """

    gradients: Any
    normalized_entropy: Tensor
    advantage_std: Tensor
    relative_advantage_std: Tensor
    advantage_rms: Tensor


@torch.no_grad()
def observe(state: Mixing, error: Tensor) -> Observation:
    """Observe a forward pass whose output received the gradient ``error`` ``[..., T, E]`` (``output.retain_grad()``).

    A figure is NaN where no row or no error defines it.
    """
    gradients = state.gradients(error)
    size = state.mixing.abs()
    share = (size / size.sum(-1, keepdim=True))[..., 1:, :]
    keys = torch.arange(2, size.shape[-1] + 1, device=size.device)
    entropy = torch.special.entr(share).sum(-1) / keys.to(size).log()
    advantage = gradients.advantage[..., 1:, :]
    mean = (share * advantage).sum(-1, keepdim=True)
    std = (share * (advantage - mean) ** 2).sum(-1).nanmean(-1).sqrt()
    norms = error.square().sum(-1).mean(-1) * state.value.square().sum(-1).mean(-1)
    return Observation(
        gradients=gradients,
        normalized_entropy=entropy.nanmean(-1),
        advantage_std=std,
        relative_advantage_std=std / norms.sqrt(),
        advantage_rms=(share * advantage**2).sum(-1).nanmean(-1).sqrt(),
    )


@torch.no_grad()
def followed(before: Mixing, after: Mixing, advantage: Tensor) -> Tensor:
    """``[...]``, share of the weights that an update moved in the direction of their advantage ``[..., T, T]``.

    Pairs ``j <= i`` count from the second row on: a normalised first row cannot move. NaN where a change is not finite.
    A step may change a weight by less than float32 resolves: measure in float64.
    """
    tokens = advantage.shape[-1]
    pairs = torch.ones(tokens, tokens, dtype=torch.bool, device=advantage.device).tril()
    pairs[0] = False
    return _same_sign((after.weights - before.weights)[..., pairs], advantage[..., pairs])


@torch.no_grad()
def followed_retention(before: Tensor, after: Tensor, flow: Tensor) -> Tensor:
    """``[...]``, share of the ``log_retention`` ``[..., T]`` that an update moved against the flow of compatibility.

    Args:
        flow: ``[..., T]``, ``SelectiveGradients.retention``. The first token retains nothing and does not count.
    """
    return _same_sign((after - before)[..., 1:], -flow[..., 1:])


def _same_sign(change: Tensor, push: Tensor) -> Tensor:
    """``[..., n]`` -> ``[...]``, share of equal signs; torch gives NaN the sign 0, so it is looked for by itself."""
    share = (change.sign() == push.sign()).to(push).mean(-1)
    return share.where((change.isfinite() & push.isfinite()).all(-1), torch.nan)
