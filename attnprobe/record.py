"""One attention call, as the statistics see it.

Shape legend, used everywhere: ``B`` batch, ``H`` query heads, ``G`` key/value heads
(grouped-query attention: ``H = r * G``, query head ``h`` reads key head ``h // r``),
``T`` queries, ``S`` keys, ``D`` width of a query or key, ``E`` width of a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class AttentionRecord:
    """What one attention call computed and, after backward, which error reached its output.

    The scores of head ``h`` are ``scale * query @ key^T``, plus ``mask`` where it is additive;
    or, where the model computed them itself in front of an explicit softmax, ``logits``
    (then ``query``, ``key`` may be unknown, ``scale`` and ``causal`` are not used, and ``mask``
    only says which pairs the model masked: it is in ``logits`` already).

    Attributes:
        value: ``[B, G, S, E]``.
        query: ``[B, H, T, D]``, None where only the logits are known.
        key: ``[B, G, S, D]``, None where only the logits are known.
        output: per-head context ``[B, H, T, E]`` before the output projection, None if lost.
        error: ``u = dL/d output``, ``[B, H, T, E]``; None in forward-only use.
        scale: factor on ``query @ key^T``.
        mask: broadcastable to ``[B, H, T, S]``; boolean (True = visible) or additive.
        causal: query ``i`` sees keys ``j <= i`` (top-left aligned, as in torch's SDPA).
        logits: ``[B, H, T, S]``, the softmax's input.
        dropout: probability with which attention weights were dropped after the softmax.
        self_attention: True if queries and keys are the same tokens, False for
            cross-attention, None where that is unknown.
        query_tokens: ``[B, T]`` boolean, True = real token, given by the user; None = derive.
        key_tokens: ``[B, S]`` boolean, True = real token, given by the user; None = derive.
    """

    value: Tensor
    query: Tensor | None = None
    key: Tensor | None = None
    output: Tensor | None = None
    error: Tensor | None = None
    scale: float = 1.0
    mask: Tensor | None = None
    causal: bool = False
    logits: Tensor | None = None
    dropout: float = 0.0
    self_attention: bool | None = None
    query_tokens: Tensor | None = None
    key_tokens: Tensor | None = None

    def __post_init__(self) -> None:
        if self.logits is None and (self.query is None or self.key is None):
            raise ValueError("an AttentionRecord needs either logits or both query and key")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """``(B, H, G, T, S)``."""
        scores = self.logits if self.logits is not None else self.query
        assert scores is not None
        batch, heads, queries = scores.shape[:3]
        groups, keys = self.value.shape[1:3]
        return batch, heads, groups, queries, keys
