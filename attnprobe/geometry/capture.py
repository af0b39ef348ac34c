"""Value vectors of the heads of any watched model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from attnprobe.capture.session import Seen, Session
from attnprobe.collect import NOTHING, apart
from attnprobe.errors import AttnProbeWarning, ConfigurationError, NoAttentionError
from attnprobe.geometry.head import HeadValues, grouped, heads_of
from attnprobe.preserve import preserved
from attnprobe.probe import patterns
from attnprobe.record import AttentionRecord


def values_of(
    model: nn.Module,
    closure: Callable[[], Any],
    *,
    layers: str | Iterable[str] = "*",
    token_mask: Tensor | None = None,
    limit: int = 1000,
) -> dict[str, HeadValues]:
    """Value vectors by head on what ``closure`` runs, in the order of first sight.

    Queries, keys and values of the chosen layers are kept for as long as the result is. Wrap the call in
    ``torch.no_grad()`` to save memory where the closure needs no gradients.

    Args:
        model: the model that the closure runs; in evaluation mode, or weights are those before dropout.
        closure: runs the forward pass; it may call ``backward`` as well. Of several forward passes the first counts.
        layers: glob patterns of module names.
        token_mask: ``[B, T]``, true or non-zero for real tokens; None to derive it from the attention masks.
        limit: at most so many values per head.

    Returns:
        Name -> values; a name is ``layer:head``, and where query heads share values ``layer:first-last``. The model's
        gradients, buffers and training mode and torch's random state are as before.

    Raises:
        NoAttentionError: no attention was seen that can be looked into.
        UnknownNameError: a pattern names nothing.
        ConfigurationError: a limit below 1, or a token mask that fits no layer.
    """
    watched = patterns(model, "layers", layers)
    if limit < 1:
        raise ConfigurationError(f"limit must be at least 1, got {limit!r}")
    session = Session(model, _kept, layers=watched, forward_only=True, strict=True)
    session.tokens = None if token_mask is None else token_mask.detach().bool()
    with apart(model), preserved(model):
        session.start()
        try:
            closure()
        finally:
            session.stop()
    calls: dict[str, AttentionRecord] = {}
    missing: dict[str, str] = {}
    for layer, seen in _by_layer(session.seen):
        if seen.result is not None:
            calls.setdefault(layer, seen.result)
        elif seen.reason:
            missing[layer] = seen.reason
    if not calls:
        only = "" if "*" in watched else f"; layers other than {', '.join(map(repr, watched))} are not watched"
        reasons = "; ".join(f"{layer}: {reason}" for layer, reason in missing.items())
        raise NoAttentionError(reasons or NOTHING.format(model=type(model).__name__, only=only))
    for layer, reason in missing.items():
        warnings.warn(f"attnprobe: {layer}: {reason}", AttnProbeWarning, stacklevel=2)
    if token_mask is not None and all(c.query_tokens is None and c.key_tokens is None for c in calls.values()):
        raise ConfigurationError(f"token_mask has shape {[*token_mask.shape]}, which fits the tokens of no layer")
    heads = [head for layer, call in calls.items() for head in heads_of(layer, call, limit)]
    return {head.name: head for head in heads}


def _kept(module: str, record: AttentionRecord) -> AttentionRecord | None:
    """Copies, for what the model made it may write over; without what weights do not need."""
    if 0 in record.shape:
        return None
    record = grouped(record)
    copies: dict[str, Any] = {
        name: None if tensor is None else tensor.clone()
        for name, tensor in ((name, getattr(record, name)) for name in ("query", "key", "value", "logits", "sink"))
    }
    return replace(record, **copies, output=None, dropout=0.0, kept=None, logsumexp=None)


def _by_layer(seen: list[Seen]) -> list[tuple[str, Seen]]:
    calls = sorted(seen, key=lambda call: (call.rank, call.index))
    repeated = {call.module for call in calls if call.index}
    return [(f"{call.module}#{call.index}" if call.module in repeated else call.module, call) for call in calls]
