"""The EM-like schedule: the value projection learns ``multiplier`` times as fast as the rest of the model."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer

from attnprobe.errors import AttnProbeWarning, ConfigurationError, ScheduleError

# A name counts only beside its query and key: RWKV's feed-forward has a `value`, an actor-critic has one too.
_TRIOS = (
    ("q", "k", "v"),
    ("Q", "K", "V"),
    ("qs", "ks", "vs"),
    ("query", "key", "value"),
    ("queries", "keys", "values"),
)
_FORMS = (
    *("{}", "{}_proj", "proj_{}", "to_{}", "to{}", "{}_lin", "lin_{}", "{}_linear", "linear_{}", "{}_layer", "fc_{}"),
    *("w{}", "W{}", "w_{}", "W_{}", "b_{}", "add_{}_proj", "{}_proj_weight"),
)
_SIBLINGS = {form.format(v): (form.format(q), form.format(k)) for form in _FORMS for q, k, v in _TRIOS}
_FUSED = {form.format(x) for form in _FORMS for x in ("qkv", "kv", "QKV", "KV", "query_key_value", "key_value")}
# MultiheadAttention's in_proj_bias is absent: it stays fused beside a separate v_proj_weight.
_FUSED |= {"in_proj_weight", "c_attn", "att_proj", "kv_b_proj", "wkv_b", "W_pack"}

# The update is linear in the rate, and no state depends on how far the weights moved.
_EXACT = (
    *(optim.SGD, optim.Adam, optim.AdamW, optim.NAdam, optim.RAdam),
    *(optim.Adagrad, optim.Adadelta, optim.Adamax, optim.RMSprop),
)
_REFUSED = {"ASGD", "Adafactor", "LBFGS", "Muon", "Rprop", "SparseAdam"}

# Two schedules on one weight would multiply each other, for example after a notebook cell ran twice. Weak on both
# sides: a handle reaches its model, and a Lightning model its optimizers.
_ATTACHED: WeakKeyDictionary[Optimizer, WeakSet[ScheduleHandle]] = WeakKeyDictionary()


class ValueLearningRate:
    """Let the value projection learn ``multiplier`` times as fast as the rest (the EM-like schedule).

    ``attach`` rescales the update of the value weights, ``v <- old + multiplier * (v - old)``, and thus keeps the
    ratio under any scheduler; ``groups`` gives plain parameter groups. Use one of the two. Both multiply decoupled
    weight decay as well. Under Lightning::

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=3e-4)
            ValueLearningRate(self, 10.0).attach(optimizer)
            return optimizer

    Args:
        model: the model, with value projections that are parameters of their own.
        multiplier: rate of the value projection over the rate of the rest.
        parameters: glob pattern(s) of full parameter names, such as ``"*.v_proj.*"``. None finds weights and biases
            by their conventional names (``v_proj``, ``value``, ``W_V``, ``to_v``, ...) beside a query and a key. The
            value bias inside the ``in_proj_bias`` of ``nn.MultiheadAttention`` is never part of it.

    Attributes:
        names: the parameters it acts on, frozen ones included; a shared parameter appears once.
        parameters: the same, as parameters.

    Raises:
        ConfigurationError: an argument that cannot work.
        ScheduleError: the value weights were not found, are fused with others, or are not certain.
    """

    def __init__(
        self, model: nn.Module, multiplier: float = 10.0, *, parameters: str | Iterable[str] | None = None
    ) -> None:
        if isinstance(multiplier, bool) or not isinstance(multiplier, int | float):
            raise ConfigurationError(f"multiplier must be a number, got {multiplier!r}")
        if not (math.isfinite(multiplier) and multiplier > 0):
            raise ConfigurationError(f"multiplier must be finite and above 0, got {multiplier!r}")
        self.multiplier = float(multiplier)
        self._model = model
        # Every name of a shared parameter counts: two names with two roles are a reason to refuse.
        named = dict(model.named_parameters(remove_duplicate=False))
        chosen = _conventional(list(named)) if parameters is None else _matching(list(named), parameters)
        members = {named[name]: name for name in reversed(chosen)}  # the first name of each remains
        for name in named:
            if named[name] in members and name not in chosen:
                raise ScheduleError(
                    f"{members[named[name]]!r} is the same parameter as {name!r}, which is no value projection here "
                    "and would learn faster too. Name both in parameters= if that is meant."
                )
        self.names = tuple(name for name in chosen if members[named[name]] == name)
        self.parameters = tuple(named[name] for name in self.names)

    def attach(self, optimizer: Optimizer) -> ScheduleHandle:
        """Multiply the steps that ``optimizer`` makes on the value weights, until the handle is removed.

        Up to rounding this is exact for SGD, Adam, AdamW, NAdam, RAdam, Adagrad, Adadelta, Adamax and RMSprop of torch.
        It costs one copy of the value weights during the step, including a closure's forward and backward (Lightning
        passes one). Nothing goes into the optimizer's ``state_dict``, and a pickled or deep-copied optimizer has no
        hooks: attach again after loading.

        Raises:
            ScheduleError: none of the value weights is in this optimizer, they cannot move, something already
                multiplies them, or rescaling would not equal a higher rate.
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
        """
        self._refuse_frozen(self.parameters)
        values = set(self.parameters)
        trainable = [p for p in self._model.parameters() if p.requires_grad]
        rest = {**options, "params": [p for p in trainable if p not in values], "lr": lr}
        fast = {**options, "params": [p for p in trainable if p in values], "lr": lr * self.multiplier}
        fast["value_multiplier"] = self.multiplier  # optimizers keep unknown keys; attach() looks for this one
        return [group for group in (rest, fast) if group["params"]]

    def _members(self, optimizer: Optimizer) -> list[Tensor]:
        """Value weights in this optimizer now: groups may be added during training."""
        values = set(self.parameters)
        return [p for group in optimizer.param_groups for p in group["params"] if p in values]

    def _check(self, optimizer: Optimizer) -> None:
        """Raise where a multiplied update would not be a multiplied rate."""
        kind = type(optimizer)
        if refused := _REFUSED & {base.__name__ for base in kind.__mro__}:
            raise ScheduleError(
                f"{refused.pop()} is not supported: a rescaled update is not known to equal a higher rate there. "
                "groups() sets the rate itself where the optimizer takes parameter groups."
            )
        members = self._members(optimizer)
        if not members:
            raise ScheduleError(f"this {kind.__name__} holds none of the value parameters: {_listed(self.names)}")
        self._refuse_frozen(members)
        if any(p.requires_grad and p.element_size() < 4 for p in members):
            raise ScheduleError(
                "the value weights have less than 32 bits, so each step is rounded before it is multiplied. "
                "Keep float32 weights (autocast is fine) or use groups()."
            )
        if any(group.get("differentiable") for group in optimizer.param_groups):
            raise ScheduleError("differentiable=True is not supported: the graph would miss the multiplication")
        mine = set(members)
        grouped = any("value_multiplier" in g and mine & set(g["params"]) for g in optimizer.param_groups)
        attached = (other.schedule.parameters for other in _ATTACHED.get(optimizer, ()) if other.active)
        if grouped or any(mine & set(parameters) for parameters in attached):
            raise ScheduleError(
                f"a schedule already multiplies value parameters of this {kind.__name__}, through "
                + ("groups()" if grouped else "attach(); remove() its handle first")
            )
        if kind not in _EXACT:
            warnings.warn(
                f"ValueLearningRate is not verified with {kind.__module__}.{kind.__qualname__}: it is exact only where "
                "the update is linear in the learning rate.",
                AttnProbeWarning,
                stacklevel=3,
            )

    def _refuse_frozen(self, members: Iterable[Tensor]) -> None:
        if not any(p.requires_grad for p in members):
            raise ScheduleError(f"the value parameters are frozen, nothing would change: {_listed(self.names)}")


class ScheduleHandle:
    """A schedule at work in an optimizer; ``remove()``, or leaving it as a context manager, ends that."""

    def __init__(self, schedule: ValueLearningRate, optimizer: Optimizer) -> None:
        self.schedule = schedule
        self._old: list[tuple[Tensor, Tensor]] = []
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

    def __enter__(self) -> ScheduleHandle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _before(self, optimizer: Optimizer, *_: object) -> None:
        # Gradients say nothing yet, for a closure may compute them. A step that raised leaves a copy: overwritten.
        self._old = [(p, p.detach().clone()) for p in self.schedule._members(optimizer)]

    @torch.no_grad()
    def _after(self, *_: object) -> None:
        for new, old in self._old:
            new.sub_(old).mul_(self.schedule.multiplier).add_(old)
        self._old = []


def _split(name: str) -> tuple[str, str]:
    """Owner and conventional part: ``a.v_proj.bias`` -> ``("a", "v_proj")``, ``a.W_V`` -> ``("a", "W_V")``."""
    owner, _, part = re.sub(r"\.(weight|bias)$", "", name).rpartition(".")
    return owner, part.lstrip("_")


def _conventional(names: list[str]) -> list[str]:
    """Names of value parameters, or a ScheduleError where that is not certain."""
    present = {_split(name) for name in names}
    found: list[str] = []
    fused: list[str] = []
    alone: list[str] = []
    for name in names:
        owner, part = _split(name)
        if part in _FUSED:
            fused.append(name)
        elif part in _SIBLINGS:
            complete = all((owner, sibling) in present for sibling in _SIBLINGS[part])
            (found if complete else alone).append(name)
    if fused:
        more = f" Name the separate ones in parameters= to act on these alone: {_listed(found)}." if found else ""
        raise ScheduleError(f"value weights are part of a fused weight, not supported yet: {_listed(fused)}.{more}")
    if alone:
        raise ScheduleError(
            f"cannot tell whether these are value projections, for no query and key stand beside them: "
            f"{_listed(alone)}. Certain: {_listed(found)}. Pass parameters= with names or glob patterns."
        )
    if not found:
        raise ScheduleError(
            "no value projection found. Looked for v_proj, value, v, W_V, to_v, v_lin and the like, beside a query and "
            f"a key of the same form. Pass parameters= with names or glob patterns. {_candidates(names)}"
        )
    return found


def _matching(names: list[str], patterns: str | Iterable[str]) -> list[str]:
    """Names that match any of the patterns, each of which must match something."""
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ConfigurationError("parameters= is empty; leave it out to find the value weights by name")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise ScheduleError(f"no parameter matches {pattern!r}. {_candidates(names)}")
    found = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    if fused := [name for name in found if _split(name)[1] in _FUSED]:
        raise ScheduleError(f"these hold more than values, and fused weights are not supported yet: {_listed(fused)}")
    return found


def _candidates(names: list[str]) -> str:
    likely = [name for name in names if re.search(r"att|val|kv|(?<![a-z])v(?![a-z])", name, re.IGNORECASE)]
    return f"Candidates: {_listed(likely)}." if likely else f"Parameters: {_listed(names)}."


def _listed(names: Iterable[str], limit: int = 8) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return (", ".join(map(repr, names[:limit])) or "none") + more
