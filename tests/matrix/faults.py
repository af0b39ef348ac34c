"""Errors in the middle of a step, from which the training loop recovers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tests.matrix.variant import Batch, Variant

if TYPE_CHECKING:
    from tests.matrix.training import Cell, History


class Trap:
    """Raises once in every step, in the forward pass after all attention or in the backward pass after all of it.

    Its hooks are on the model in the run without the probe as well.
    """

    def __init__(self, error: type[BaseException], *, backward: bool) -> None:
        self.error, self.backward, self.armed = error, backward, False

    def install(self, variant: Variant, model: nn.Module) -> nn.Module:
        leaves = _leaves_in_order(variant, model)
        if self.backward:
            leaves[0].register_forward_hook(self._in_backward)
        else:
            leaves[-1].register_forward_pre_hook(self._in_forward)
        return model

    def spring(self, cell: Cell, batch: Batch, history: History) -> None:
        """Fail once, as a loop does that skips bad batches."""
        self.armed = True
        try:
            torch.autograd.backward(cell.loss(cell.models, batch))
        except self.error:
            for model in cell.models:
                model.zero_grad()
        else:
            history.problems.append("the model did not fail")
        self.armed = False

    def _in_forward(self, module: nn.Module, inputs: Any) -> None:
        if self.armed:
            raise self.error("in the forward pass")

    def _in_backward(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if self.armed:
            output.register_hook(self._raise)

    def _raise(self, gradient: Tensor) -> None:
        raise self.error("in the backward pass")


def _leaves_in_order(variant: Variant, model: nn.Module) -> list[nn.Module]:
    """The modules without children that a forward pass calls and that give a tensor with a gradient."""
    called: list[nn.Module] = []

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            called.append(module)

    handles = [m.register_forward_hook(note) for m in model.modules() if not [*m.children()]]
    variant.loss(model, variant.batch(0))
    for handle in handles:
        handle.remove()
    return called
