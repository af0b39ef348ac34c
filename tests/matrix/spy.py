"""What autograd says by itself: every tensor that a forward pass shows to torch's functions, and its gradient."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.global_state import global_state


class Spy(TorchFunctionMode):
    """Hooks every tensor with a history, whatever function takes or gives it.

    A call of the probe is found again by its numbers: a tensor of the same values in any layout, which need not be
    known, and then the gradients that belong to these values.
    """

    def __init__(self) -> None:
        super().__init__()
        self._opened = contextlib.ExitStack()
        self._sights: list[tuple[Tensor, list[Tensor]]] = []
        self._known: dict[tuple[int, int], Tensor] = {}  # holds the tensors: an id must not come twice

    def __enter__(self) -> Spy:
        # nn.MultiheadAttention and the backward pass are one opaque call otherwise.
        for module in (F, torch.autograd):
            self._opened.enter_context(mock.patch.object(module, "has_torch_function", _never))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._opened.close()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # FlexAttention does it inside
            return func(*args, **kwargs)
        self._look((args, (*kwargs.values(),)))
        result = func(*args, **kwargs)
        self._look(result)
        return result

    def _look(self, tree: Any) -> None:
        for tensor in _tensors(tree):
            if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
                continue
            if tensor.grad_fn is None or not tensor.is_floating_point():
                continue
            seen = (id(tensor), tensor._version)
            if seen not in self._known:
                self._known[seen] = tensor
                gradients: list[Tensor] = []
                tensor.register_hook(partial(_keep, gradients))
                self._sights.append((tensor.detach().clone(), gradients))

    @cached_property
    def _by_values(self) -> dict[bytes, list[tuple[Tensor, Tensor]]]:
        index: dict[bytes, list[tuple[Tensor, Tensor]]] = {}
        for values, gradients in self._sights:
            for gradient in gradients:
                index.setdefault(_key(values), []).append((values, gradient))
        return index

    def difference(self, values: Tensor, gradient: Tensor, digits: int | None = None) -> float:
        """Largest ``|ours - autograd's| / (1 + |ours|)`` at the tensor of these values that fits best; inf for none.

        ``digits`` is for values that are known up to rounding: so many decimals have to agree.
        """
        if digits is None:
            candidates = self._by_values.get(_key(values), [])
        else:
            values = values.round(decimals=digits)
            every = [(v.round(decimals=digits), g) for sights in self._by_values.values() for v, g in sights]
            candidates = [(v, g) for v, g in every if v.numel() == values.numel() and _key(v) == _key(values)]
        ours = _paired(values, gradient)
        return min((_distance(ours, _paired(*found)) for found in candidates), default=math.inf)

    def difference_of(self, gradient: Tensor) -> float:
        """The same where only the gradient is known."""
        ours = _sorted(gradient)
        every = (found for sights in self._by_values.values() for _, found in sights)
        return min((_distance(ours, _sorted(g)) for g in every if g.numel() == gradient.numel()), default=math.inf)


class Sentry(TorchFunctionMode):
    """Looks from inside of a forward pass whether anything is active that was not active before."""

    def __init__(self, before: dict[str, Any]) -> None:
        super().__init__()
        self.before, self.looks, self.alarms = before, 0, 0

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not torch.compiler.is_compiling():
            now = global_state() | {"grad": self.before["grad"]}  # models switch gradients on and off
            functions, dispatches = now["modes"]
            # Within code that dynamo traced, this mode stays where it is while it handles a call.
            now["modes"] = [mode for mode in functions if mode != id(self)], dispatches
            self.looks, self.alarms = self.looks + 1, self.alarms + (now != self.before)
        return func(*args, **(kwargs or {}))


def _keep(gradients: list[Tensor], gradient: Tensor | None) -> None:
    if gradient is not None:
        gradients.append(gradient.detach().clone())


def _tensors(tree: Any) -> Iterator[Tensor]:
    if type(tree) is Tensor:
        yield tree
    elif isinstance(tree, tuple | list):
        for branch in tree:
            yield from _tensors(branch)


def _never(tensors: Any) -> bool:
    return False


def _sorted(tensor: Tensor) -> np.ndarray:
    return np.sort(tensor.double().flatten().numpy())


def _key(values: Tensor) -> bytes:
    return (_sorted(values) + 0.0).tobytes()  # one zero


def _paired(values: Tensor, gradient: Tensor) -> np.ndarray:
    """The gradients in the order of the values, in their own order where values are equal."""
    numbers, slopes = values.double().flatten().numpy(), gradient.double().flatten().numpy()
    return slopes[np.lexsort((slopes, numbers))]


def _distance(ours: np.ndarray, theirs: np.ndarray) -> float:
    with np.errstate(invalid="ignore"):
        distance = np.abs(ours - theirs) / (1 + np.abs(ours))
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    return float(np.max(np.where(same, 0, distance), initial=0))
