"""The EM-like schedule: the value projection learns ``multiplier`` times as fast as the rest of the model."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from attnprobe.errors import AttnProbeWarning, ConfigurationError, ScheduleError
from attnprobe.schedules.confirm import stretches
from attnprobe.schedules.exact import EXACT, refuse_kind, refuse_precision
from attnprobe.schedules.finding import conventional, listed, made, matching, multihead
from attnprobe.schedules.handle import ScheduleHandle, at_work, multiplied_elsewhere
from attnprobe.schedules.layouts import ValuePart
from attnprobe.schedules.sharded import refuse_flat, refuse_sharded, sharded


class ValueLearningRate:
    """Let the value projection learn ``multiplier`` times as fast as the rest (the EM-like schedule).

    ``attach`` rescales the update of the value weights, ``v <- old + multiplier * (v - old)``, and thus keeps the
    ratio under any scheduler; ``groups`` gives plain parameter groups. Use one of the two. Both multiply decoupled
    weight decay as well. Fused weights, such as ``c_attn`` or ``qkv_proj``, take ``attach`` and ``confirm``::

        schedule = ValueLearningRate(model, 10.0, confirm=lambda: model(**batch))
        handle = schedule.attach(optimizer)

    ``attnprobe.lightning.ValueSchedule`` and ``attnprobe.huggingface.ValueScheduleCallback`` do both in a Trainer.

    Args:
        model: the model.
        multiplier: rate of the value projection over the rate of the rest.
        parameters: glob pattern(s) of full parameter names, such as ``"*.v_proj.*"``. None finds weights and biases
            by their conventional names: separate ones (``v_proj``, ``value``, ``W_V``, ``to_v``, ...) beside a query
            and a key, fused ones (``c_attn``, ``qkv``, ``query_key_value``, ``qkv_proj``, ``to_kv``, ...), and those
            of ``nn.MultiheadAttention``, without its ``bias_v``, which is a further token.
        confirm: runs one forward pass of the model on any batch, here and once, in evaluation mode. The values that
            it captures tell which entries of each weight make them. Fused weights other than those of
            ``nn.MultiheadAttention`` need it; others are then confirmed as well. Gradients, buffers, random state
            and training mode are as before afterwards.

    Attributes:
        names: the parameters it acts on, frozen ones included; a shared parameter appears once.
        parameters: the same, as parameters.
        parts: the same, with which entries of each are meant; ``str(part)`` says so.

    Raises:
        ConfigurationError: an argument that cannot work.
        ScheduleError: the value weights were not found, or are not certain.
    """

    def __init__(
        self,
        model: nn.Module,
        multiplier: float = 10.0,
        *,
        parameters: str | Iterable[str] | None = None,
        confirm: Callable[[], object] | None = None,
    ) -> None:
        check_schedule(multiplier, confirm, "lambda: model(**batch)")
        self.multiplier = float(multiplier)
        self._model = model
        # Every name of a shared parameter counts: two names with two roles are a reason to refuse.
        named = dict(model.named_parameters(remove_duplicate=False))
        refuse_flat(named)
        places, pieces, confirming = multihead(model), made(model), confirm is not None
        if parameters is None:
            chosen = conventional(list(named), places, pieces, confirming=confirming)
        else:
            chosen = matching(list(named), parameters, places, pieces, confirming=confirming)
        members = {named[name]: name for name in reversed(chosen)}  # the first name of each remains
        for name in named:
            if named[name] in members and name not in chosen:
                raise ScheduleError(
                    f"{members[named[name]]!r} is the same parameter as {name!r}, which is no value projection here "
                    "and would learn faster too. Name both in parameters= if that is meant."
                )
        if confirm is not None:
            unknown = {name: named[name] for name in chosen if name not in places}
            refuse_sharded(model, unknown.items())
            places |= stretches(model, confirm, unknown)
        self.parts = tuple(
            ValuePart(name, named[name], places.get(name)) for name in chosen if members[named[name]] == name
        )
        self.names = tuple(part.name for part in self.parts)
        self.parameters = tuple(part.parameter for part in self.parts)

    def attach(self, optimizer: Optimizer) -> ScheduleHandle:
        """Multiply the steps that ``optimizer`` makes on the value weights, until the handle is removed.

        Up to rounding this is exact for SGD, Adam, AdamW, NAdam, RAdam, Adagrad, Adadelta, Adamax and RMSprop of torch.
        A weight that is cast to less than 32 bits later on is left to the optimizer, with a warning.
        It costs one copy of the value entries during the step, including a closure's forward and backward (Lightning
        passes one). Nothing goes into the optimizer's ``state_dict``, and a pickled or deep-copied optimizer has no
        hooks: attach again after loading.

        Raises:
            ScheduleError: none of the value weights is in this optimizer, they cannot move, something already
                multiplies them, here or in another optimizer, or rescaling would not equal a higher rate.
        """
        # Lightning and accelerate wrap the optimizer; only the inner one runs the hooks.
        while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
            optimizer = inner
        if not isinstance(optimizer, Optimizer):
            raise ConfigurationError(f"attach() takes a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self._check(optimizer)
        return ScheduleHandle(self, optimizer)

    def groups(self, lr: float, **options: Any) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer: each trainable parameter once, the value weights at ``lr * multiplier``.

        ``options`` go into every group. A scheduler with one absolute rate for all groups undoes the ratio, as
        ``OneCycleLR(max_lr=0.1)`` does without a warning: give it one rate per group, or use ``attach``.

        Raises:
            ScheduleError: the value weights are frozen, or fused with others: a group takes whole parameters.
        """
        if fused := [part for part in self.parts if part.stretch is not None]:
            raise ScheduleError(
                "a parameter group takes whole parameters, and of these only a part makes the values: "
                f"{listed(fused)}. Use attach(optimizer), which rescales the update of that part."
            )
        self._refuse_frozen(self.parts)
        values = set(self.parameters)
        trainable = [p for p in self._model.parameters() if p.requires_grad]
        rest = {**options, "params": [p for p in trainable if p not in values], "lr": lr}
        fast = {**options, "params": [p for p in trainable if p in values], "lr": lr * self.multiplier}
        fast["value_multiplier"] = self.multiplier  # optimizers keep unknown keys; attach() looks for this one
        return [group for group in (rest, fast) if group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Multiplier and names, with the entries meant, as plain Python values."""
        return {"multiplier": self.multiplier, "names": [_unwrapped(str(part)) for part in self.parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Compare with where ``state_dict`` was taken, and warn of what differs; nothing changes."""
        now = self.state_dict()
        if (before := state.get("multiplier", now["multiplier"])) != now["multiplier"]:
            _say(f"the checkpoint was trained with multiplier {before}; from here on {now['multiplier']} is in force")
        names, old = set(now["names"]), set(state.get("names", now["names"]))
        if names != old:
            _say(
                "the checkpoint was trained with other value weights. Multiplied from here on: "
                f"{listed(sorted(names))}. New: {listed(sorted(names - old))}. "
                f"No longer: {listed(sorted(old - names))}"
            )

    def members(self, optimizer: Optimizer) -> list[ValuePart]:
        """Value weights in this optimizer now: groups may be added during training."""
        parts = dict(zip(self.parameters, self.parts, strict=True))
        return [parts[p] for group in optimizer.param_groups for p in group["params"] if p in parts]

    def sharded(self, members: Iterable[ValuePart]) -> dict[str, str]:
        """Names of fused weights whose value entries may be missing in this process, and why."""
        return sharded(self._model, [(part.name, part.parameter) for part in members if part.stretch is not None])

    def _check(self, optimizer: Optimizer) -> None:
        """Raise where a multiplied update would not be a multiplied rate."""
        kind = type(optimizer)
        refuse_kind(optimizer)
        members = self.members(optimizer)
        if not members:
            raise ScheduleError(f"this {kind.__name__} holds none of the value parameters: {listed(self.names)}")
        self._refuse_frozen(members)
        refuse_precision(members, optimizer)
        for name, reason in self.sharded(members).items():
            raise ScheduleError(f"{name!r} is {reason}")
        mine = {part.parameter for part in members}
        grouped = any("value_multiplier" in g and mine & set(g["params"]) for g in optimizer.param_groups)
        attached = any(mine & set(other.schedule.parameters) for other in at_work(optimizer))
        if grouped or attached:
            raise ScheduleError(
                f"a schedule already multiplies value parameters of this {kind.__name__}, through "
                + ("groups()" if grouped else "attach(); remove() its handle first")
            )
        if other := multiplied_elsewhere(optimizer, mine):
            raise ScheduleError(
                f"a schedule already multiplies the same value parameters in another optimizer, "
                f"{type(other).__name__}: both would multiply them; remove() its handle, or drop that optimizer, first"
            )
        if kind not in EXACT:
            warnings.warn(
                f"ValueLearningRate is not verified with {kind.__module__}.{kind.__qualname__}: it is exact only where "
                "the update is linear in the learning rate.",
                AttnProbeWarning,
                stacklevel=3,
            )

    def _refuse_frozen(self, members: Iterable[ValuePart]) -> None:
        if not any(part.parameter.requires_grad for part in members):
            raise ScheduleError(f"the value parameters are frozen, nothing would change: {listed(self.names)}")


def check_schedule(multiplier: object, confirm: object, example: str) -> None:
    """Raise ConfigurationError unless the multiplier is a number above 0 and ``confirm`` a function, or None."""
    if isinstance(multiplier, bool) or not isinstance(multiplier, int | float):
        raise ConfigurationError(f"multiplier must be a number, got {multiplier!r}")
    if not (math.isfinite(multiplier) and multiplier > 0):
        raise ConfigurationError(f"multiplier must be finite and above 0, got {multiplier!r}")
    if confirm is not None and not callable(confirm):
        raise ConfigurationError(f"confirm must be a function that runs a forward pass: {example}; got {confirm!r}")


def _unwrapped(name: str) -> str:
    """Without what compiling, checkpointing or parallel training put in front."""
    return re.sub(r"^module\.|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.", "", name)


def _say(message: str) -> None:
    warnings.warn(f"ValueLearningRate: {message}.", AttnProbeWarning, stacklevel=4)
