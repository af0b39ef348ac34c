"""Optimizers under which a multiplied update equals a multiplied learning rate."""

from __future__ import annotations

from collections.abc import Iterable

from torch import optim
from torch.optim import Optimizer

from attnprobe.errors import ScheduleError
from attnprobe.schedules.layouts import ValuePart

# The update is linear in the rate, and no state depends on how far the weights moved.
EXACT = (
    *(optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam),
    *(optim.Adagrad, optim.Adadelta, optim.Adamax, optim.RMSprop),
)
_REFUSED = {"ASGD", "Adafactor", "LBFGS", "Muon", "Rprop", "SparseAdam"}


def refuse_kind(optimizer: Optimizer) -> None:
    """Raise ScheduleError for an optimizer whose update is known to be something else."""
    if refused := _REFUSED & {base.__name__ for base in type(optimizer).__mro__}:
        raise ScheduleError(
            f"{refused.pop()} is not supported: a rescaled update is not known to equal a higher rate there. "
            "groups() sets the rate itself where the optimizer takes parameter groups and no weight is fused."
        )


def refuse_precision(members: Iterable[ValuePart], optimizer: Optimizer) -> None:
    """Raise ScheduleError where the update that is multiplied is not all of the update."""
    for part in members:
        if reason := inexact(part, optimizer):
            raise ScheduleError(reason)


def inexact(part: ValuePart, optimizer: Optimizer) -> str | None:
    """Why the update that is multiplied would not be all of the update of a weight; None where it is."""
    if part.parameter.requires_grad and part.parameter.element_size() < 4:
        return (
            "the value weights have less than 32 bits, so each step is rounded before it is multiplied. "
            "Keep float32 weights (autocast is fine) or use groups()."
        )
    if any(group.get("differentiable") for group in optimizer.param_groups):
        return "differentiable=True is not supported: the graph would miss the multiplication"
    return None
