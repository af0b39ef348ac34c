"""A selective state-space layer as a mixing matrix, and its gradients by hand.

Per head ``h_t = a_t h_(t-1) + d_t B_t v_t^T`` and ``o_t = C_t h_t``, with the step ``d_t = softplus(z_t)`` and the
retention ``a_t = exp(-d_t r)``, ``r = softplus(rate)``: the scalar decay of Mamba-2 (arXiv 2405.21060), whose mixing
matrix is ``M_ij = (C_i . B_j) d_j a_(j+1) ... a_i``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SelectiveGradients:
    """What routing learns, and the gradients.

    Attributes:
        error: ``[..., T, E]``, ``u_i = dL/do_i``, given.
        compatibility: ``[..., T, T]``, ``b_ij = u_i . v_j``, which is ``dL/dM_ij``.
        advantage: ``[..., T, T]``, ``-b_ij``: nothing is normalised, so there is no baseline.
        retention: ``[..., T]``, ``dL/dln a_k = sum_(j<k<=i) M_ij b_ij``, the flow of compatibility over the boundary
            ``k``: descent retains more where it is negative. 0 at the first token, where there is nothing to retain.
        gate: ``[..., T]``, ``dL/dd_j`` of the write gate alone, ``sum_i M_ij b_ij / d_j``.
        step: ``[..., T]``, ``dL/dd_j`` through gate and retention, ``gate - r retention``; step_input: ``dL/dz``.
        rate: ``[...]``, ``dL/drate``.
        read, write: ``[..., T, K]``, ``dL/dC`` and ``dL/dB``. value: ``[..., T, E]``, ``dL/dv_j = sum_i M_ij u_i``.
    """

    error: Tensor
    compatibility: Tensor
    advantage: Tensor
    retention: Tensor
    gate: Tensor
    step: Tensor
    step_input: Tensor
    rate: Tensor
    read: Tensor
    write: Tensor
    value: Tensor


@dataclass(frozen=True, eq=False)
class SelectiveMixing:
    """Everything that the layer computed.

    Attributes:
        read, write: ``[..., T, K]``, ``C`` and ``B``. value: ``[..., T, E]``.
        step_input: ``[..., T]``, ``z``. rate: ``[...]``.
        step: ``[..., T]``, ``d``.
        log_retention: ``[..., T]``, ``ln a``.
        survival: ``[..., T, T]``, ``a_(j+1) ... a_i``, what is left at ``i`` of a write at ``j``; 0 for ``j > i``.
        mixing: ``[..., T, T]``. output: ``[..., T, E]``.
    """

    read: Tensor
    write: Tensor
    value: Tensor
    step_input: Tensor
    rate: Tensor
    step: Tensor
    log_retention: Tensor
    survival: Tensor
    mixing: Tensor
    output: Tensor

    @property
    def weights(self) -> Tensor:
        """``[..., T, T]``, what the advantage moves: the mixing itself."""
        return self.mixing

    def gradients(self, error: Tensor) -> SelectiveGradients:
        """The gradients for an upstream gradient ``error``, ``dL/do`` ``[..., T, E]``."""
        compatibility = error @ self.value.mT
        # dL/d(C_i . B_j d_j), then its two factors.
        surviving = self.survival * compatibility
        match = surviving * self.step[..., None, :]
        gate = (surviving * (self.read @ self.write.mT)).sum(-2)
        before = F.pad((self.mixing * compatibility).cumsum(-1)[..., :-1], (1, 0))  # [i, k]: sum over j < k
        retention = before.tril().sum(-2)
        decay = softplus(self.rate)
        step = gate - decay[..., None] * retention
        return SelectiveGradients(
            error=error,
            compatibility=compatibility,
            advantage=-compatibility,
            retention=retention,
            gate=gate,
            step=step,
            step_input=step * self.step_input.sigmoid(),
            rate=-(self.step * retention).sum(-1) * self.rate.sigmoid(),
            read=match @ self.write,
            write=match.mT @ self.read,
            value=self.mixing.mT @ error,
        )


def selective_mixing(read: Tensor, write: Tensor, value: Tensor, step_input: Tensor, rate: Tensor) -> SelectiveMixing:
    """The layer as a matrix.

    Args:
        read, write: ``C`` and ``B`` ``[..., T, K]``. value: ``[..., T, E]``.
        step_input: ``z`` ``[..., T]``. rate: ``[...]``.
    """
    step = softplus(step_input)
    log_retention = -step * softplus(rate)[..., None]
    survival = _segment_sums(log_retention).exp()
    mixing = (read @ write.mT) * survival * step[..., None, :]
    return SelectiveMixing(
        read, write, value, step_input, rate, step, log_retention, survival, mixing, mixing @ value
    )  # fmt: skip


def softplus(z: Tensor) -> Tensor:
    """``ln(1 + e^z)`` to the last digit: torch's own returns ``z`` above 20, and is then 2e-9 off in float64."""
    return torch.logaddexp(z, torch.zeros_like(z))


def _segment_sums(log_retention: Tensor) -> Tensor:
    """``[..., T]`` -> ``[..., T, T]``: the sum over ``j < k <= i``; -inf for ``j > i``.

    Each column is summed from its own start: differences of one long sum would lose their digits, and their
    exponential above the diagonal would overflow.
    """
    tokens = log_retention.shape[-1]
    each = log_retention[..., None].expand(*log_retention.shape, tokens)
    above = torch.ones(tokens, tokens, dtype=torch.bool, device=each.device).triu(1)
    return each.tril(-1).cumsum(-2).masked_fill(above, -math.inf)
