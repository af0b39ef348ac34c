"""The flash-attn package, versions 2 and 3: its ``autograd.Function`` classes, known from the start.

Which arguments there are and in which order differs between versions, so they are read by name. Queries and keys are
aligned at their ends: query ``i`` is at key ``i + S - T``, in packed sequences at that of its own sequence.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attnprobe.capture.kernels import register_attention
from attnprobe.capture.registry import KERNELS

_MODULES = ("flash_attn.flash_attn_interface", "flash_attn_interface")
_CLASSES = [f"FlashAttn{kind}{packed}Func" for kind in ("", "Varlen") for packed in ("", "KVPacked", "QKVPacked")]
_BEYOND = ("block_table", "seqused_q", "seqused_k", "qv", "q_descale", "k_descale", "v_descale", "attention_chunk")


def register() -> None:
    """What of the package is loaded; it is never imported here, and what the user registered stays."""
    for module in _MODULES:
        for name in _CLASSES:
            kernel = getattr(sys.modules.get(module), name, None)
            if isinstance(kernel, type) and issubclass(kernel, torch.autograd.Function) and kernel not in KERNELS:
                register_attention(functools.partial(_adapter, kernel.forward), layout="bthd")(kernel)


def _adapter(forward: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Mapping[str, Any]:
    bound = inspect.signature(forward).bind(None, *args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    if beyond := [name for name in _BEYOND if isinstance(given.get(name), Tensor) or given.get(name)]:
        raise NotImplementedError(f"flash-attn with {', '.join(beyond)}")
    query, key, value = _operands(given)
    told = {"query": query, "key": key, "value": value, "scale": given["softmax_scale"]}
    told["dropout"] = given.get("dropout_p", 0.0)
    starts: list[Any] = [given.get(name, given.get("cu_seqlens")) for name in ("cu_seqlens_q", "cu_seqlens_k")]
    if starts[0] is not None:
        return told | _packed(given, starts[0], starts[1]) | _modifications(given, *(start.diff() for start in starts))
    queries, keys = query.shape[1], key.shape[1]
    if "qkv" in given or (given["causal"] and queries == keys):
        told["self_attention"] = True
    modified = _modifications(given, *(query.new_full(query.shape[:1], n, dtype=torch.long) for n in (queries, keys)))
    left, right = _window(given)
    if left < 0 and (right < 0 or (right == 0 and queries == keys)):
        modified |= {"mask_mod": None, "causal": right == 0}  # which costs less
    return told | modified


def _operands(given: Mapping[str, Any]) -> tuple[Tensor, ...]:
    if "qkv" not in given:
        return given["q"], *(given["kv"].unbind(-3) if "kv" in given else (given["k"], given["v"]))
    heads = given.get("num_heads_q")
    if heads is None or given["qkv"].ndim == 5:
        return given["qkv"].unbind(-3)  # type: ignore[no-any-return]
    groups = (given["qkv"].shape[2] - heads) // 2
    return given["qkv"].split([heads, groups, groups], -2)  # type: ignore[no-any-return]


def _packed(given: Mapping[str, Any], query_starts: Tensor, key_starts: Tensor) -> dict[str, Any]:
    """For sequences one after the other, ``[tokens, H, D]``: how they become a batch."""
    longest = [int(given.get(name, given.get("max_seqlen"))) for name in ("max_seqlen_q", "max_seqlen_k")]
    queries, keys = (_Batch(*each) for each in zip((query_starts, key_starts), longest, strict=True))
    same = query_starts is key_starts or torch.equal(query_starts, key_starts)
    return {
        "arrange": queries,
        "unpack": lambda name, tensor: queries(tensor) if name == "query" else keys(tensor),
        "query_tokens": queries.real,
        "key_tokens": keys.real,
        "self_attention": (True if query_starts is key_starts or given["causal"] else None) if same else False,
    }


class _Batch:
    """Brings packed sequences ``[tokens, H, D]`` to ``[B, H, T, D]``, with zeros for padding.

    Args:
        starts: where each sequence begins, and where the last one ends.
        longest: how many tokens the longest has, at least.
    """

    def __init__(self, starts: Tensor, longest: int) -> None:
        places = torch.arange(longest, device=starts.device)
        self.real = places < starts.diff()[:, None]
        self._index = starts[:-1, None] + places

    def __call__(self, tokens: Tensor) -> Tensor:
        with_zeros = torch.cat([tokens, tokens.new_zeros(1, *tokens.shape[1:])])
        return with_zeros[self._index.where(self.real, len(tokens))].transpose(1, 2)


def _window(given: Mapping[str, Any]) -> tuple[int, int]:
    """How many keys to the left and to the right are seen; what is negative has no end."""
    left, right = given.get("window_size", (-1, -1))
    return left, 0 if given["causal"] else right


def _modifications(given: Mapping[str, Any], queries: Tensor, keys: Tensor) -> dict[str, Any]:
    """Masks and what is done to scores, for numbers of tokens ``[B]``."""
    left, right = _window(given)
    cap, slopes, shift = given.get("softcap", 0.0), given.get("alibi_slopes"), keys - queries

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        ahead, seen = j - i - shift[b], (i < queries[b]) & (j < keys[b])
        seen = seen & (ahead >= -left) if left >= 0 else seen
        return seen & (ahead <= right) if right >= 0 else seen

    def score(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if cap > 0:
            score = cap * torch.tanh(score / cap)
        if slopes is not None:
            slope = slopes[h] if slopes.ndim == 1 else slopes[b, h]
            score = score - slope.to(score.dtype) * (j - i - shift[b]).abs()
        return score

    return {"mask_mod": visible, "score_mod": score if cap > 0 or slopes is not None else None}
