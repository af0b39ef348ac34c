"""A schedule at work: hooks around the optimizer's step that rescale the update of the value entries."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from attnprobe.errors import AttnProbeWarning
from attnprobe.schedules.exact import inexact
from attnprobe.schedules.finding import listed
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
        self._checked = {part.name for part in schedule.members(optimizer)}  # whether they are sharded
        self._sharded: dict[str, str] = {}
        self._aside: set[str] = set()
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
        self._old = [(part, part.view().clone()) for part in self._fit(optimizer)]

    @torch.no_grad()
    def _after(self, *_: object) -> None:
        for part, old in self._old:
            part.view().sub_(old).mul_(self.schedule.multiplier).add_(old)
        self._old = []

    def _fit(self, optimizer: Optimizer) -> list[ValuePart]:
        """The members that can be multiplied: weights may be cast, and groups added, after attach."""
        fit: list[ValuePart] = []
        new: dict[str, list[str]] = {}
        members = self.schedule.members(optimizer)
        if added := [part for part in members if part.name not in self._checked]:
            self._checked |= {part.name for part in added}
            self._sharded |= self.schedule.sharded(added)
        for part in members:
            reason = self._sharded.get(part.name) or inexact(part, optimizer)
            if reason is None:
                fit.append(part)
            elif part.name not in self._aside:
                self._aside.add(part.name)
                new.setdefault(reason, []).append(part.name)
        for reason, names in new.items():
            warnings.warn(
                f"ValueLearningRate does not multiply {listed(names)} from here on: {reason}",
                AttnProbeWarning,
                stacklevel=2,
            )
        return fit


def at_work(optimizer: Optimizer) -> list[ScheduleHandle]:
    """The handles attached to an optimizer and not removed since."""
    return [handle for handle in _ATTACHED.get(optimizer, ()) if handle.active]


def multiplied_elsewhere(optimizer: Optimizer, parameters: Collection[Tensor]) -> Optimizer | None:
    """Another optimizer in which a schedule multiplies one of the parameters."""

    def search() -> Optimizer | None:
        for other, handles in [*_ATTACHED.items()]:
            members = [part for handle in handles if handle.active for part in handle.schedule.members(other)]
            if other is not optimizer and any(part.parameter in parameters for part in members):
                return other
        return None

    if search() is None:
        return None
    gc.collect()  # one that nobody holds any more may be part of a cycle with its scheduler
    return search()
