"""What the running module says about an attention call that the call itself does not: its tokens and its heads."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attnprobe.capture.call import Call
from attnprobe.capture.modules import Entry


def same_tokens(call: Call, entry: Entry) -> bool | None:
    """Whether queries and keys are the same tokens; None where the module's inputs do not tell."""
    if call.layout.facts.get("causal"):
        return True
    known = call.tensors.get("query", call.tensors.get("logits"))
    if known is not None and known.shape[-2] != call.tensors["value"].shape[-2]:
        return False
    if learned(call.tensors.get("query")):
        return None
    # As many tokens and features at both ends of a square: rather a mask, or a bias.
    inputs = [(tensor, shape) for tensor, shape in entry.inputs if len(shape) != 3 or shape[-2] != shape[-1]]
    if len(inputs) != 1:
        inputs = [(tensor, shape) for tensor, shape in inputs if len(shape) < 4]
    if not inputs:
        return None
    (first, shape), *others = inputs
    if call.layout.ndim < 5 and len(shape) < 4 and not _holds(shape, call):
        return None  # a part of the tokens may attend to another part
    # As many tokens again: their projections, features of theirs, or a memory.
    return None if any(size[:-1] == shape[:-1] for other, size in others if other != first) else True


def _holds(shape: torch.Size, call: Call) -> bool:
    """Whether a sequence of tokens is as long as the call's, or divided into windows beside the batch."""
    lead, tokens = _scores_of(call).shape[:-2], call.tensors["value"].shape[-2]
    return tokens in shape[:-1] or math.prod(lead) > shape[0] * (lead[-1] if len(lead) > 1 else 1)


def _scores_of(call: Call) -> Tensor:
    """A tensor with the leading dimensions of the scores, and the queries behind them."""
    known = call.tensors.get("logits", call.tensors.get("query"))
    return call.output if known is None else known


def learned(query: Tensor | None) -> bool:
    """Whether the queries are parameters, the same ones for all sequences."""
    return query is not None and isinstance(query._base, nn.Parameter)


def folded_heads(call: Call, entry: Entry) -> int | None:
    """Number of heads that are folded into the batch, ``[B * H, T, E]``.

    The module says how many, its inputs confirm it, and autograd remembers which of the two came first.
    """
    if call.layout.ndim != 3 or not entry.heads:
        return None
    leads = {_folded_from(call.tensors.get(name))[:2] for name in ("query", "key", "value")}
    return entry.heads if any((batch, entry.heads) in leads for batch in _batches(entry) - {entry.heads}) else None


def _batches(entry: Entry) -> set[int]:
    """What the number of sequences may be, by the module's inputs."""
    return {size for _, shape in entry.inputs for size in shape[:-1]}


def _folded_from(tensor: Tensor | None) -> tuple[int, ...]:
    """The shape before a view or reshape to three dimensions, where that was the last thing that happened."""
    shape = getattr(tensor.grad_fn, "_saved_self_sym_sizes", ()) if tensor is not None else ()
    return tuple(shape) if len(shape) == 4 else ()


def misplaced_heads(call: Call, entry: Entry) -> tuple[int, int] | None:
    """Which dimensions of ``[H, B, T, E]`` or ``[B, H, blocks, T, E]`` change places to have the heads last."""
    lead = tuple(_scores_of(call).shape[:-2])
    if len(lead) not in (2, 3) or len(lead) + 2 != call.layout.ndim:
        return None
    if lead[-2] != entry.heads or lead[-1] == lead[-2]:
        return None
    return (len(lead) - 2, len(lead) - 1) if len(lead) == 3 or lead[-1] in _batches(entry) else None
