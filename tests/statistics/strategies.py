"""Random attention records: every combination of shape, mask, padding and dtype that a model could hand over."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from attnprobe.record import AttentionRecord

HEADS_AND_GROUPS = ((1, 1), (4, 4), (4, 2), (6, 1))
#: How a model says "not visible": as booleans, or by the value that an additive mask holds.
MASKED_BY: tuple[str | float, ...] = ("bool", -1e9, -torch.inf, "finfo.min", -100.0, "bias")


@dataclass(frozen=True)
class Example:
    """A record, and which pairs are visible by construction: ``[B, H, T, S]``."""

    record: AttentionRecord
    visible: Tensor


@st.composite
def examples(draw: st.DrawFn, dtype: torch.dtype = torch.float32, min_batch: int = 1) -> Example:
    """A whole record; hypothesis draws the structure, a seeded generator the numbers."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    queries, keys, self_attention = draw(_lengths())
    long = queries * keys > 10_000  # then the reference takes its time
    batch = draw(st.integers(min_batch, min_batch if long else 3))
    heads, groups = draw(st.sampled_from(HEADS_AND_GROUPS[:3] if long else HEADS_AND_GROUPS))
    key_width, value_width = draw(st.sampled_from([1, 3, 8, 16])), draw(st.sampled_from([1, 5, 8, 16]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    sharpness = draw(st.sampled_from([0.05, 1.0, 4.0]))
    query, key = normal(batch, heads, queries, key_width) * sharpness, normal(batch, groups, keys, key_width)
    value = normal(batch, groups, keys, value_width) + draw(st.sampled_from([0.0, 3.0]))
    scale = draw(st.sampled_from([key_width**-0.5, 1.0, 0.3]))
    causal = draw(st.booleans())

    allowed, padding = _allowed(draw, generator, (batch, heads, queries, keys))
    visible = allowed.expand(batch, heads, queries, keys)
    if causal:
        visible = visible & torch.ones(queries, keys, dtype=torch.bool).tril()
    masked_by: str | float = draw(st.sampled_from(MASKED_BY))
    mask = None if bool(allowed.all()) and draw(st.booleans()) else _mask(allowed, masked_by, generator, dtype)

    scores = scale * (query.double() @ key.double().repeat_interleave(heads // groups, 1).mT)
    extended = draw(st.booleans())  # by what few models have
    modifications: dict[str, Any] = {}
    if extended:
        modifications, scores, shown = _modifications(draw, generator, scores)
        visible = visible & shown
    if mask is not None and masked_by == "bias":
        scores = scores + mask.double()
    record = AttentionRecord(
        value=value,
        query=query,
        key=key,
        scale=scale,
        mask=mask,
        causal=causal,
        self_attention=self_attention,
        **modifications,
    )
    if draw(st.integers(0, 3)) == 0 and not modifications:
        record = _with_logits(draw, record, scores.masked_fill(~visible, -torch.inf).to(dtype))
        assert record.logits is not None
        scores = record.logits.double()
    extensions = _extensions(draw, generator, (batch, heads, queries, keys)) if extended else {}
    choices = scores.masked_fill(~visible, -torch.inf)
    if "sink" in extensions:
        choices = torch.cat([choices, extensions["sink"].double()[..., None]], -1)
    logsumexp = _logsumexp(draw, generator, choices) if record.logits is None and "sink" not in extensions else None
    weights = choices.softmax(-1)[..., :keys].where(visible, 0)
    if "kept" in extensions:
        weights = weights * extensions["kept"] / (1 - extensions["dropout"])
    output = weights @ value.double().repeat_interleave(heads // groups, 1)
    error = normal(batch, heads, queries, value_width)
    error = error * (torch.rand(batch, 1, queries, 1, generator=generator) > draw(st.sampled_from([0.0, 0.3])))
    record = dataclasses.replace(
        record,
        output=output.to(dtype) if draw(st.integers(0, 5)) else None,
        error=error if draw(st.integers(0, 9)) else None,
        logsumexp=logsumexp,
        **extensions,
        **_tokens(draw, generator, padding, (batch, queries, keys)),
    )
    return Example(record, visible)


def _logsumexp(draw: st.DrawFn, generator: torch.Generator, scores: Tensor) -> Tensor | None:
    """As a kernel leaves it, 0 where a row sees nothing, or none, or a wrong one."""
    kind = draw(st.sampled_from(["none", "right", "right", "wrong"]))
    exact = scores.logsumexp(-1).nan_to_num(0, 0, 0)
    if kind == "wrong":
        exact = exact + torch.randn(exact.shape, generator=generator, dtype=torch.float64)
    return None if kind == "none" else exact.float()


def records(dtype: torch.dtype = torch.float32, min_batch: int = 1) -> st.SearchStrategy[AttentionRecord]:
    """Only the records of ``examples``."""
    return examples(dtype, min_batch).map(lambda example: example.record)


def batch_slice(record: AttentionRecord, items: slice) -> AttentionRecord:
    """Some sequences of a record: what a micro-batch of them would have been."""
    batch = record.shape[0]

    def cut(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[items]

    def shifted(modification: Callable[..., Tensor] | None) -> Callable[..., Tensor] | None:
        if modification is None:
            return None
        return lambda *args: modification(*args[:-4], args[-4] + (items.start or 0), *args[-3:])

    mask = record.mask
    if mask is not None and mask.ndim == 4 and mask.shape[0] == batch:
        mask = mask[items]
    return dataclasses.replace(
        record,
        value=record.value[items],
        query=cut(record.query),
        key=cut(record.key),
        output=cut(record.output),
        error=cut(record.error),
        logsumexp=cut(record.logsumexp),
        logits=cut(record.logits),
        query_tokens=cut(record.query_tokens),
        key_tokens=cut(record.key_tokens),
        mask=mask,
        kept=cut(record.kept),
        sink=cut(record.sink),
        lse_error=cut(record.lse_error),
        score_mod=shifted(record.score_mod),
        mask_mod=shifted(record.mask_mod),
    )


@st.composite
def _lengths(draw: st.DrawFn) -> tuple[int, int, bool | None]:
    """Queries, keys, and whether they are the same tokens."""
    length = st.one_of(st.integers(1, 12), st.integers(13, 80), st.integers(81, 300))
    queries = draw(length)
    if draw(st.integers(0, 2)):
        return queries, queries, draw(st.sampled_from([True, True, True, None]))
    # False and None: cross-attention. True: keys from a cache stand in front of the queries' own.
    self_attention = draw(st.sampled_from([False, False, None, True]))
    keys = draw(length)
    return (min(queries, keys), max(queries, keys), True) if self_attention else (queries, keys, self_attention)


def _allowed(
    draw: st.DrawFn, generator: torch.Generator, shape: tuple[int, int, int, int]
) -> tuple[Tensor, Tensor | None]:
    """Visible pairs apart from causality, broadcastable to ``shape``, and the key padding behind them."""
    batch, heads, queries, keys = shape
    kind = draw(st.sampled_from(["all", "padding right", "padding left", "random", "random per head", "one for all"]))
    if kind.startswith("padding"):
        lengths = torch.randint(1, keys + 1, (batch, 1), generator=generator)
        position = torch.arange(keys)
        real = position < lengths if kind == "padding right" else position >= keys - lengths
        return real[:, None, None], real
    if kind == "all":
        return torch.ones(1, 1, 1, keys, dtype=torch.bool), None
    lead = {"random": (batch, 1), "random per head": (batch, heads), "one for all": ()}[kind]
    allowed = torch.rand(*lead, queries, keys, generator=generator) < draw(st.sampled_from([0.1, 0.7, 0.95]))
    # A two-level mask that holds one level only says nothing: leave one pair open in every sequence.
    allowed[..., 0, 0] = True
    return allowed, None


def _mask(allowed: Tensor, masked_by: str | float, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    if masked_by == "bool":
        return allowed
    if masked_by == "bias":
        return torch.randn(allowed.shape, generator=generator).masked_fill(~allowed, -torch.inf).to(dtype)
    level = torch.finfo(dtype).min if masked_by == "finfo.min" else float(masked_by)
    return torch.zeros(allowed.shape).to(dtype).masked_fill(~allowed, level)


def _modifications(
    draw: st.DrawFn, generator: torch.Generator, scores: Tensor
) -> tuple[dict[str, Any], Tensor, Tensor]:
    """``score_mod`` and ``mask_mod``, the scores as modified, and which pairs they show."""
    batch, heads, queries, keys = scores.shape
    slope, bias = torch.rand(heads, generator=generator) / 8, torch.randn(heads, 600, generator=generator)
    shown = torch.rand(batch, heads, queries, keys, generator=generator) < 0.8
    left, right = (torch.randn(size, 3, generator=generator) for size in (queries, keys))
    document, other = (torch.randint(0, 2, (batch, size), generator=generator) for size in (queries, keys))
    distance = torch.arange(queries)[:, None] - torch.arange(keys)
    everything, nothing = torch.ones_like(shown), torch.full((), -torch.inf)
    score_mods = {
        "": (None, scores, everything),
        "softcap and slope": (
            lambda score, b, h, q_idx, kv_idx: 5 * torch.tanh(score / 5) - slope[h] * (q_idx - kv_idx).abs(),
            5 * torch.tanh(scores / 5) - slope[:, None, None].double() * distance.abs(),
            everything,
        ),
        "relative position": (
            lambda score, b, h, q_idx, kv_idx: score + bias[h, q_idx - kv_idx + 300],
            scores + bias[:, distance + 300],
            everything,
        ),
        "hiding": (
            lambda score, b, h, q_idx, kv_idx: torch.where(shown[b, h, q_idx, kv_idx], score, nothing),
            scores,
            shown,
        ),
        "features": (  # not elementwise: a call with tensors of indices would sum over all of them
            lambda score, b, h, q_idx, kv_idx: score + (left[q_idx] * right[kv_idx]).sum(),
            scores + left @ right.mT,
            everything,
        ),
    }
    mask_mods = {
        "": (None, everything),
        "window": (lambda b, h, q_idx, kv_idx: (q_idx - kv_idx).abs() < 20, distance.abs() < 20),
        "documents": (
            lambda b, h, q_idx, kv_idx: document[b, q_idx] == other[b, kv_idx],
            (document[:, None, :, None] == other[:, None, None]),
        ),
        "features": (
            lambda b, h, q_idx, kv_idx: (left[q_idx] > right[kv_idx]).any(),
            (left[:, None] > right).any(-1),
        ),
    }
    score_mod, scores, shown = score_mods[draw(st.sampled_from(sorted(score_mods)))]
    mask_mod, allowed = mask_mods[draw(st.sampled_from(sorted(mask_mods)))]
    modifications = {"score_mod": score_mod, "mask_mod": mask_mod}
    return {name: function for name, function in modifications.items() if function}, scores, shown & allowed


def _extensions(draw: st.DrawFn, generator: torch.Generator, shape: tuple[int, int, int, int]) -> dict[str, Any]:
    """Dropout that is known, a learned sink, and a gradient at the log-sum-exp."""
    drawn: dict[str, Any] = {}
    if draw(st.booleans()):
        drawn["dropout"] = draw(st.sampled_from([0.1, 0.5, 0.9]))
        drawn["kept"] = torch.rand(shape, generator=generator) >= drawn["dropout"]
    if draw(st.booleans()):
        drawn["sink"] = torch.randn(shape[:3], generator=generator) + draw(st.sampled_from([-3, 0, 3]))
    if draw(st.booleans()):
        drawn["lse_error"] = torch.randn(shape[:3], generator=generator) * draw(st.sampled_from([0.1, 1, 30]))
    return drawn


def _with_logits(draw: st.DrawFn, record: AttentionRecord, scores: Tensor) -> AttentionRecord:
    """The same attention as a model would show it that computes its softmax itself."""
    low = draw(st.sampled_from([-torch.inf, torch.finfo(scores.dtype).min, -2e4]))
    logits = scores.masked_fill(scores == -torch.inf, low)
    forget = draw(st.booleans())
    return dataclasses.replace(
        record,
        logits=logits,
        query=None if forget else record.query,
        key=None if forget else record.key,
        mask=record.mask if draw(st.booleans()) else None,
    )


def _tokens(
    draw: st.DrawFn, generator: torch.Generator, padding: Tensor | None, shape: tuple[int, int, int]
) -> dict[str, Any]:
    """What the user says about padding: nothing, one side or both; not always what the mask says."""
    batch, queries, keys = shape
    key_tokens = padding
    if padding is None or draw(st.booleans()):
        key_tokens = torch.rand(batch, keys, generator=generator) < 0.8
    query_tokens = key_tokens if queries == keys else torch.rand(batch, queries, generator=generator) < 0.8
    given = draw(st.sampled_from(["", "", "", "query", "key", "query key"]))
    return {
        "query_tokens": query_tokens if "query" in given else None,
        "key_tokens": key_tokens if "key" in given else None,
    }
