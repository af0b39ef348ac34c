"""Which watched module is running, and the interception mode around the outermost one.

Global module hooks exist only while a step is probed. They push the mode when a watched module is
entered from outside and take it off the stack at its exit, so that it lies strictly within whatever
contexts the training loop uses, and so that activation checkpointing, which re-enters modules during
backward, is watched by itself.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode
from torch.utils.checkpoint import CheckpointFunction

from attnprobe.capture import kernels
from attnprobe.capture.nodes import sequence_number
from attnprobe.capture.registry import After

_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_FUSED_AT_INFERENCE = (nn.MultiheadAttention, nn.TransformerEncoder, nn.TransformerEncoderLayer)
_HEADS = ("num_heads", "n_heads", "n_head", "num_attention_heads", "heads", "nhead")
_CHECKPOINT = torch.utils.checkpoint.__file__


def module_names(model: nn.Module) -> dict[int, str]:
    """``id(module)`` -> dotted name without the prefixes that wrappers add; the root goes by its class name."""
    names: dict[int, str] = {}
    for name, module in model.named_modules():
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        names[id(module)] = ".".join(parts) or type(model).__name__
    return names


@dataclass(frozen=True)
class Position:
    """Where in the Python stack something runs; nothing of the frames is kept."""

    depth: int
    checkpoints: tuple[str, ...]  # functions of torch's activation checkpointing on the way, innermost first

    @classmethod
    def here(cls) -> Position:
        frame, depth, found = sys._getframe(1), 0, []
        while frame is not None:
            depth += 1
            if frame.f_code.co_filename == _CHECKPOINT:
                found.append(frame.f_code.co_name)
            frame = frame.f_back  # type: ignore[assignment]
        return cls(depth, tuple(found))


@dataclass
class Entry:
    """A watched module that is running; ``toggled`` says whether its entry switched the mode on or off.

    ``inputs`` are identity and shape of the tensors that may be sequences of tokens, ``heads`` is what the module
    says of itself, ``number`` is autograd's sequence number at the start.
    """

    module: int
    name: str
    inputs: tuple[tuple[int, torch.Size], ...]
    position: Position
    toggled: bool
    was_on: bool
    heads: int | None
    number: int


@dataclass
class Running:
    """The running watched modules, outermost first.

    Attributes:
        on: whether the mode is on the stack.
        aside: whether nothing is to be seen all the same: a registered kernel runs.
        calls: attention calls per module since the outermost entry.
        round: number of outermost entries so far.
        task: the backward pass inside of which the outermost module runs again, -1 in a forward pass.
    """

    entries: list[Entry] = field(default_factory=list)
    on: bool = False
    aside: bool = False
    calls: dict[str, int] = field(default_factory=dict)
    round: int = 0
    task: int = -1

    @property
    def replayed(self) -> bool:
        """Whether non-reentrant checkpointing runs the outermost module again, to get at what it saved."""
        if self.task == -1 or not self.entries:
            return False
        return "recompute_fn" in self.entries[0].position.checkpoints


class _Local(threading.local):
    def __init__(self) -> None:
        self.running = Running()


class Watch:
    """Registers the hooks, keeps the stack and switches the mode, as long as it is ``needed``."""

    def __init__(
        self,
        model: nn.Module,
        mode: TorchFunctionMode,
        needed: Callable[[], bool],
        *,
        opaque: Callable[[str, nn.Module], None],
        left: Callable[[Entry, Any], None],
        told: Callable[[After, Iterable[int], Any, tuple[Any, ...], dict[str, Any]], None],
        without_grad: bool = False,
    ) -> None:
        self.names = module_names(model)
        self.root = next(iter(self.names.values()))
        self.mode, self.needed, self.opaque, self.left, self.told = mode, needed, opaque, left, told
        self.without_grad = without_grad
        self._order: dict[str, int] = {}
        self._local = _Local()
        self._handles: list[Any] = []

    def rank(self, name: str) -> int:
        """Which module in order of first sight it is."""
        return self._order.setdefault(name, len(self._order))

    @property
    def running(self) -> Running:
        """What runs in this thread."""
        return self._local.running

    def start(self) -> None:
        kernels.install(self)
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._exit, always_call=True),
        ]

    def stop(self) -> None:
        """Remove the hooks, and the mode if an interrupt left it behind."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        kernels.remove(self)
        _withdraw(self.mode)
        self._local.running = Running()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Around a registered kernel, of whose inside nothing is to be seen, and what is made of its call."""
        running = self.running
        running.aside = True
        try:
            yield
        finally:
            running.aside = False

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Around a backward pass dispatched through the mode, which torch has switched off meanwhile."""
        before, self._local.running = self.running, Running()
        try:
            yield
        finally:
            self._local.running = before

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.needed():
            self.stop()
            return
        name = self.names.get(id(module))
        if name is None or isinstance(module, torch.jit.ScriptModule):
            self.opaque(name or self.root, module)
        if name is None:
            return
        running, position = self.running, Position.here()
        # After a KeyboardInterrupt torch calls no exit hook: what is not below us in the stack has ended.
        while running.entries and running.entries[-1].position.depth >= position.depth:
            self._leave(running.entries.pop())
        if not running.entries:
            running.calls, running.task = {}, torch._C._current_graph_task_id()
            running.round += 1
        if torch.is_grad_enabled() or self.without_grad or position.checkpoints:  # not in a validation pass
            self.rank(name)
        with torch._C.DisableTorchFunction():  # looking at a tensor is a call as well, when the mode is on
            inputs = _inputs(args)
            wanted = self.without_grad or (torch.is_grad_enabled() and not _runs_fused(module, inputs))
            wanted = wanted and torch._C._get_tracing_state() is None  # a trace would record what we do
            floating = [(id(x), x.shape) for x in inputs if x.is_floating_point()]
        sequences = tuple(x for x in floating if len(x[1]) in (2, 3) or len(floating) == 1)
        heads = next((n for n in (getattr(module, name, None) for name in _HEADS) if isinstance(n, int)), None)
        number = sequence_number()
        self._push(Entry(id(module), name, sequences, position, wanted != running.on, running.on, heads, number))

    def _exit(self, module: nn.Module, args: Any, result: Any) -> None:
        entries = self.running.entries
        if not any(entry.module == id(module) for entry in entries):
            return
        while entries:
            entry = entries.pop()
            self._leave(entry)
            if entry.module == id(module):
                self.left(entry, result)
                break

    def _push(self, entry: Entry) -> None:
        self.running.entries.append(entry)
        if entry.toggled:
            self._switch(not entry.was_on)

    def resume(self) -> bool:
        """Whether the bare function that runs under reentrant checkpointing will be watched when it runs again.

        It runs without gradients now and, in the backward pass, outside of any module.
        """
        entry, frame = self.running.entries[-1], sys._getframe(1)
        while frame is not None and frame.f_code is not CheckpointFunction.forward.__code__:
            frame = frame.f_back  # type: ignore[assignment]
        if frame is None or entry.position.depth >= _depth(frame):
            return False
        context = frame.f_locals["ctx"]
        if not isinstance(context.run_function, _Resumed):
            context.run_function = _Resumed(self, entry, context.run_function)
        return True

    def rerun(self, entry: Entry, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """``function(*args)`` as a part of the module of ``entry``."""
        running = self.running
        if not self.needed() or running.on:
            return function(*args)
        if not running.entries:
            running.calls, running.task = {}, torch._C._current_graph_task_id()
            running.round += 1
        self._push(replace(entry, position=Position.here(), toggled=True, was_on=False))
        depth = len(running.entries)
        try:
            return function(*args)
        finally:
            while len(running.entries) >= depth:
                self._leave(running.entries.pop())

    def _leave(self, entry: Entry) -> None:
        if entry.toggled:
            self._switch(entry.was_on)

    def _switch(self, on: bool) -> None:
        if on:
            _push_mode(self.mode)
        else:
            _withdraw(self.mode)
        self.running.on = on


@dataclass(frozen=True)
class _Resumed:
    """A checkpointed function that takes its watcher along."""

    watch: Watch
    entry: Entry
    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.watch.rerun(self.entry, self.function, args)


def _depth(frame: Any) -> int:
    depth = 0
    while frame is not None:
        depth, frame = depth + 1, frame.f_back
    return depth


def _withdraw(mode: TorchFunctionMode) -> None:
    """Take a mode off the stack, wherever it is: two probes leave a module in the order in which they entered it."""
    others = [_pop_mode() for _ in range(torch._C._len_torch_function_stack())]
    for other in reversed(others):
        if other is not mode:
            _push_mode(other)


def _runs_fused(module: nn.Module, inputs: list[Tensor]) -> bool:
    """Whether torch would run its fused inference kernel here, which an active mode would switch off."""
    if module.training or not isinstance(module, _FUSED_AT_INFERENCE):
        return False
    return not any(tensor.requires_grad for tensor in (*module.parameters(), *inputs))


def _inputs(args: tuple[Any, ...]) -> list[Tensor]:
    """The tensors that a module was called with; nested ones, which the fused encoder passes on, have no shape."""
    # The hook gets positional arguments only; the keyword arguments are in the frame that calls it.
    keywords = sys._getframe(2).f_locals.get("kwargs")
    given = (*args, *keywords.values()) if isinstance(keywords, dict) else args
    return [x for x in given if isinstance(x, Tensor) and not x.is_nested]
