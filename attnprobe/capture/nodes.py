"""Kernels in the autograd graph: a ``torch.autograd.Function`` hands nothing out, but it leaves a node.

What goes into the node and comes out of it looks like attention or does not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from attnprobe.capture.registry import KERNELS
from attnprobe.capture.unseen import BOUND, KERNEL

#: The sequence number of leaves is at least this.
_LEAF = 2**63


def sequence_number() -> int:
    """Of the next node of the autograd graph; 0 in a torch that does not tell."""
    number: int = getattr(torch._C._autograd, "_get_sequence_nr", int)()
    return number


class Graph:
    """The nodes of one forward pass, each of which is looked at once.

    Attributes:
        known: sequence numbers of nodes of which nothing is to be said any more.
    """

    def __init__(self) -> None:
        self.known: set[int] = set()
        self._behind: dict[int, list[Any]] = {}  # result of an inner module -> what is older than that module

    def kernels(self, result: Any, since: int) -> Iterator[str]:
        """What to say of the attention-like kernels behind what a module returned.

        Args:
            result: of the module; the modules inside of it have been asked for already.
            since: the sequence number at the module's start; older nodes are not the module's.
        """
        roots = [tensor.grad_fn for tensor in _tensors(result)]
        pending, visited, older = [*roots], set(), []
        while pending:
            node: Any = pending.pop()
            if node is None or node in visited:
                continue
            visited.add(node)
            number = node._sequence_nr()
            if number < since:
                older.append(node)
            elif number in self._behind:
                pending += self._behind[number]
            elif number < _LEAF:
                pending += [before for before, _ in node.next_functions]
                if number not in self.known and isinstance(node, BackwardCFunction) and _like_attention(node):
                    yield _reason(_function(node))
                self.known.add(number)
        numbers = {root._sequence_nr() for root in roots if root is not None}
        self._behind |= {number: older for number in numbers if since <= number < _LEAF}

    def end(self) -> None:
        """The outermost module has ended: let go of the nodes."""
        self._behind.clear()


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping | list | tuple):
        for part in result.values() if isinstance(result, Mapping) else result:
            yield from _tensors(part)


def kernel_around() -> str:
    """What to say where this is inside of an ``autograd.Function``'s forward pass, which has no gradients."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        # Only of such frames are the local variables looked at: Python keeps what it shows of them.
        if code.co_name == "forward" and code.co_argcount and code.co_varnames[0] != "self":
            context = frame.f_locals.get(code.co_varnames[0])
            if isinstance(context, BackwardCFunction) and not _runs_again(function := _function(context)):
                return _reason(function)
        frame = frame.f_back
    return ""


def _function(node: Any) -> Any:
    """The ``autograd.Function`` of a node, which is the context in its forward pass too."""
    return node._forward_cls


def _runs_again(function: Any) -> bool:
    """Whether this is activation checkpointing, torch's or that of others: what is inside will be seen."""
    return "Checkpoint" in function.__name__


def _reason(function: Any) -> str:
    return (BOUND if function in KERNELS else KERNEL).format(function.__name__)


def _like_attention(node: Any) -> bool:
    """Query, key and value go in, one context per query comes out; or the three of them packed in one tensor."""
    context, *others = (tuple(output.shape) for output in node._input_metadata)
    given = [_shape(before, output) for before, output in node.next_functions if before is not None]
    given = [shape for shape in given if len(shape) >= 3]
    if _runs_again(_function(node)) or context in others:
        return False  # hands several tensors through, as hooks on modules do
    if any(context in _unpacked(shape) for shape in given):
        return True
    if len(given) < 3:
        return False
    query, key, value = given[:3]
    alike = len(query) == len(key) == len(value) and query[:-1] == context[:-1] and key[:-1] == value[:-1]
    return alike and query[-1] == key[-1] and value[-1] == context[-1]


def _unpacked(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Of ``[B, T, 3, H, D]``, in any order, or ``[tokens, 3, H, D]``: the shape of each of the three."""
    axes = {4: [1], 5: range(4)}.get(len(shape), ())
    return [shape[:i] + shape[i + 1 :] for i in axes if shape[i] == 3]


def _shape(node: Any, output: int) -> tuple[int, ...]:
    leaf = getattr(node, "variable", None)
    return tuple(node._input_metadata[output].shape if leaf is None else leaf.shape)
