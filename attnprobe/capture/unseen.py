"""Attention that cannot be captured: what to say, and how to recognise some of it."""

from __future__ import annotations

import torch
from torch import nn

NESTED = "its inputs are nested tensors, which have no common length"
SCRIPTED = "it is TorchScript, which runs outside of Python: probe the model before it is scripted or traced"
REPLICAS = "it runs as replicas of nn.DataParallel, copies in threads of their own: use DistributedDataParallel"
GRAPHED = "it is being captured into a CUDA graph, whose replays run no Python: probe it uncaptured"
UNMET = "it has a softmax over products of queries and keys, but how its weights meet the values was not recognised"
KERNEL = (
    "it runs the autograd.Function {}, which nothing can look into: if that is softmax attention, "
    "attnprobe.register_attention tells what it computes"
)
BOUND = (
    "it runs the registered autograd.Function {0} through a name for {0}.apply that was bound before the probe came: "
    "register that function instead"
)


def scripted_attention(module: nn.Module) -> bool:
    """Whether a module is TorchScript with attention in it."""
    if not isinstance(module, torch.jit.ScriptModule):
        return False
    graph = str(module.inlined_graph)
    return "scaled_dot_product" in graph or ("softmax" in graph and any(product in graph for product in _PRODUCTS))


_PRODUCTS = ("aten::matmul", "aten::bmm", "aten::einsum", "aten::baddbmm")


def in_cuda_graph() -> bool:
    """Whether the current stream is being captured."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
