"""Where in each weight the value entries are, as one forward pass shows it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from attnprobe.collect import apart
from attnprobe.errors import ScheduleError
from attnprobe.preserve import preserved
from attnprobe.schedules.finding import listed
from attnprobe.schedules.layouts import Stretch, stretch_of
from attnprobe.schedules.roles import Role, Roles


def stretches(
    model: nn.Module, closure: Callable[[], object], weights: Mapping[str, nn.Parameter]
) -> dict[str, Stretch | None]:
    """Where in each weight the value entries are, None for all of it; the model is afterwards as it was.

    Raises:
        ScheduleError: of some weight the captured values do not say so.
    """
    watcher = Roles(model, weights)
    with apart(model), preserved(model), _trainable(weights), torch.inference_mode(False), torch.enable_grad():
        model.eval()  # the answer must not depend on dropout
        watcher.start()
        try:
            closure()
        finally:
            watcher.stop()
            watcher.logits.clear()  # a session is part of reference cycles and may live on for long
    found: dict[str, Stretch | None] = {}
    reasons: dict[str, list[str]] = {}
    for name, weight in weights.items():
        try:
            if (role := watcher.roles.get(id(weight))) is None:
                raise watcher.missing()
            found[name] = _located(role)
        except ScheduleError as error:
            reasons.setdefault(str(error), []).append(name)
    if reasons:
        told = "; ".join(f"{listed(names)}: {reason}" for reason, names in reasons.items())
        raise ScheduleError(
            f"the forward pass of confirm= does not show which entries make the values. {told}. "
            f"Shown: {listed(found)}; parameters= with names or glob patterns acts on some alone."
        )
    return found


@contextlib.contextmanager
def _trainable(weights: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Frozen weights get gradients too, inside."""
    frozen = [weight for weight in weights.values() if not weight.requires_grad and weight.is_floating_point()]
    for weight in frozen:
        weight.requires_grad_()
    try:
        yield
    finally:
        for weight in frozen:
            weight.requires_grad_(False)


def _located(role: Role) -> Stretch | None:
    """Where the value entries are; None for everywhere."""
    if not role.finite:
        raise ScheduleError(f"a gradient in {role.layer!r} is not finite")
    if not role.values[0].any():
        raise ScheduleError(f"the captured values of {role.layer!r} do not depend on it, only its queries or keys do")
    if not role.others[0].any():
        # Inputs that happen to be 0 have no gradient; where they are is known of a Linear only.
        if all(bool(marked.all()) for marked in (role.values[:1] if role.linear else role.values)):
            return None
        raise ScheduleError(f"only a part of it makes the captured values of {role.layer!r}, the rest is unknown")
    apart = [
        axis
        for axis, (values, others) in enumerate(zip(role.values, role.others, strict=True))
        if not (values & others).any()
    ]
    if not apart:
        raise ScheduleError(
            f"in {role.layer!r}, the first captured attention that depends on it, queries or keys depend on the same "
            "entries as the values: they are shared, mixed, or its own attention was not captured"
        )
    if len(apart) > 1:
        raise ScheduleError(f"the values of {role.layer!r} can be told from its queries and keys along several axes")
    return _regular(role, apart[0])


def _regular(role: Role, axis: int) -> Stretch:
    marked, others = role.values[axis], role.others[axis]
    stretch = stretch_of(marked.tolist(), axis)
    # An entry without a gradient by chance would shorten it: then it is in none of the roles.
    whole = bool((marked | others).all()) or int(marked.sum()) % role.width == 0
    if stretch is None or not whole:
        raise ScheduleError(
            f"the {int(marked.sum())} of {len(marked)} indices of axis {axis} that make the captured values of "
            f"{role.layer!r} fit no layout: neither one block nor the same block in every head"
        )
    return stretch
