"""Counts what is active in a process: modes, hooks and replaced functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

Names = dict[tuple[object, str], object]


def functions() -> Names:
    """What the functions and methods are that somebody could replace."""
    owners: list[ModuleType | type] = [torch, F, torch.autograd, nn.Module, nn.MultiheadAttention, Tensor]
    return {(owner, name): value for owner in owners for name, value in vars(owner).items() if callable(value)}


class Counter(TorchFunctionMode):
    """Looks, at every torch function that a step calls, at what else is active; keeps the largest count of each kind.

    Args:
        model: whose hooks count.
        before: the functions before there was a probe.
    """

    def __init__(self, model: nn.Module, before: Names) -> None:
        super().__init__()
        self.model, self.before = model, before
        self.most: dict[str, int] = {}
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        self.calls += 1
        self.look()
        result = func(*args, **(kwargs or {}))
        hooked = sum(bool(tensor._backward_hooks) for tensor in _tensors((args, kwargs, result)))
        self._keep("hooks on tensors", hooked)
        return result

    def look(self) -> None:
        """Count once more."""
        functions_modes = [mode for mode in _get_current_function_mode_stack() if mode is not self]
        self._keep("torch function modes", len(functions_modes))
        self._keep("torch dispatch modes", len(_get_current_dispatch_mode_stack()))
        self._keep("hooks on modules", sum(map(len, _tables(self.model))))
        self._keep("global hooks", sum(map(len, _global_tables())))
        hooked = sum(bool(tensor._backward_hooks) for tensor in self.model.parameters())
        self._keep("hooks on parameters", hooked + sum(map(_accumulates, self.model.parameters())))
        saved = torch._C._autograd._top_saved_tensors_default_hooks(True)
        self._keep("saved-tensor hooks", int(saved is not None))

    def replaced(self) -> int:
        """Functions that are not those from before."""
        now = functions()
        return sum(now.get(name) is not value for name, value in self.before.items())

    def _keep(self, kind: str, count: int) -> None:
        self.most[kind] = max(count, self.most.get(kind, 0))


def _tables(model: nn.Module) -> Iterator[Mapping[int, object]]:
    for module in model.modules():
        yield from (table for name, table in vars(module).items() if name.endswith("_hooks") and table)


def _global_tables() -> Iterator[Mapping[int, object]]:
    for name, table in vars(global_hooks).items():
        if name.startswith("_global_") and name.endswith("_hooks"):
            yield table


def _accumulates(parameter: Tensor) -> bool:
    return bool(getattr(parameter, "_post_accumulate_grad_hooks", None))


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        yield from _tensors([*tree.values()])
    elif isinstance(tree, tuple | list):
        for branch in tree:
            yield from _tensors(branch)
