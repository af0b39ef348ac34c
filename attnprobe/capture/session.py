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
import torch.fx
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from attnprobe.capture import flash, flex, multihead, scores, sdpa, softmax  # noqa: F401  (they register handlers)
from attnprobe.capture.call import Call, Layout
from attnprobe.capture.eager import force_eager, release
from attnprobe.capture.evidence import folded_heads, misplaced_heads, same_tokens
from attnprobe.capture.hold import Held
from attnprobe.capture.kernel_lse import kept_lse
from attnprobe.capture.modules import Entry, Position, Watch
from attnprobe.capture.nodes import Graph, kernel_around
from attnprobe.capture.registry import AFTER, AROUND, After
from attnprobe.capture.unseen import GRAPHED, REPLICAS, SCRIPTED, UNMET, in_cuda_graph, scripted_attention
from attnprobe.record import AttentionRecord

REPEATED = "backward ran more than once through the same forward pass"
FROZEN = "no gradient reaches it: its inputs and weights are frozen (include_frozen=True measures its routing)"
SILENT = "no backward reached it before the step ended"
CHANGED = "its inputs or scores were changed in place before the backward pass reached it"
TRANSFORMED = "it ran inside a torch.func transform (grad, vmap ...), which has no backward pass to hook into"
UNRECORDED = "no gradient was recorded: it runs under no_grad"

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
        include_frozen: receive the calls that no gradient will reach, without errors.
        strict: let exceptions of the probe itself through.
    """

    def __init__(
        self,
        model: nn.Module,
        receive: Callable[[str, AttentionRecord], Any],
        *,
        layers: Iterable[str] = ("*",),
        forward_only: bool = False,
        include_frozen: bool = False,
        strict: bool = False,
    ) -> None:
        self.receive, self.layers = receive, tuple(layers)
        self.forward_only, self.include_frozen, self.strict = forward_only, include_frozen, strict
        self.seen: list[Seen] = []
        self.tokens: Tensor | None = None  # [B, T], True = real token
        self.problems: dict[str, Exception] = {}  # module -> what went wrong in the probe itself
        self.tags = WeakTensorKeyDictionary()
        self.mode = Intercept(self)
        self._softmaxes, self.unmet = 0, dict[int, str]()  # modules of softmaxes over scores, by their number
        self.live = False
        self.trouble = ""  # why what was seen is known not to be all there is
        # Saves inside of regions that non-reentrant checkpointing has yet to run again: it counts on as many then.
        self._owed: WeakSet[Held] = WeakSet()
        self.watch = Watch(
            model,
            self.mode,
            self._needed,
            opaque=self._opaque,
            left=self._left,
            told=self._kernel_ran,
            without_grad=forward_only,
        )
        self.graph = Graph()
        self._off: frozenset[str] = frozenset()
        self._forward: set[str] = set()  # modules whose forward pass was seen

    def start(self) -> None:
        self.live = True
        # Within one step a layer is held in every pass or in none: checkpointing counts what is saved.
        self._off = frozenset(self.problems)
        force_eager(self)
        flash.register()
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
            self.graph = Graph()

    def pause(self) -> None:
        """Capture nothing until ``resume``; what was captured stays."""
        self.watch.stop()

    def resume(self) -> None:
        self.watch.start()

    def examine(self, node: Any) -> None:
        """Told at the end of a step: ``node`` of the autograd graph is where its backward pass began."""

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

    def _watched(self, module: str) -> bool:
        return module not in self._off and any(fnmatch.fnmatchcase(module, pattern) for pattern in self.layers)

    def refuse(self, reason: str, module: str = "") -> None:
        """Take note of attention that cannot be captured, in ``module`` or in the one that runs; once is enough."""
        entries = self.watch.running.entries
        module = module or (entries[-1].name if entries else "")
        known = any(seen.module == module and seen.reason == reason for seen in self.seen)
        if module and self._watched(module) and not known:
            self.seen.append(Seen(module, 0, self.watch.rank(module), reason=reason))

    def softmax(self) -> int:
        """Take note of a softmax over scores, whose meeting with the values is yet to come; its number."""
        self._softmaxes += 1
        if self.watch.running.task == -1:
            self.unmet[self._softmaxes] = self.watch.running.entries[-1].name
        return self._softmaxes

    def observe(self, call: Call) -> None:
        """Take note of an attention call and wait for its error."""
        running = self.watch.running
        if not running.entries or not self._watched(running.entries[-1].name):
            return
        entry = running.entries[-1]
        module, index = entry.name, running.calls.get(entry.name, 0)
        if call.output.grad_fn is not None:
            self.graph.known.add(call.output.grad_fn._sequence_nr())  # this one is looked into
        if (reason := self._out_of_reach()) is not None:
            if reason:
                self.refuse(reason)
            return
        if not running.replayed:
            self._forward.add(module)
        elif module not in self._forward:
            return  # that was before ``start``: saving more than there would break the backward pass
        running.calls[module] = index + 1
        seen = Seen(module, index, self.watch.rank(module))
        frozen = not (self.forward_only or call.output.requires_grad)
        if not call.intact:
            seen.reason = CHANGED
        elif frozen and not self.include_frozen:
            seen.reason = FROZEN
        if running.task == -1 or seen.reason != SILENT:
            self.seen.append(seen)
        else:  # until its error arrives it may be one that we have seen, computed again
            seen.replay = (running.task, running.round)
        if seen.reason != SILENT:
            return
        layout = self._layout(call, entry)
        if not frozen and not self.forward_only:
            self._await(seen, call, layout, entry)
        elif not running.replayed:
            with torch.no_grad():
                tensors = {name: tensor.detach() for name, tensor in call.tensors.items()}
                self._deliver(seen, layout, tensors | {"output": call.output.detach()}, None)

    def _out_of_reach(self) -> str | None:
        """Why a call here cannot be captured; empty if it will be when it runs again, None if it can."""
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return TRANSFORMED
        if in_cuda_graph():
            return GRAPHED
        if self.forward_only or torch.is_grad_enabled():
            return None
        return "" if self.watch.resume() else kernel_around() or UNRECORDED

    def _layout(self, call: Call, entry: Entry) -> Layout:
        """With what is known from outside of the call."""
        hinted = _HINTS.now
        tokens = hinted[1] if hinted else same_tokens(call, entry)
        return replace(
            call.layout,
            facts={"self_attention": tokens, **call.layout.facts},
            tokens=self.tokens,
            heads=call.layout.heads or folded_heads(call, entry),
            swapped=misplaced_heads(call, entry),
        )

    def _await(self, seen: Seen, call: Call, layout: Layout, entry: Entry) -> None:
        """Hold the tensors of a call until its error arrives."""
        bare = len(Position.here().checkpoints) > len(entry.position.checkpoints)
        held, output = (Held(tensors, apart=bare) for tensors in (call.tensors, {"output": call.output}))
        if entry.position.checkpoints and not bare and self.watch.running.task == -1:
            self._owed.add(held)
        through: list[Tensor] = []  # the gradient that comes back through the log-sum-exp
        if call.lse is not None and call.lse.requires_grad:
            unit = call.lse_unit  # not the call, whose tensors must not be held here
            call.lse.register_hook(lambda error: None if error is None else through.append(error.detach() / unit))
        kept = call.leaves_lse
        call.output.register_hook(lambda error: self._arrived(seen, layout, held, output, error, through, kept))

    def _opaque(self, name: str, module: nn.Module) -> None:
        """A module that runs where nothing can be seen."""
        if getattr(module, "_is_replica", False):
            self.refuse(REPLICAS, name)
        elif scripted_attention(module):
            self.refuse(SCRIPTED, name)

    def _left(self, entry: Entry, result: Any) -> None:
        """A module has ended: did it run attention that nothing can look into, or that was lost on its way?"""
        if not self.watch.running.entries:
            # Beside a call that was captured they are a picture of it.
            unmet, self.unmet = {*self.unmet.values()} - self.watch.running.calls.keys(), {}
            for module in sorted(unmet) if result is not None else ():  # an exception has no result
                self.refuse(UNMET, module)
        if self.live and torch.is_grad_enabled() and not self.watch.running.replayed:
            with self.guard(entry.name), torch._C.DisableTorchFunction():
                for reason in self.graph.kernels(result, entry.number):
                    self.refuse(reason, entry.name)
        if not self.watch.running.entries:
            self.graph.end()

    @property
    def listens(self) -> bool:
        """Whether anything is to be made of the calls that are seen."""
        return self.live or self.watch.running.replayed

    def _kernel_ran(
        self, handler: After, inside: Iterable[int], result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """A registered kernel has run, which made the nodes ``inside`` of the autograd graph."""
        self.graph.known.update(inside)
        if self.listens:
            with self.guarded():
                handler(self, result, args, kwargs)

    def _arrived(
        self, seen: Seen, layout: Layout, held: Held, output: Held, error: Tensor, through: list[Tensor], kept: bool
    ) -> None:
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
            if through:
                tensors["lse_error"] = through.pop()[..., None]
            if kept and (lse := kept_lse(error)) is not None:
                tensors["logsumexp"] = lse[..., None]
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

    def guarded(self) -> contextlib.AbstractContextManager[None]:
        """``guard`` for the module that runs."""
        entries = self.watch.running.entries
        return self.guard(entries[-1].name if entries else "")

    @contextlib.contextmanager
    def guard(self, module: str) -> Iterator[None]:
        """An exception of the probe itself switches the layer off; it never reaches the training loop."""
        try:
            yield
        except Exception as exception:
            if self.strict or isinstance(exception, _ENOUGH):
                raise
            self.problems.setdefault(module, forgetful(exception))


def forgetful(exception: Exception) -> Exception:
    """The exception without the frames, and with them the tensors, that it came through."""
    exception.__context__ = exception.__cause__ = None
    return exception.with_traceback(None)


def _traced(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call is of ``torch.fx``, which computes nothing."""
    return any(isinstance(x, torch.fx.Proxy) for x in (*args, *kwargs.values()))


class Intercept(TorchFunctionMode):
    """Hands every torch function that has a handler to it."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        session, name = self.session, getattr(func, "__name__", "")
        if name == "__get__":  # of a property, such as tensor.mT
            name = func.__self__.__name__
        if not session.listens or session.watch.running.aside or _traced(args, kwargs):
            return func(*args, **kwargs)
        if name in AROUND:
            return AROUND[name](session, func, args, kwargs)
        result = func(*args, **kwargs)
        if name in AFTER:
            with session.guarded():
                AFTER[name](session, result, args, kwargs)
        return result
