"""Attention that cannot be captured: how to recognise it, and what to say.

What runs in TorchScript or in a kernel of its own hands nothing out. A scripted module still has its graph; a
``torch.autograd.Function`` leaves a node, whose inputs and outputs look like attention or do not.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.utils.checkpoint import CheckpointFunction

from attnprobe.capture.kernels import CALLERS

NESTED = "its inputs are nested tensors, which have no common length"
SCRIPTED = "it is TorchScript, which runs outside of Python: probe the model before it is scripted or traced"
REPLICAS = "it runs as replicas of nn.DataParallel, copies in threads of their own: use DistributedDataParallel"
GRAPHED = "it is being captured into a CUDA graph, whose replays run no Python: probe it uncaptured"
KERNEL = (
    "it runs the autograd.Function {}, which nothing can look into: if that is softmax attention, "
    "attnprobe.register_attention tells what it computes"
)
BOUND = (
    "it runs the registered autograd.Function {0} through a name for {0}.apply that was bound before the probe came: "
    "register that function instead"
)
#: The sequence number of leaves is at least this.
_LEAF = 2**63


def scripted_attention(module: nn.Module) -> bool:
    """Whether a module is TorchScript with attention in it: SDPA, or a softmax that meets values."""
    if not isinstance(module, torch.jit.ScriptModule):
        return False
    graph: Any = module.inlined_graph
    found = [use for kind in _SOFTMAX for node in graph.findAllNodes(kind) for use in node.output().uses()]
    reached = {use.user.kind() for use in found}
    while found and reached.isdisjoint(_PRODUCTS):  # what comes next: dropout, casts, reshapes
        found = [use for before in found for output in before.user.outputs() for use in output.uses()][:_FEW]
        reached = {use.user.kind() for use in found}
    return bool(reached.intersection(_PRODUCTS) or graph.findNode("aten::scaled_dot_product_attention"))


#: So many nodes are followed at once; a graph has no cycles.
_FEW = 100
_SOFTMAX = ("aten::softmax", "aten::_softmax")
_PRODUCTS = ("aten::matmul", "aten::bmm", "aten::einsum", "aten::baddbmm")


def sequence_number() -> int:
    """Of the next node of the autograd graph; 0 in a torch that does not tell."""
    number: int = getattr(torch._C._autograd, "_get_sequence_nr", int)()
    return number


def in_cuda_graph() -> bool:
    """Whether the current stream is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


_APPLY = torch.autograd.Function.apply.__func__.__code__  # type: ignore[attr-defined]


def kernel_around() -> str:
    """What to say where this is inside of an ``autograd.Function``'s forward pass, which has no gradients."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _APPLY and frame.f_locals["cls"] is not CheckpointFunction:
            return _reason(frame.f_locals["cls"])
        frame = frame.f_back
    return ""


def _reason(function: Any) -> str:
    return (BOUND if function in CALLERS else KERNEL).format(function.__name__)


def kernels(result: Any, since: int, known: set[int]) -> Iterator[str]:
    """What to say of the attention-like ``autograd.Function`` nodes behind ``result``.

    Args:
        result: what a module returned.
        since: autograd's sequence number at the module's start; older nodes are not the module's.
        known: sequence numbers of nodes looked at already, for a module inside of this one; added to.
    """
    pending, visited = [tensor.grad_fn for tensor in _tensors(result)], set()
    while pending:
        node: Any = pending.pop()
        if node is None or node in visited or not since <= (number := node._sequence_nr()) < _LEAF:
            continue
        visited.add(node)
        pending += [before for before, _ in node.next_functions]
        if number not in known and isinstance(node, BackwardCFunction) and _like_attention(node):
            yield _reason(node._forward_cls)  # type: ignore[attr-defined]
        known.add(number)


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping | list | tuple):
        for part in result.values() if isinstance(result, Mapping) else result:
            yield from _tensors(part)


def _like_attention(node: Any) -> bool:
    """Query, key and value go in, one context per query comes out; or the three of them packed in one tensor."""
    context, *others = (tuple(output.shape) for output in node._input_metadata)
    given = [_shape(before, output) for before, output in node.next_functions if before is not None]
    given = [shape for shape in given if len(shape) >= 3]
    if node._forward_cls is CheckpointFunction or context in others:
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
