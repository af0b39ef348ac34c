"""Keep tensors until the backward pass the way autograd itself does.

A side node saves them through ``save_for_backward``: no extra memory where the model's own
backward saves them anyway, activation checkpointing and offloading apply, and an in-place edit
in between is an error on access instead of a silently wrong number.
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
        self._names = tuple(tensors)
        hooks = torch.autograd.graph.saved_tensors_hooks(_same, _same) if apart else contextlib.nullcontext()
        with torch.enable_grad(), hooks:
            anchor = torch.empty(0, requires_grad=True)
            save: Any = _Saver.apply
            self._node: Any = save(anchor, *(tensor.detach() for tensor in tensors.values())).grad_fn

    def release(self) -> dict[str, Tensor]:
        """The tensors by name.

        Raises:
            RuntimeError: one of them was modified in place since.
        """
        node, self._node = self._node, None
        return dict(zip(self._names, node.saved_tensors, strict=True))
