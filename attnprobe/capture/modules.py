"""Which watched module is running, and the interception mode around the outermost one.

Global module hooks exist only while a step is probed. They push the mode when a watched module is
entered from outside and pop it at its exit, so that it is strictly nested with whatever contexts the
training loop uses, and so that activation checkpointing, which re-enters modules during backward,
is watched by itself.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_FUSED_AT_INFERENCE = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)


def module_names(model: nn.Module) -> dict[int, str]:
    """``id(module)`` -> dotted name without the prefixes that wrappers add; the root goes by its class name."""
    names: dict[int, str] = {}
    for name, module in model.named_modules():
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        names[id(module)] = ".".join(parts) or type(model).__name__
    return names


@dataclass
class Entry:
    """A watched module that is running; ``toggled`` says whether its entry switched the mode on or off."""

    module: int
    name: str
    inputs: tuple[tuple[int, torch.Size], ...]
    toggled: bool
    was_on: bool


class ModuleStack(threading.local):
    """The running watched modules of this thread, outermost first."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.on = False
        self.calls: dict[str, int] = {}  # attention calls per module since the outermost entry


class Watch:
    """Registers the hooks, keeps the stack and switches the mode."""

    def __init__(self, model: nn.Module, mode: TorchFunctionMode, *, without_grad: bool = False) -> None:
        self.names = module_names(model)
        self.mode = mode
        self.without_grad = without_grad
        self.order: dict[str, int] = {}  # module name -> rank of its first call
        self.local = ModuleStack()
        self._handles: list[Any] = []

    def start(self) -> None:
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._exit, always_call=True),
        ]

    def stop(self) -> None:
        """Remove the hooks, and the mode if an interrupt left it behind."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for entry in reversed(self.local.entries):
            if entry.toggled and not entry.was_on:
                self._switch(False)
        self.local.entries.clear()
        self.local.on = False

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Around a backward pass dispatched through the mode, which torch has switched off meanwhile."""
        on, self.local.on = self.local.on, False
        try:
            yield
        finally:
            self.local.on = on

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        name = self.names.get(id(module))
        if name is None:
            return
        local = self.local
        self.order.setdefault(name, len(self.order))
        if not local.entries:
            local.calls = {}
        was_on = local.on
        wanted = (torch.is_grad_enabled() or self.without_grad) and not _runs_fused(module, args)
        local.entries.append(Entry(id(module), name, _sequences(args), wanted != was_on, was_on))
        if wanted != was_on:
            self._switch(wanted)

    def _exit(self, module: nn.Module, args: Any, result: Any) -> None:
        entries = self.local.entries
        if not any(entry.module == id(module) for entry in entries):
            return
        while entries:
            entry = entries.pop()
            if entry.toggled:
                self._switch(entry.was_on)
            if entry.module == id(module):
                break

    def _switch(self, on: bool) -> None:
        if on:
            self.mode.__enter__()
        elif _top_mode() is self.mode:
            self.mode.__exit__(None, None, None)
        self.local.on = on


def _top_mode() -> Any:
    size = torch._C._len_torch_function_stack()
    return torch._C._get_function_stack_at(size - 1) if size else None


def _runs_fused(module: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether torch would run its fused inference kernel here, which an active mode would switch off."""
    if module.training or not isinstance(module, _FUSED_AT_INFERENCE):
        return False
    tensors = [*module.parameters(), *(arg for arg in args if isinstance(arg, Tensor))]
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


def _sequences(args: tuple[Any, ...]) -> tuple[tuple[int, torch.Size], ...]:
    """Identity and shape of the floating-point sequences ``[B, T, d]`` that a module was called with."""
    # The hook gets positional arguments only; the keyword arguments are in the frame that calls it.
    keywords = sys._getframe(2).f_locals.get("kwargs") or {}
    inputs = (*args, *keywords.values()) if isinstance(keywords, dict) else args
    found = [x for x in inputs if isinstance(x, Tensor) and x.is_floating_point() and x.ndim in (2, 3)]
    return tuple((id(x), x.shape) for x in found)


