"""One probed step: intercepted calls become records as soon as their error arrives."""

from __future__ import annotations

import contextlib
import fnmatch
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from attnprobe.capture import multihead, sdpa, softmax  # noqa: F401  (they register their handlers)
from attnprobe.capture.call import Call, Layout
from attnprobe.capture.eager import force_eager, release
from attnprobe.capture.hold import Held
from attnprobe.capture.modules import Position, Watch
from attnprobe.capture.registry import AFTER, AROUND
from attnprobe.record import AttentionRecord

REPEATED = "backward ran more than once through the same forward pass"
FROZEN = "no gradient reaches it: its inputs and weights are frozen"
SILENT = "no backward reached it before the step ended"
CHANGED = "its inputs or scores were changed in place before the backward pass reached it"
TRANSFORMED = "it ran inside a torch.func transform (grad, vmap ...), which has no backward pass to hook into"
UNRECORDED = (
    "no gradient was recorded: it runs under no_grad, or in a bare function under reentrant activation checkpointing"
)

# What torch raises through a save when it has computed enough again; it is no error of ours.
_ENOUGH: Any = getattr(torch.utils.checkpoint, "_StopRecomputationError", ())


@dataclass
class Seen:
    """An attention call of this step: where it was, and what became of it.

    ``result`` is what ``receive`` made of it, ``reason`` says why there is none (or none to trust).
    ``replay`` is set for a call that was computed again in a backward pass: which pass, which entry from outside.
    """

    module: str
    index: int
    rank: int
    replay: tuple[int, int] | None = None
    result: Any = None
    reason: str = SILENT


class _Hints(threading.local):
    now: tuple[int, bool] | None = None  # heads, whether queries and keys are the same tokens


_HINTS = _Hints()


class Session:
    """Watches a model between ``start`` and ``stop``; nothing is installed on the model.

    Args:
        model: its modules name the calls.
        receive: called with the record of a call in the backward pass, as soon as its error arrives.
        layers: glob patterns of module names.
        forward_only: receive calls at once, without errors, under ``no_grad`` too.
        strict: let exceptions of the probe itself through.
    """

    def __init__(
        self,
        model: nn.Module,
        receive: Callable[[str, AttentionRecord], Any],
        *,
        layers: Iterable[str] = ("*",),
        forward_only: bool = False,
        strict: bool = False,
    ) -> None:
        self.receive, self.layers = receive, tuple(layers)
        self.forward_only, self.strict = forward_only, strict
        self.seen: list[Seen] = []
        self.tokens: Tensor | None = None  # [B, T], True = real token
        self.problems: dict[str, Exception] = {}  # module -> what went wrong in the probe itself
        self.tags = WeakTensorKeyDictionary()
        self.mode = _Intercept(self)
        self.live = False
        # Saves inside of regions that non-reentrant checkpointing has yet to run again: it counts on as many then.
        self._owed: WeakSet[Held] = WeakSet()
        self.watch = Watch(model, self.mode, self._needed, without_grad=forward_only)
        self._off: frozenset[str] = frozenset()
        self._forward: set[str] = set()  # modules whose forward pass was seen

    def start(self) -> None:
        self.live = True
        # Within one step a layer is held in every pass or in none: checkpointing counts what is saved.
        self._off = frozenset(self.problems)
        force_eager(self)
        self.watch.start()

    def stop(self) -> None:
        """Leave no hook, mode or tag behind; errors that arrive later are ignored.

        Stopped between a forward and its backward pass, the hooks stay while ``_owed`` is not settled; an
        exception on its way out of the training loop settles it.
        """
        self.live = False
        release(self)
        if sys.exc_info()[0] is not None:
            self._owed.clear()
        if not self._needed():
            self.watch.stop()
            self.tags = WeakTensorKeyDictionary()

    def _needed(self) -> bool:
        return self.live or bool(self._owed)

    @contextlib.contextmanager
    def hint(self, heads: int, self_attention: bool) -> Iterator[None]:
        """What the caller of the intercepted functions knows about the calls inside; other sessions hear it too."""
        before, _HINTS.now = _HINTS.now, (heads, self_attention)
        try:
            yield
        finally:
            _HINTS.now = before

    @property
    def hinted_heads(self) -> int | None:
        return _HINTS.now[0] if _HINTS.now else None

    def observe(self, call: Call) -> None:
        """Take note of an attention call and wait for its error."""
        running = self.watch.running
        if not running.entries:
            return
        entry = running.entries[-1]
        module, index = entry.name, running.calls.get(entry.name, 0)
        if not any(fnmatch.fnmatchcase(module, pattern) for pattern in self.layers) or module in self._off:
            return
        seen = Seen(module, index, self.watch.order[module])
        transformed = torch._C._functorch.peek_interpreter_stack() is not None
        if transformed or not (self.forward_only or torch.is_grad_enabled()):
            seen.reason = TRANSFORMED if transformed else UNRECORDED
            self.seen.append(seen)
            return
        if not running.replayed:
            self._forward.add(module)
        elif module not in self._forward:
            return  # that was before ``start``: saving more than there would break the backward pass
        running.calls[module] = index + 1
        facts = {"self_attention": self._same_tokens(call), **call.layout.facts}
        layout = replace(call.layout, facts=facts, tokens=self.tokens)
        if not call.intact:
            seen.reason = CHANGED
        elif not (self.forward_only or call.output.requires_grad):
            seen.reason = FROZEN
        if running.task == -1 or seen.reason != SILENT:
            self.seen.append(seen)
        else:  # until its error arrives it may be one that we have seen, computed again
            seen.replay = (running.task, running.round)
        if seen.reason != SILENT:
            return
        if self.forward_only:
            with torch.no_grad():
                tensors = {name: tensor.detach() for name, tensor in call.tensors.items()}
                self._deliver(seen, layout, tensors | {"output": call.output.detach()}, None)
        else:
            bare = len(Position.here().checkpoints) > len(entry.position.checkpoints)
            held, output = (Held(tensors, apart=bare) for tensors in (call.tensors, {"output": call.output}))
            if entry.position.checkpoints and not bare and running.task == -1:
                self._owed.add(held)
            call.output.register_hook(lambda error: self._arrived(seen, layout, held, output, error))

    def _same_tokens(self, call: Call) -> bool | None:
        """Whether queries and keys are the same tokens; None where the module's inputs do not tell."""
        if _HINTS.now is not None:
            return _HINTS.now[1]
        if call.layout.facts.get("causal"):
            return True
        known = call.tensors.get("query", call.tensors.get("logits"))
        if known is not None and known.shape[-2] != call.tensors["value"].shape[-2]:
            return False
        inputs = self.watch.running.entries[-1].inputs
        if not inputs:
            return None
        (first, shape), *others = inputs
        alike = {other: size for other, size in others if other != first and size[:-1] == shape[:-1]}
        if list(alike.values()) == [shape]:
            return False  # a memory
        # As many tokens again: their projections, or features of theirs. Square and of another width: a mask.
        return None if any(size == shape or size[-2] != size[-1] for size in alike.values()) else True

    def _arrived(self, seen: Seen, layout: Layout, held: Held, output: Held, error: Tensor) -> None:
        self._owed.discard(held)
        if not self.live:
            self.stop()
            return
        if seen.module in self.problems:
            return
        if seen.replay is not None:
            self._append_replayed(seen)
        if seen.reason != SILENT:
            seen.result, seen.reason = None, REPEATED
            return
        with torch.no_grad(), self.guard(seen.module):
            tensors = held.release()
            if tensors is None:
                seen.reason = CHANGED
                return
            # An output that was changed in place the statistics compute again.
            self._deliver(seen, layout, tensors | (output.release() or {}), error.detach())

    def _append_replayed(self, seen: Seen) -> None:
        """Reentrant checkpointing computes a module's last call first: the earlier ones push it back."""
        assert seen.replay is not None
        task, turn = seen.replay
        for other in self.seen:
            if other.module == seen.module and other.replay and other.replay[0] == task and other.replay[1] != turn:
                other.index += 1
        self.seen.append(seen)

    def _deliver(self, seen: Seen, layout: Layout, tensors: dict[str, Tensor], error: Tensor | None) -> None:
        seen.result = self.receive(seen.module, layout.record(tensors, error))
        seen.reason = ""

    @contextlib.contextmanager
    def guard(self, module: str) -> Iterator[None]:
        """An exception of the probe itself switches the layer off; it never reaches the training loop."""
        try:
            yield
        except Exception as exception:
            if self.strict or isinstance(exception, _ENOUGH):
                raise
            self.problems.setdefault(module, exception)


class _Intercept(TorchFunctionMode):
    """Hands every torch function that has a handler to it."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        session, name = self.session, getattr(func, "__name__", "")
        if not (session.live or session.watch.running.replayed):
            return func(*args, **kwargs)
        if name in AROUND:
            return AROUND[name](session, func, args, kwargs)
        result = func(*args, **kwargs)
        if name in AFTER:
            entries = session.watch.running.entries
            with session.guard(entries[-1].name if entries else ""):
                AFTER[name](session, result, args, kwargs)
        return result
