"""What weights do in attention: which of their entries make the values, and which queries and keys.

In one forward pass every attention call is captured, with its autograd graph. A random projection of its values has a
gradient at exactly the entries that the values depend on, whatever lies in between (rotary embeddings, norms, repeated
heads), and one of its queries and keys at those that must not be touched.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnprobe.capture.call import Call
from attnprobe.capture.modules import Entry
from attnprobe.capture.session import Intercept, Session
from attnprobe.errors import ScheduleError
from attnprobe.schedules.finding import listed


@dataclass
class Role:
    """What a weight does in the first attention that depends on it.

    Attributes:
        layer: the attention's module.
        entry: the run of a module during which further calls belong to the same attention.
        values: per axis of the weight, at which indices the values depend on it.
        others: the same of queries and keys.
        width: of a head's values.
        linear: whether the weight is that of an ``nn.Linear``, whose outputs are its first axis.
        finite: whether all gradients are.
    """

    layer: str
    entry: Entry
    values: list[Tensor]
    others: list[Tensor]
    width: int
    linear: bool
    finite: bool = True


class Roles(Session):
    """A session that asks of each captured call which of the weights it depends on."""

    def __init__(self, model: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
        super().__init__(model, lambda module, record: None, forward_only=True)
        self.roles: dict[int, Role] = {}  # by id of the weight
        self._weights = {id(weight): weight for weight in weights.values() if weight.is_floating_point()}
        self._owners: dict[int, set[int]] = {key: set() for key in self._weights}
        self._linear: set[int] = set()
        for name, weight in weights.items():
            parts = name.split(".")[:-1]
            above = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts) + 1)]
            self._owners.get(id(weight), set()).update(map(id, above[1:]))
            if isinstance(above[-1], nn.Linear):
                self._linear.add(id(weight))
        self._dark: list[str] = []  # layers of which something had no gradient
        self.logits: dict[int, Tensor] = {}  # by where they are in memory: a call has them without their graph
        self.mode = self.watch.mode = _KeepLogits(self)

    def observe(self, call: Call) -> None:
        entries = self.watch.running.entries
        if not entries:
            return
        layer, tensors = entries[-1].name, call.tensors
        # A later attention depends on it through the residual stream: only the first says what it is.
        asked = [key for key in self._weights if key not in self.roles or self._same(self.roles[key], entries)]
        scores = self._scores(tensors)
        recorded = torch.is_grad_enabled() and tensors["value"].requires_grad
        if not recorded or any(tensor is None for tensor in scores):
            self._dark.append(layer)
            return
        with torch._C.DisableTorchFunction():
            values = self._gradients([tensors["value"]], asked)
            others = self._gradients(scores, asked)
        for key, *gradients in zip(asked, values, others, strict=True):
            if not any(gradient is not None and bool((gradient != 0).any()) for gradient in gradients):
                continue
            shape = self._weights[key].shape or torch.Size([1])
            marks = [_marked(gradient, shape) for gradient in gradients]
            finite = all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients)
            if (role := self.roles.get(key)) is None:
                width, run = tensors["value"].shape[-1], self._run_of(key, entries)
                self.roles[key] = Role(layer, run, marks[0], marks[1], width, key in self._linear, finite)
            else:
                role.values = [old | new for old, new in zip(role.values, marks[0], strict=True)]
                role.others = [old | new for old, new in zip(role.others, marks[1], strict=True)]
                role.finite &= finite

    def _scores(self, tensors: Mapping[str, Tensor]) -> list[Tensor | None]:
        """What queries and keys are seen in, with its graph; None where that was not found."""
        if "logits" not in tensors:
            return [tensors["query"], tensors["key"]]
        return [self.logits.get(tensors["logits"].untyped_storage().data_ptr())]

    def missing(self) -> ScheduleError:
        """Why no captured attention depends on a weight."""
        refused = [f"{seen.module}: {seen.reason}" for seen in self.seen if seen.reason]
        refused += [f"{module}: {type(error).__name__}: {error}" for module, error in self.problems.items()]
        if self._dark:
            layers = listed(dict.fromkeys(self._dark))
            refused.append(f"{layers} ran without gradients, as under no_grad() or inside of an autograd.Function")
        more = f" ({'; '.join(dict.fromkeys(refused))})" if refused else ""
        return ScheduleError(f"no captured attention depends on it{more}")

    def _same(self, role: Role, entries: list[Entry]) -> bool:
        """Whether the attention of a role is still under way: some have several calls."""
        return any(entry is role.entry for entry in entries)

    def _run_of(self, key: int, entries: list[Entry]) -> Entry:
        """The run of the innermost module that has both the weight and the call, if that is not the whole model."""
        inside = [entry for entry in entries[1:] if entry.module in self._owners[key]]
        return (inside or entries)[-1]

    def _gradients(self, given: Sequence[Tensor | None], keys: list[int]) -> list[Tensor | None]:
        """Of a random projection of the tensors, with respect to weights."""
        tensors = [tensor for tensor in given if tensor is not None and tensor.requires_grad]
        if not tensors or not keys:
            return [None] * len(keys)
        directions = [torch.randn_like(tensor) for tensor in tensors]  # the caller's random state is restored
        weights = [self._weights[key] for key in keys]
        return [*torch.autograd.grad(tensors, weights, directions, retain_graph=True, allow_unused=True)]


class _KeepLogits(Intercept):
    """Keeps what goes into a softmax, with its graph."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = super().__torch_function__(func, types, args, kwargs)
        if getattr(func, "__name__", "") in ("softmax", "special_softmax"):
            logits = args[0] if args else (kwargs or {})["input"]
            if isinstance(self.session, Roles) and not logits.is_nested:
                self.session.logits[logits.untyped_storage().data_ptr()] = logits
        return result


def _marked(gradient: Tensor | None, shape: torch.Size) -> list[Tensor]:
    """Per axis, at which indices there is a gradient."""
    if gradient is None:
        return [torch.zeros(size, dtype=torch.bool) for size in shape]
    there = (gradient != 0).view(shape)
    return [there.movedim(axis, 0).reshape(size, -1).any(1).cpu() for axis, size in enumerate(shape)]
