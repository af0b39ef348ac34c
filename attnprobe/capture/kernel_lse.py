"""The log-sum-exp that a fused kernel keeps for its own backward pass: with it one pass over the scores is enough."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_FUSED = "ScaledDotProduct"


def keeps_lse(output: Tensor) -> bool:
    """Whether it can be read when the gradient of ``output`` arrives.

    Not where hooks on saved tensors are at work: under activation checkpointing each save may be opened only once,
    and that is the kernel's due.
    """
    if output.grad_fn is None or not output.grad_fn.name().startswith(_FUSED):
        return False
    try:
        return torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    except AttributeError:  # it is private
        return False


def kept_lse(error: Tensor) -> Tensor | None:
    """In a hook on the output, whose gradient is ``error`` ``[..., T, E]``: its log-sum-exp ``[..., T]``, if it fits.

    The node that runs next is the kernel's; asked for in the forward pass, it would be in a reference cycle.
    """
    try:
        node: Any = torch._C._current_autograd_node()
        lse = node._saved_logsumexp if node.name().startswith(_FUSED) else None
    except (AttributeError, RuntimeError):  # private, or freed
        return None
    if not isinstance(lse, Tensor) or lse.ndim != error.ndim - 1:
        return None
    lse = lse[..., : error.shape[-2]].detach()  # some kernels round the length up
    return lse if lse.shape == error.shape[:-1] else None
