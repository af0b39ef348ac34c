"""Linear attention and its gradients by hand: the same advantage, but no factor alpha, and a baseline only by Z."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from attnprobe.errors import ConfigurationError

#: ``"elu"`` is elu(z) + 1 > 0 (Katharopoulos et al., arXiv 2006.16236); with ``"identity"`` weights have either sign.
Features = Literal["elu", "identity"]


@dataclass(frozen=True, eq=False)
class LinearGradients:
    """What routing learns, and the gradients.

    Attributes:
        error: ``[..., T, E]``, ``u_i = dL/do_i``, given.
        compatibility: ``[..., T, T]``, ``b_ij = u_i . v_j``, which is ``dL/dM_ij``.
        expected: ``[..., T]``, ``E_i = sum_j M_ij b_ij``, the baseline; 0 without normalisation.
        advantage: ``[..., T, T]``, ``A_ij = E_i - b_ij``: descent raises ``w_ij`` where it is positive.
        weights: ``[..., T, T]``, ``dL/dw_ij = -A_ij / Z_i``; 0 where not visible.
        query, key: ``[..., T, K]``. value: ``[..., T, E]``, ``dL/dv_j = sum_i M_ij u_i``.
    """

    error: Tensor
    compatibility: Tensor
    expected: Tensor
    advantage: Tensor
    weights: Tensor
    query: Tensor
    key: Tensor
    value: Tensor


@dataclass(frozen=True, eq=False)
class LinearMixing:
    """Everything that linear attention computed.

    Attributes:
        query, key: ``[..., T, K]``. value: ``[..., T, E]``.
        features: phi.
        scale: of the weights; a normalisation cancels it.
        weights: ``[..., T, T]``, ``w_ij = scale phi(q_i) . phi(k_j)`` for ``j <= i``, else 0.
        total: ``[..., T]``, ``Z_i = sum_j w_ij``; 1 without normalisation.
        mixing: ``[..., T, T]``, ``M_ij = w_ij / Z_i``.
        output: ``[..., T, E]``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    features: Features
    normalised: bool
    scale: float
    weights: Tensor
    total: Tensor
    mixing: Tensor
    output: Tensor

    def gradients(self, error: Tensor) -> LinearGradients:
        """The gradients for an upstream gradient ``error``, ``dL/do`` ``[..., T, E]``."""
        compatibility = error @ self.value.mT
        expected = (self.mixing * compatibility).sum(-1) if self.normalised else torch.zeros_like(self.total)
        advantage = expected[..., None] - compatibility
        weights = (-advantage / self.total[..., None]).tril()
        query, key = _phi(self.query, self.features), _phi(self.key, self.features)
        return LinearGradients(
            error=error,
            compatibility=compatibility,
            expected=expected,
            advantage=advantage,
            weights=weights,
            query=self.scale * (weights @ key) * _slope(self.query, self.features),
            key=self.scale * (weights.mT @ query) * _slope(self.key, self.features),
            value=self.mixing.mT @ error,
        )


def linear_mixing(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    normalised: bool = True,
    features: Features = "elu",
    scale: float = 1.0,
) -> LinearMixing:
    """Causal linear attention as a matrix, for ``[..., T, K]`` queries and keys and ``[..., T, E]`` values.

    Raises:
        ConfigurationError: a normalisation of weights that may be negative or zero.
    """
    if features not in ("elu", "identity"):
        raise ConfigurationError(f"features must be 'elu' or 'identity', got {features!r}")
    if normalised and features != "elu":
        raise ConfigurationError("only positive weights can be normalised: use features='elu' or normalised=False")
    weights = (scale * _phi(query, features) @ _phi(key, features).mT).tril()
    total = weights.sum(-1) if normalised else torch.ones_like(weights[..., 0])
    mixing = weights / total[..., None] if normalised else weights
    return LinearMixing(query, key, value, features, normalised, scale, weights, total, mixing, mixing @ value)


def _phi(z: Tensor, features: Features) -> Tensor:
    # elu(z) + 1, written so that it stays positive where elu rounds to -1.
    return z if features == "identity" else torch.where(z > 0, z + 1, z.clamp(max=0).exp())


def _slope(z: Tensor, features: Features) -> Tensor:
    return torch.ones_like(z) if features == "identity" else z.clamp(max=0).exp()
