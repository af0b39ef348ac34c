"""Keep tensors until the backward pass the way autograd itself does.

A side node saves them through ``save_for_backward``: no extra memory where the model's own
backward saves them anyway, activation checkpointing and offloading apply, and an in-place edit
in between is noticed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class _Saver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return anchor.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        raise AssertionError("nothing depends on this node")


def version_of(tensor: Tensor) -> int:
    """How often a tensor was modified in place; torch does not count it under ``inference_mode``."""
    return 0 if tensor.is_inference() else tensor._version


def _same(tensor: Tensor) -> Tensor:
    return tensor


class Held:
    """Named tensors, detached; ``release`` gives them back once, inside the backward pass.

    Args:
        tensors: what to hold.
        apart: keep them from saved-tensor hooks. For a bare function under activation checkpointing: it runs
            again without us, and torch insists on as many saves as before.
    """

    def __init__(self, tensors: Mapping[str, Tensor], *, apart: bool = False) -> None:
        self._versions = {name: version_of(tensor) for name, tensor in tensors.items()}
        hooks = torch.autograd.graph.saved_tensors_hooks(_same, _same) if apart else contextlib.nullcontext()
        with torch.enable_grad(), hooks:
            anchor = torch.empty(0, requires_grad=True)
            save: Any = _Saver.apply
            self._node: Any = save(anchor, *(tensor.detach() for tensor in tensors.values())).grad_fn

    def release(self) -> dict[str, Tensor] | None:
        """The tensors by name, None if one of them was modified in place since."""
        node, self._node = self._node, None
        try:
            tensors = dict(zip(self._versions, node.saved_tensors, strict=True))
        except RuntimeError as error:
            if "modified by an inplace operation" in str(error):
                return None
            raise
        # Autograd does not look at what went through hooks; what these made anew is of version 0.
        changed = any(version_of(tensor) > self._versions[name] for name, tensor in tensors.items())
        return None if changed else tensors
