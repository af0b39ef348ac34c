"""One attention call, as the statistics see it.

Shape legend, used everywhere: ``B`` batch, ``H`` query heads, ``G`` key/value heads
(grouped-query attention: ``H = r * G``, query head ``h`` reads key head ``h // r``),
``T`` queries, ``S`` keys, ``D`` width of a query or key, ``E`` width of a value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class AttentionRecord:
    """What one attention call computed and, after backward, which error reached its output.

    The scores of head ``h`` are ``scale * query @ key^T``, passed through ``score_mod``, plus
    ``mask`` where it is additive; or, where the model computed them itself in front of an explicit
    softmax, ``logits`` (then ``query``, ``key`` may be unknown, ``scale`` and ``causal`` are not
    used, and ``mask`` only says which pairs the model masked: it is in ``logits`` already).
    The weights are their softmax, in which ``sink`` takes part; ``output`` is what they read after
    dropout.

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
        kept: ``[B, H, T, S]`` boolean, the weights that survived dropout; None where that is unknown.
        sink: ``[B, H, T]``, learned logits of one more key, which every query that sees a key sees
            too: it has no position and a value of 0.
        score_mod: as in FlexAttention, ``score_mod(score, b, h, q_idx, kv_idx)`` is the score of a
            pair (``h`` the query head); -inf, or anything down from -1e4, hides the pair.
        mask_mod: as in FlexAttention, ``mask_mod(b, h, q_idx, kv_idx)`` says whether a pair is visible.
        logsumexp: ``[B, H, T]``, log-sum-exp of the scores, in nats, as the kernel left it; None where unknown.
        lse_error: ``dL/d lse``, ``[B, H, T]``, of the log-sum-exp of the scores, where the kernel
            returned it and the model used it; None or 0 where only ``output`` was used.
        self_attention: True if queries and keys are the same tokens, False for
            cross-attention, None where that is unknown.
        positions: ``[B, T]``, where each query stands among the keys, ascending; None if it is its index.
        sampled_from: how many queries there were, of which those at ``positions`` are a part.
        mask_threshold: from which value of an additive mask on a pair is masked; None to tell by its values.
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
    kept: Tensor | None = None
    sink: Tensor | None = None
    score_mod: ScoreMod | None = None
    mask_mod: MaskMod | None = None
    logsumexp: Tensor | None = None
    lse_error: Tensor | None = None
    positions: Tensor | None = None
    sampled_from: int | None = None
    mask_threshold: float | None = None
    self_attention: bool | None = None
    query_tokens: Tensor | None = None
    key_tokens: Tensor | None = None

    def __post_init__(self) -> None:
        if self.logits is None and (self.query is None or self.key is None):
            raise ValueError("an AttentionRecord needs either logits or both query and key")
        if self.logits is not None and (self.score_mod is not None or self.mask_mod is not None):
            raise ValueError("score_mod and mask_mod are for scores of query and key; logits have them already")
        if self.kept is not None and self.dropout <= 0:
            raise ValueError("kept says which weights survived dropout, so dropout must be above 0")
        for name, dims in (("kept", 4), ("sink", 3), ("lse_error", 3), ("logsumexp", 3)):
            tensor = getattr(self, name)
            if tensor is not None and [*tensor.shape] != self._score_shape[:dims]:
                raise ValueError(f"{name} has shape {[*tensor.shape]} instead of {self._score_shape[:dims]}")

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """``(B, H, G, T, S)``."""
        scores = self.logits if self.logits is not None else self.query
        assert scores is not None
        batch, heads, queries = scores.shape[:3]
        groups, keys = self.value.shape[1:3]
        return batch, heads, groups, queries, keys

    @property
    def whole_queries(self) -> int:
        """``T``, of the call that the record may be a part of."""
        return self.shape[3] if self.sampled_from is None else self.sampled_from

    @property
    def _score_shape(self) -> list[int]:
        batch, heads, _, queries, keys = self.shape
        return [batch, heads, queries, keys]

    @property
    def survivor_factor(self) -> float:
        """What dropout multiplied the weights by that it kept."""
        return 1 / (1 - self.dropout) if self.dropout < 1 else 0.0
