"""Attention that cannot be captured: how to recognise it, and what to say.

What runs in TorchScript or in a kernel of its own hands nothing out. A scripted module still has its graph; a
``torch.autograd.Function`` leaves a node, whose inputs and outputs look like attention or do not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

NESTED = "its inputs are nested tensors, which have no common length"
SCRIPTED = "it is TorchScript, which runs outside of Python: probe the model before it is scripted or traced"
REPLICAS = "it runs as replicas of nn.DataParallel, copies in threads of their own: use DistributedDataParallel"
GRAPHED = "it is being captured into a CUDA graph, whose replays run no Python: probe it uncaptured"
KERNEL = (
    "it runs the autograd.Function {}, which nothing can look into: attnprobe.register_attention tells what it computes"
)


def scripted_attention(module: nn.Module) -> bool:
    """Whether a module is TorchScript with attention in it."""
    if not isinstance(module, torch.jit.ScriptModule):
        return False
    graph = str(module.inlined_graph)
    return "scaled_dot_product_attention" in graph or ("softmax" in graph and "matmul" in graph)


def sequence_number() -> int:
    """Of the next node of the autograd graph."""
    number: int = torch._C._autograd._get_sequence_nr()
    return number


def in_cuda_graph() -> bool:
    """Whether the current stream is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def kernels(result: Any, since: int, known: set[int]) -> Iterator[str]:
    """Names of the attention-like ``autograd.Function`` nodes behind ``result``.

    Args:
        result: what a module returned.
        since: autograd's sequence number at the module's start; older nodes are not the module's.
        known: sequence numbers of nodes looked at already; added to.
    """
    pending = [tensor.grad_fn for tensor in _tensors(result)]
    while pending:
        node: Any = pending.pop()
        if node is None or not since <= (number := node._sequence_nr()) < _LEAF or number in known:
            continue
        known.add(number)
        pending += [before for before, _ in node.next_functions]
        if isinstance(node, BackwardCFunction) and _like_attention(node):
            yield type(node).__name__.removesuffix("Backward")


#: The sequence number of leaves.
_LEAF = 2**63


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping | list | tuple):
        for part in result.values() if isinstance(result, Mapping) else result:
            yield from _tensors(part)


def _like_attention(node: Any) -> bool:
    """Query, key and value go in, one context per query comes out; or the three of them packed in one tensor."""
    context = tuple(node._input_metadata[0].shape)
    given = [_shape(before, output) for before, output in node.next_functions if before is not None]
    given = [shape for shape in given if len(shape) >= 3]
    if any(size == 3 and shape[:i] + shape[i + 1 :] == context for shape in given for i, size in enumerate(shape)):
        return True
    if len(given) < 3:
        return False
    query, key, value = given[:3]
    alike = len(query) == len(key) == len(value) and query[:-1] == context[:-1] and key[:-1] == value[:-1]
    return alike and query[-1] == key[-1] and value[-1] == context[-1]


def _shape(node: Any, output: int) -> tuple[int, ...]:
    leaf = getattr(node, "variable", None)
    return tuple(node._input_metadata[output].shape if leaf is None else leaf.shape)
