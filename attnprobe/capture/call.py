"""One attention call as a handler found it, in the model's own layout, and as the statistics want it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
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
        unpack: brings query, key or value, by name, there, where that makes a copy, which is not to be held.
        swapped: two leading dimensions that have to change places, so that the heads are the last of them.
        replay: computes the weights as dropped ``[..., T, S]`` from the tensors of the call.
        tokens: ``[B, T]`` boolean, the user's word on which tokens are real.
    """

    facts: Mapping[str, Any]
    ndim: int
    heads: int | None = None
    arrange: Callable[[Tensor], Tensor] = lambda tensor: tensor
    unpack: Callable[[str, Tensor], Tensor] | None = None
    swapped: tuple[int, int] | None = None
    replay: Callable[[Mapping[str, Tensor]], Tensor | None] | None = None
    tokens: Tensor | None = None

    def record(self, tensors: Mapping[str, Tensor], error: Tensor | None) -> AttentionRecord:
        """The call as a record; ``error`` and ``tensors["output"]`` are in the model's layout."""
        parts: dict[str, Any] = dict(tensors)
        if self.unpack is not None:
            parts |= {name: self.unpack(name, parts[name]) for name in ("query", "key", "value")}
        if self.replay is not None and (dropped := self.replay(tensors)) is not None:
            parts["dropped"] = dropped
        if (shift := parts.pop("shift", None)) is not None:
            parts |= {name: parts[name] + shift for name in ("logits", "sink") if name in parts}
        undropped = parts.pop("undropped", None)
        if (dropped := parts.pop("dropped", None)) is not None:
            parts["kept"] = dropped != 0
            if undropped is not None:
                parts["kept"] |= undropped == 0  # it was 0 before
        if "output" in parts:
            parts["output"] = self.arrange(parts["output"])
        if error is not None:
            parts["error"] = self.arrange(error)
        parts = {name: x.reshape((1,) * (self.ndim - x.ndim) + x.shape) for name, x in parts.items()}
        model = "output" if error is None else "error"
        for name in ("value",) if "logits" in parts else ("query", "key", "value"):
            parts[name] = parts[name].to(parts[model].dtype)  # autocast did so, inside of the product
        if self.ndim == 5 and parts["value"].shape[2] == 1 < parts[model].shape[2]:
            groups = parts[model].shape[1:3]  # [B, G, r, T, E]: r query heads read one key head
            for name, x in parts.items():
                shared = name in ("key", "value") or x.shape[1:3] == (1, 1)
                parts[name] = x.squeeze(2) if shared else x.expand(-1, *groups, -1, -1).flatten(1, 2)
        if self.swapped is not None:
            parts = {name: x.transpose(*self.swapped) for name, x in parts.items()}
        if parts[model].ndim > 4:  # the leading dimensions are about to become one, which cannot be broadcast
            parts = {name: x.expand(*parts[model].shape[:-3], *x.shape[-3:]) for name, x in parts.items()}
        parts = {name: split_heads(x, self.heads) for name, x in parts.items()}
        batch, heads = parts[model].shape[:2]
        for name in parts.keys() - {"mask"}:
            parts[name] = parts[name].expand(batch, -1 if name in ("key", "value") else heads, -1, -1)
        for name in parts.keys() & {"sink", "lse_error", "logsumexp"}:
            parts[name] = parts[name].expand(-1, -1, parts[model].shape[2], -1)[..., 0]
        record = AttentionRecord(**parts, **self.facts)
        if record.self_attention is None and _reads_backwards(record):
            record = replace(record, self_attention=True)
        if self.tokens is None or record.query_tokens is not None or record.key_tokens is not None:
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
        tensors: ``query``, ``key``, ``value``, ``mask``, ``logits`` (those known), ``[..., T or S, X]``; further
            ``sink`` and ``shift``, what was taken off the logits, ``[..., T, 1]``, and ``undropped`` and
            ``dropped``, the weights before and after dropout.
        layout: how to read them.
        intact: whether they still are what the attention used.
        leaves_lse: whether the node of the autograd graph that made the output keeps the log-sum-exp of the scores.
        lse: the log-sum-exp of the scores, where the kernel hands it out and a gradient may come back that way;
            ``lse_unit`` is the unit that it is in, in nats.
    """

    output: Tensor
    tensors: Mapping[str, Tensor]
    layout: Layout = field(default_factory=lambda: Layout({}, 4))
    intact: bool = True
    leaves_lse: bool = False
    lse: Tensor | None = None
    lse_unit: float = 1.0


def _reads_backwards(record: AttentionRecord) -> bool:
    """Whether a mask hides every later key, for which only tokens that attend to each other have a reason."""
    _, _, _, queries, keys = record.shape
    if queries != keys or queries < 2:
        return False
    index = torch.arange(queries - 1, device=record.value.device)
    if record.mask_mod is not None:
        zero = index.new_zeros(())
        return not bool(record.mask_mod(zero, zero, index, index + 1).any())
    if record.mask is None or record.mask.shape[-2:] != (queries, keys):
        return False
    mask = record.mask
    hidden = ~mask if mask.dtype == torch.bool else mask <= (mask.amin().clamp(max=-50.0))
    return bool((hidden | torch.ones_like(hidden).tril()).all())


def split_heads(tensor: Tensor, heads: int | None) -> Tensor:
    """``[..., X, Y]`` -> ``[B, H, X, Y]``: the last leading dimension is the head, unless ``heads`` were flattened.

    Three dimensions without ``heads`` are a batch of single-head sequences, two are one of them.
    """
    while tensor.ndim < 3:
        tensor = tensor.unsqueeze(0)
    if tensor.ndim == 3:
        if heads is not None and heads > 1 and tensor.shape[0] % heads == 0:
            return tensor.reshape(-1, heads, *tensor.shape[1:])
        return tensor.unsqueeze(1)
    return tensor.flatten(0, tensor.ndim - 4)
