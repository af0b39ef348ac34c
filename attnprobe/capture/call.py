"""One attention call as a handler found it, in the model's own layout, and as the statistics want it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from attnprobe.record import AttentionRecord


@dataclass(frozen=True)
class Layout:
    """How the tensors of a call become a record.

    Attributes:
        facts: the record's plain fields (scale, causal, dropout, self_attention).
        ndim: number of dimensions of the call's queries or logits: a mask is aligned to it from the right.
        heads: number of heads where the leading dimension is ``B * H``.
        arrange: brings the model's output, and its gradient, to ``[..., T, E]``.
        tokens: ``[B, T]`` boolean, the user's word on which tokens are real.
    """

    facts: Mapping[str, Any]
    ndim: int
    heads: int | None = None
    arrange: Callable[[Tensor], Tensor] = lambda tensor: tensor
    tokens: Tensor | None = None

    def record(self, tensors: Mapping[str, Tensor], error: Tensor | None) -> AttentionRecord:
        """The call as a record; ``error`` and ``tensors["output"]`` are in the model's layout."""
        parts = dict(tensors)
        if "mask" in parts:
            mask = parts["mask"]
            parts["mask"] = mask.reshape((1,) * (self.ndim - mask.ndim) + mask.shape)
        if "output" in parts:
            parts["output"] = self.arrange(parts["output"])
        if error is not None:
            parts["error"] = self.arrange(error)
        record = AttentionRecord(**{k: split_heads(v, self.heads) for k, v in parts.items()}, **self.facts)
        if self.tokens is None:
            return record
        batch, _, _, queries, keys = record.shape
        return replace(
            record,
            query_tokens=self.tokens if self.tokens.shape == (batch, queries) else None,
            key_tokens=self.tokens if self.tokens.shape == (batch, keys) else None,
        )


@dataclass(frozen=True)
class Call:
    """What a handler saw.

    Attributes:
        output: per-head context as the model has it; its gradient is the error ``u``.
        tensors: ``query``, ``key``, ``value``, ``mask``, ``logits`` (those known), ``[..., T or S, X]``.
        layout: how to read them.
    """

    output: Tensor
    tensors: Mapping[str, Tensor]
    layout: Layout = field(default_factory=lambda: Layout({}, 4))


def split_heads(tensor: Tensor, heads: int | None) -> Tensor:
    """``[..., X, Y]`` -> ``[B, H, X, Y]``: the last leading dimension is the head, unless ``heads`` were flattened.

    Three dimensions without ``heads`` are a batch of single-head sequences, two are one of them.
    """
    while tensor.ndim < 3:
        tensor = tensor.unsqueeze(0)
    if tensor.ndim == 3:
        if heads is not None and heads > 1 and tensor.shape[0] % heads == 0:
            return tensor.unflatten(0, (-1, heads))
        return tensor.unsqueeze(1)
    return tensor.flatten(0, tensor.ndim - 4)
