"""One probed step: intercepted calls become records as soon as their error arrives."""

from __future__ import annotations

import contextlib
import fnmatch
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from attnprobe.capture import multihead, sdpa, softmax  # noqa: F401  (they register their handlers)
from attnprobe.capture.call import Call, Layout
from attnprobe.capture.hold import Held
from attnprobe.capture.modules import Watch
from attnprobe.capture.registry import AFTER, AROUND
from attnprobe.record import AttentionRecord

REPEATED = "backward ran more than once through the same forward pass"
FROZEN = "no gradient reaches it: its inputs and weights are frozen"
SILENT = "no backward reached it before the step ended"


@dataclass
class Seen:
    """An attention call of this step: where it was, and what became of it.

    ``result`` is what ``receive`` made of it, ``reason`` says why there is none (or none to trust).
    """

    module: str
    index: int
    rank: int
    result: Any = None
    reason: str = SILENT


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
        self.watch = Watch(model, self.mode, without_grad=forward_only)
        self.live = False
        self._hints = threading.local()

    def start(self) -> None:
        self.live = True
        self.watch.start()

    def stop(self) -> None:
        """Leave no hook, mode or tag behind; errors that arrive later are ignored."""
        self.live = False
        self.watch.stop()
        self.tags = WeakTensorKeyDictionary()

    @contextlib.contextmanager
    def hint(self, heads: int, self_attention: bool) -> Iterator[None]:
        """What the caller of the intercepted functions knows about the calls inside."""
        before = getattr(self._hints, "now", None)
        self._hints.now = (heads, self_attention)
        try:
            yield
        finally:
            self._hints.now = before

    @property
    def hinted_heads(self) -> int | None:
        now = getattr(self._hints, "now", None)
        return now[0] if now else None

    def observe(self, call: Call) -> None:
        """Take note of an attention call and wait for its error."""
        local = self.watch.local
        if not local.entries:
            return
        module = local.entries[-1].name
        index = local.calls.get(module, 0)
        local.calls[module] = index + 1
        if not any(fnmatch.fnmatchcase(module, pattern) for pattern in self.layers) or module in self.problems:
            return
        seen = Seen(module, index, self.watch.order[module])
        facts = {"self_attention": self._same_tokens(call), **call.layout.facts}
        layout = replace(call.layout, facts=facts, tokens=self.tokens)
        self.seen.append(seen)
        if self.forward_only:
            with torch.no_grad():
                tensors = {name: tensor.detach() for name, tensor in call.tensors.items()}
                self._deliver(seen, layout, tensors | {"output": call.output.detach()}, None)
        elif call.output.requires_grad:
            held, output = Held(call.tensors), Held({"output": call.output})
            call.output.register_hook(lambda error: self._arrived(seen, layout, held, output, error))
        else:
            seen.reason = FROZEN

    def _same_tokens(self, call: Call) -> bool | None:
        """Whether queries and keys are the same tokens; None where the module's inputs do not tell."""
        hint = getattr(self._hints, "now", None)
        if hint is not None:
            return bool(hint[1])
        if call.layout.facts.get("causal"):
            return True
        known = call.tensors.get("query", call.tensors.get("logits"))
        if known is not None and known.shape[-2] != call.tensors["value"].shape[-2]:
            return False
        inputs = self.watch.local.entries[-1].inputs
        if not inputs:
            return None
        (first, shape), *others = inputs
        return not any(other != first and size[-2:] == shape[-2:] for other, size in others)

    def _arrived(self, seen: Seen, layout: Layout, held: Held, output: Held, error: Tensor) -> None:
        if not self.live or seen.module in self.problems:
            return
        if seen.reason != SILENT:
            seen.result, seen.reason = None, REPEATED
            return
        with torch.no_grad(), self.guard(seen.module):
            tensors = held.release()
            # Changed in place after the attention call: the statistics compute it again.
            with contextlib.suppress(RuntimeError):
                tensors |= output.release()
            self._deliver(seen, layout, tensors, error.detach())

    def _deliver(self, seen: Seen, layout: Layout, tensors: dict[str, Tensor], error: Tensor | None) -> None:
        seen.result = self.receive(seen.module, layout.record(tensors, error))
        seen.reason = ""

    @contextlib.contextmanager
    def guard(self, module: str) -> Iterator[None]:
        """An exception of the probe itself switches the layer off; it never reaches the training loop."""
        try:
            yield
        except Exception as exception:
            if self.strict:
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
        if not session.live:
            return func(*args, **kwargs)
        if name in AROUND:
            return AROUND[name](session, func, args, kwargs)
        result = func(*args, **kwargs)
        if name in AFTER:
            entries = session.watch.local.entries
            with session.guard(entries[-1].name if entries else ""):
                AFTER[name](session, result, args, kwargs)
        return result
