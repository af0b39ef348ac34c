"""Attention written in many ways: ``attend(query, key, value, dropout)`` on ``[B, H, T, D]`` gives the context."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention as bound_before

WINDOW, SOFTCAP = 3, 2.0


def causal_mask(query: Tensor, key: Tensor) -> Tensor:
    return torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()


def distances(query: Tensor, key: Tensor) -> Tensor:
    return torch.arange(key.shape[-2]) - torch.arange(query.shape[-2])[:, None]


def slopes(query: Tensor) -> Tensor:
    """As ALiBi has them, ``[H, 1, 1]``."""
    return 2.0 ** -torch.arange(1, query.shape[1] + 1, dtype=query.dtype)[:, None, None]


# F.scaled_dot_product_attention


def sdpa(q: Tensor, k: Tensor, v: Tensor, p: float, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p, **options)


def sdpa_bound_before(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    return bound_before(q, k, v, None, p, True)


def sdpa_bool_mask(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask(q, k), dropout_p=p)


def sdpa_float_mask(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    bias = (slopes(q) * distances(q, k)).masked_fill(~causal_mask(q, k), -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype), dropout_p=p)


def sdpa_folded(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """``[B * H, T, D]``: the module says how many heads, autograd which of the two came first."""
    batch = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True).unflatten(0, batch)


# FlexAttention, which has no dropout


def alibi(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return score + (key - query) * 0.5 ** (head + 1)


def is_causal(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def in_window(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (query >= key) & (query - key < WINDOW)


def block_mask(mask: Any, q: Tensor, k: Tensor) -> BlockMask:
    return create_block_mask(mask, None, None, q.shape[-2], k.shape[-2], device=q.device)


def flex_alibi(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    return flex_attention(q, k, v, score_mod=alibi)


def flex_masked(q: Tensor, k: Tensor, v: Tensor, p: float, *, mask: Any, **options: Any) -> Tensor:
    return flex_attention(q, k, v, block_mask=block_mask(mask, q, k), **options)


# A softmax written out


def operators(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~causal_mask(q, k), -torch.inf)
    return F.dropout(scores.softmax(-1), p) @ v


def softcapped(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    scores = SOFTCAP * torch.tanh(torch.matmul(q, k.transpose(-2, -1)) / SOFTCAP)
    return torch.matmul(F.dropout(F.softmax(scores, dim=-1), p), v)


def bmm(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """As BART did: the heads lie in the batch, except where the mask is added."""
    batch, hidden = q.shape[:2], torch.zeros(q.shape[-2], k.shape[-2], dtype=q.dtype)
    hidden = hidden.masked_fill(~causal_mask(q, k), torch.finfo(q.dtype).min)
    q, k, v = (x.flatten(0, 1) for x in (q * q.shape[-1] ** -0.5, k, v))
    scores = (torch.bmm(q, k.transpose(1, 2)).unflatten(0, batch) + hidden).flatten(0, 1)
    return torch.bmm(F.dropout(F.softmax(scores, dim=-1), p), v).unflatten(0, batch)


def baddbmm(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """As BLOOM does: a bias of positions is the first operand."""
    batch = q.shape[:2]
    bias = (slopes(q) * distances(q, k)).to(q.dtype).repeat(batch[0], 1, 1)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    scores = bias.baddbmm(q, k.mT, alpha=q.shape[-1] ** -0.5).unflatten(0, batch)
    weights = F.dropout(scores.masked_fill(~causal_mask(q, k), -1e4).softmax(-1), p)
    return torch.bmm(weights.flatten(0, 1), v).unflatten(0, batch)


def einsum(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    weights = (torch.einsum("bhtd,bhsd->bhts", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
    return torch.einsum("bhts,bhsd->bhtd", F.dropout(weights, p), v)


def einsum_tokens_first(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = torch.einsum("bthd,bshd->bhts", q * q.shape[-1] ** -0.5, k).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", F.dropout(weights, p), v).transpose(1, 2)


# The weights on the right of the product


def weights_right(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    weights = F.dropout((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1), p)
    return torch.matmul(v.mT, weights.mT).mT


def einsum_weights_right(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    weights = (torch.einsum("bhtd,bhsd->bhts", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("bhsd,bhts->bhtd", v, F.dropout(weights, p))


# A softmax over another axis than the last


def keys_first(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """``[B, H, S, T]``: every column is a query's weights, as in linear algebra books."""
    weights = F.dropout((k @ q.mT * q.shape[-1] ** -0.5).softmax(-2), p)
    return (v.mT @ weights).mT


def heads_last(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """``[B, T, S, H]``, softmax over ``S``."""
    scores = torch.einsum("bhtd,bhsd->btsh", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("btsh,bhsd->bhtd", F.dropout(scores.softmax(dim=2), p), v)


# No heads


def single_head(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """On ``[B, T, D]``."""
    weights = torch.softmax(q @ k.transpose(1, 2) / math.sqrt(q.shape[-1]), dim=-1)
    return F.dropout(weights, p) @ v
