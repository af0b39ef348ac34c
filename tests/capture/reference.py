"""What the probe captures, and the same calls as the model itself and autograd know them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnprobe.capture.session import Seen, Session
from tests.capture.models import HEADS, Attention, Note, Variant, keep, loss_of, same


@functools.cache
def expected(variant: Variant, dtype: torch.dtype = torch.float64) -> list[Note]:
    """The calls of one training pass without any probe, in order."""
    model, batch = variant.model(dtype), variant.batch(dtype)
    with noted(model, variant.dropout) as notes:
        torch.manual_seed(7)
        loss_of(model(*batch)).backward()
    return notes


@functools.cache
def captured(variant: Variant, dtype: torch.dtype = torch.float64) -> list[Seen]:
    """The same pass under a session, whose ``Seen.result`` is the record."""
    model, batch = variant.model(dtype), variant.batch(dtype)
    with session(model) as watching:
        torch.manual_seed(7)
        loss_of(model(*batch)).backward()
    return watching.seen


@contextlib.contextmanager
def session(model: nn.Module, **options: Any) -> Iterator[Session]:
    """A session that keeps the records and lets its own exceptions through."""
    watching = Session(model, lambda module, record: record, **{"strict": True, **options})
    watching.start()
    try:
        yield watching
    finally:
        watching.stop()


def names(seen: list[Seen]) -> list[str]:
    """The measured layers, in order of first sight."""
    assert all(call.result is not None for call in seen), [call.reason for call in seen]
    calls = sorted(seen, key=lambda call: (call.rank, call.index))
    repeated = {call.module for call in seen if call.index}
    return [f"{call.module}#{call.index}" if call.module in repeated else call.module for call in calls]


@contextlib.contextmanager
def noted(model: nn.Module, dropout: float = 0.0) -> Iterator[list[Note]]:
    """Every ``Attention`` takes notes, and torch's own functions do it for ``nn.MultiheadAttention``."""
    notes: list[Note] = []
    for module in model.modules():
        if isinstance(module, Attention):
            module.notes = notes
    if any(isinstance(module, nn.MultiheadAttention) for module in model.modules()):
        with _spied(notes, dropout):
            yield notes
    else:
        yield notes
    for module in model.modules():
        if isinstance(module, Attention):
            module.notes = None


@contextlib.contextmanager
def _spied(notes: list[Note], dropout: float) -> Iterator[None]:
    fused, product, sum_and_product = F.scaled_dot_product_attention, torch.bmm, torch.baddbmm
    scores: dict[str, Any] = {}

    def spy_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float, causal: bool) -> Tensor:
        o = fused(q, k, v, mask, p, causal)
        facts = {"scale": q.shape[-1] ** -0.5, "causal": causal, "dropout": p}
        keep(notes, o, same, {"query": q, "key": k, "value": v, **facts, **({} if mask is None else {"mask": mask})})
        return o

    def spy_scores(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
        logits = sum_and_product(mask, q, k)
        visible = mask.isneginf().logical_not().expand_as(logits)
        scores.update(query=q, key=k.mT, logits=logits, mask=visible.unflatten(0, (-1, HEADS)))
        return logits

    def spy_product(left: Tensor, right: Tensor) -> Tensor:
        out = product(left, right)
        if scores:
            keep(notes, out, lambda x: x.unflatten(0, (-1, HEADS)), scores | {"value": right, "dropout": dropout})
            scores.clear()
        else:
            scores.update(query=left, key=right.mT, logits=out)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", spy_fused)
        patch.setattr(torch, "bmm", spy_product)
        patch.setattr(torch, "baddbmm", spy_scores)
        yield
