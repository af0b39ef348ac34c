"""One probed step of a compiled model, without leaving the compiled code: its graphs hand out what they compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from attnprobe.capture.call import Layout
from attnprobe.capture.session import FROZEN, REPEATED, Seen, Session
from attnprobe.capture.tap_names import Names, reached_by, survey
from attnprobe.capture.tap_pass import LISTENERS, SEPARATOR
from attnprobe.record import AttentionRecord

SILENT = (
    "no compiled attention showed itself: the model was compiled before the probe was made, by another backend than "
    "inductor or with CUDA graphs, it is not compiled, or no backward pass ran"
)
OUTSIDE = "some attention runs outside of the compiled code"
OLDER = "a part of the model was compiled before the probe was made, or by another backend than inductor"
WRITTEN = "{module}: attention is compiled from single operations instead of an SDPA kernel"
FOLDED = "{module}: a compiled SDPA kernel got heads and sequences in one dimension, and cannot tell which is which"
UNREACHED = "{module}: compiled code hands out nothing of attention that no gradient reaches, as include_frozen asks"
UNNAMED = "cannot tell which module some compiled attention belongs to"
FOREIGN = "what was compiled is more than the watched model: give the probe the module that contains all of it"


class TapSession(Session):
    """A session that listens to the operators in compiled graphs; nothing else differs from an unprobed step.

    Attributes:
        trouble: why what was seen is not all there is, empty if it is. Known after ``stop``.
    """

    def __init__(
        self,
        model: nn.Module,
        receive: Callable[[str, AttentionRecord], Any],
        *,
        layers: Iterable[str] = ("*",),
        include_frozen: bool = False,
        strict: bool = False,
    ) -> None:
        super().__init__(model, receive, layers=layers, include_frozen=include_frozen, strict=strict)
        self.names = Names(model)
        self._calls: dict[tuple[int, str, int], Seen] = {}  # by compiled node, site and place in its graph
        self._passes: dict[int, Any] = {}  # compiled node -> what is the same for all nodes of one forward pass
        self._told: set[int] = set()  # compiled nodes whose backward pass has been here
        self._heard = False  # whether one of them was the model's

    def start(self) -> None:
        self.live = True
        self._off = frozenset(self.problems)
        self.resume()

    def stop(self) -> None:
        """Stop listening; put the calls, which came in the order of the backward pass, into that of the forward."""
        if not self.live:
            return
        self.live = False
        self.pause()
        if not self._heard:
            self.trouble = SILENT
        if self._passes.keys() - self._told:
            self._complain(OLDER)
        counts: dict[Any, int] = {}
        for rank, (key, seen) in enumerate(sorted(self._calls.items(), key=lambda item: (item[0][0], item[0][2]))):
            forward = (self._passes[key[0]], seen.module)
            seen.rank, seen.index = rank, counts.get(forward, 0)
            counts[forward] = seen.index + 1

    def pause(self) -> None:
        if self._hear in LISTENERS:
            LISTENERS.remove(self._hear)

    def resume(self) -> None:
        LISTENERS.append(self._hear)

    def examine(self, node: Any) -> None:
        """Look for attention that shows itself nowhere, from a node of the autograd graph on."""
        if node is None:
            return
        compiled, attention = survey(node)
        if attention:
            self._complain(OUTSIDE)
        token = object()
        for number in compiled:
            self._passes.setdefault(number, token)

    def _hear(self, operator: str, *arguments: Any) -> None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        with torch.no_grad(), self.guard(""):
            node = torch._C._current_autograd_node()
            if not hasattr(node, "next_functions"):
                self._complain(UNNAMED)
                return
            number, reached = node._sequence_nr(), reached_by(node)
            if operator == "region":
                self._told.add(number)
            if reached and not reached & self.names.known:
                return  # another model's
            self._heard = True
            if reached - self.names.known:
                self._complain(FOREIGN)
                return
            if number not in self._passes:
                self.examine(node)
                self._passes.setdefault(number, number)
            if operator == "region":
                self._untapped(number, reached, *arguments[1:])
            else:
                self._tapped(number, reached, *arguments)
        if "" in self.problems:
            self._complain("an error in the probe")

    def _tapped(self, number: int, reached: set[int], *arguments: Any) -> None:
        *tensors, mask, dropout, causal, scale, same_tokens, site, order = arguments
        error, query, key, value, output = tensors
        seen = self._see(number, reached, site, order)
        if seen is None:
            return
        facts = {
            "scale": query.shape[-1] ** -0.5 if scale is None else scale,
            "causal": causal,
            "dropout": dropout,
            "self_attention": True if causal else False if query.shape[-2] != key.shape[-2] else same_tokens,
        }
        given = {"query": query, "key": key, "value": value, "output": output}
        if mask is not None:
            given["mask"] = mask
        with self.guard(seen.module):
            self._deliver(seen, Layout(facts, query.ndim, tokens=self.tokens), given, error)

    def _untapped(self, number: int, reached: set[int], frozen: str, written: str, folded: str) -> None:
        for order, site in enumerate(filter(None, frozen.split(SEPARATOR))):
            seen = self._see(number, reached, site, order - len(frozen))
            if seen is not None:
                seen.reason = FROZEN
                if self.include_frozen:
                    self._complain(UNREACHED.format(module=seen.module))
        for sites, trouble in ((written, WRITTEN), (folded, FOLDED)):
            for site in filter(None, sites.split(SEPARATOR)):
                found = self.names.resolve(site, reached)
                if found is None or self._watched(found[0]):
                    self._complain(trouble.format(module=found[0] if found else site))

    def _see(self, number: int, reached: set[int], site: str, order: int) -> Seen | None:
        """The call, None if it is not to be measured."""
        found = self.names.resolve(site, reached)
        if found is None:
            self._complain(UNNAMED)
            return None
        module, whole = found
        if whole:  # a second node is a second forward pass
            self._passes[number] = number
        if not self._watched(module):
            return None
        before = self._calls.get((number, site, order))
        if before is not None:
            before.result, before.reason = None, REPEATED
            return None
        seen = self._calls[number, site, order] = Seen(module, 0, 0)
        self.seen.append(seen)
        return seen

    def _complain(self, trouble: str) -> None:
        self.trouble = self.trouble or trouble
