"""What a probe must leave as it was: the model, its classes, torch's functions and torch's global state."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from tests.global_state import global_state

_HOOKS = tuple(name for name in vars(nn.Module()) if "hooks" in name)
_OWNERS = (torch, torch.Tensor, torch.nn.functional, torch.autograd, torch.utils.checkpoint)


def whole_state(models: Iterable[nn.Module]) -> dict[str, Any]:
    """Everything that is compared before and after a probe, by a name for the report."""
    state: dict[str, Any] = {f"torch's {name}": value for name, value in global_state().items()}
    state["the compiler's stance"] = stance()
    for owner in _OWNERS:
        state |= {f"{owner.__name__}.{name}": id(value) for name, value in vars(owner).items() if callable(value)}
    state |= _transformers()
    classes: set[type] = set()
    for number, model in enumerate(models):
        for name, module in model.named_modules():
            where = f"model {number}, {name or 'root'}"
            state[f"{where}: class"] = type(module)
            state[f"{where}: attributes"] = sorted(vars(module))
            state[f"{where}: hooks"] = [[*getattr(module, table)] for table in _HOOKS if hasattr(module, table)]
            classes.update(type(module).__mro__)
    for owner in classes:
        functions = {attribute: id(value) for attribute, value in vars(owner).items() if callable(value)}
        state[f"{owner.__module__}.{owner.__qualname__}: attributes"] = functions
    return state


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What is not the same any more; what torch loaded lazily meanwhile is not a difference."""
    return [name for name, value in before.items() if after.get(name) != value]


def stance() -> Any:
    """Of torch.compile; None in a process that never compiled."""
    dynamo = sys.modules.get("torch._dynamo.eval_frame")
    return None if dynamo is None else dynamo._stance.stance


def _transformers() -> dict[str, Any]:
    """The attention functions that transformers knows."""
    library = sys.modules.get("transformers.modeling_utils")
    if library is None:
        return {}
    functions = library.ALL_ATTENTION_FUNCTIONS
    return {f"transformers' attention {name!r}": id(functions[name]) for name in functions} | {
        "transformers' attention functions": sorted(functions)
    }
