"""A schedule at work: hooks around the optimizer's step that rescale the update of the value entries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from attnprobe.schedules.layouts import ValuePart

if TYPE_CHECKING:
    from attnprobe.schedules.value_rate import ValueLearningRate

# Two schedules on one weight would multiply each other, for example after a notebook cell ran twice. Weak on both
# sides: a handle reaches its model, and a Lightning model its optimizers.
_ATTACHED: WeakKeyDictionary[Optimizer, WeakSet[ScheduleHandle]] = WeakKeyDictionary()


class ScheduleHandle:
    """A schedule at work in an optimizer; ``remove()``, or leaving it as a context manager, ends that."""

    def __init__(self, schedule: ValueLearningRate, optimizer: Optimizer) -> None:
        self.schedule = schedule
        self._old: list[tuple[ValuePart, Tensor]] = []
        self._hooks = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        _ATTACHED.setdefault(optimizer, WeakSet()).add(self)

    @property
    def active(self) -> bool:
        """False once removed."""
        return bool(self._hooks)

    def remove(self) -> None:
        """Take the hooks out; a second call does nothing."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._old = [], []

    def state_dict(self) -> dict[str, Any]:
        """Multiplier and names, for a checkpoint, as plain Python values."""
        return self.schedule.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Warn if the checkpoint was trained with another multiplier or other weights; what is attached stays."""
        self.schedule.load_state_dict(state)

    def __enter__(self) -> ScheduleHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _before(self, optimizer: Optimizer, *_: object) -> None:
        # Gradients say nothing yet, for a closure may compute them. A step that raised leaves a copy: overwritten.
        self._old = [(part, part.view().clone()) for part in self.schedule.members(optimizer)]

    @torch.no_grad()
    def _after(self, *_: object) -> None:
        for part, old in self._old:
            part.view().sub_(old).mul_(self.schedule.multiplier).add_(old)
        self._old = []


def at_work(optimizer: Optimizer) -> list[ScheduleHandle]:
    """The handles attached to an optimizer and not removed since."""
    return [handle for handle in _ATTACHED.get(optimizer, ()) if handle.active]
