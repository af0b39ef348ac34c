"""What the running module says about an attention call that the call itself does not: its tokens and its heads."""

from __future__ import annotations

from attnprobe.capture.call import Call
from attnprobe.capture.modules import Entry


def same_tokens(call: Call, entry: Entry) -> bool | None:
    """Whether queries and keys are the same tokens; None where the module's inputs do not tell."""
    if call.layout.facts.get("causal"):
        return True
    known = call.tensors.get("query", call.tensors.get("logits"))
    if known is not None and known.shape[-2] != call.tensors["value"].shape[-2]:
        return False
    # As many tokens and features at both ends of a square: rather a mask, or a bias.
    inputs = [(tensor, shape) for tensor, shape in entry.inputs if len(shape) != 3 or shape[-2] != shape[-1]]
    if len(inputs) != 1:
        inputs = [(tensor, shape) for tensor, shape in inputs if len(shape) < 4]
    if not inputs:
        return None
    (first, shape), *others = inputs
    # As many tokens again: their projections, features of theirs, or a memory.
    return None if any(size[:-1] == shape[:-1] for other, size in others if other != first) else True


def folded_heads(call: Call, entry: Entry) -> int | None:
    """Number of heads that are folded into the batch, ``[B * H, T, E]``, as the module says and its inputs confirm."""
    if call.layout.ndim != 3 or not entry.heads:
        return None
    batches = {size for _, shape in entry.inputs for size in shape[:-1]}
    return entry.heads if any(call.output.shape[0] == entry.heads * batch for batch in batches) else None


def heads_before_blocks(call: Call, entry: Entry) -> bool:
    """Whether a call of 5 dimensions is ``[B, H, blocks, T, E]`` rather than ``[B, blocks, H, T, E]``."""
    lead = call.output.shape[:-2]
    return call.layout.ndim == 5 and len(lead) == 3 and lead[1] == entry.heads != lead[2]
