"""Lengths of the vectors of a call, and its errors as the pass over the weights wants them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnprobe.statistics.scores import Items, Scores


class Vectors:
    """What can be said of each query, key, value, output and error by itself.

    Attributes:
        length: by name, ``[N, T]`` or ``[N, S]``; ``error`` is times ``unit``, and 0 in rows that do not count.
        centre: ``[N, T]``, ``u . o`` times ``unit``.
        unit: ``[N]`` float64, the power of two that makes the item's errors about 1, whose squares neither vanish
            nor overflow.
        largest: ``[N]``, largest element of the errors; NaN or Inf where one is.
        direction: ``[N, E]``, sum of the errors' unit vectors.

    Args:
        rows: ``[N, T]``, queries that count.
        keys_seen: ``[B, S]``, keys that some query sees.
        complete: whether all do.
    """

    def __init__(self, scores: Scores, rows: Tensor, keys_seen: Tensor, *, complete: bool) -> None:
        self.scores, self.record = scores, scores.record
        self._rows, self._keys_seen, self._complete = rows, keys_seen, complete
        count, zeros = scores.count, rows.new_zeros(rows.shape, dtype=scores.dtype)
        self.length = {"query": zeros, "output": zeros.clone(), "error": zeros.clone()}
        self.length |= {name: zeros.new_zeros(count, scores.keys) for name in ("key", "value")}
        self.centre, self.largest = zeros.clone(), zeros.new_zeros(count)
        self.direction = zeros.new_zeros(count, self.record.value.shape[-1])
        self.unit = zeros.new_ones(count, dtype=torch.float64)

    def measure(self, items: Items, *, queries: bool) -> None:
        """Fill in lengths; ``scores_of`` brings those of ``queries`` along, ``errors`` those of outputs."""
        record = self.record
        tensors = {"key": record.key, "value": record.value}
        if queries:
            tensors["query"] = record.query
        if record.error is None:
            tensors["output"] = record.output
        for name, tensor in tensors.items():
            if tensor is not None:
                self.length[name][items.index] = _lengths(self.scores.take(tensor, items))

    def scores_of(self, items: Items, key: Tensor) -> tuple[Items, Tensor]:
        """The items with queries and keys, and the scores ``[n, T]`` of the key number ``key`` ``[n]``."""
        record, scores = self.record, self.scores
        query, keys = scores.take(record.query, items), scores.take(record.key, items)
        chosen = keys.gather(1, key[:, None, None].expand(-1, 1, keys.shape[-1]))
        factor = torch.full((len(query),), scores.factor, dtype=scores.dtype, device=scores.device)
        scaled, length, found = _scaled(query, factor, chosen)
        self.length["query"][items.index] = length / abs(scores.factor) if scores.factor else _lengths(query)
        return replace(items, query=scaled, key=keys), found

    def errors(self, items: Items) -> Tensor | None:
        """``[n, T, E]`` times ``unit``; rows that do not count are 0, whatever garbage they hold."""
        if self.record.error is None:
            return None
        index = items.index
        error, output = self.scores.take(self.record.error, items), self.scores.take(self.record.output, items)
        self.largest[index] = torch.maximum(error.amax((1, 2)), -error.amin((1, 2)))
        exponent = torch.frexp(self.largest[index])[1].clamp(-100, 100)  # NaN, Inf and 0 have none to speak of
        unit = (1023 - exponent.long() << 52).view(torch.float64)  # 2^-exponent, which torch.ldexp takes its time for
        error, length, centre = _scaled(error, unit.to(error.dtype), output)
        self.length["output"][index] = _lengths(output)
        if not self._complete:
            outside = ~self._rows[index]
            error.masked_fill_(outside[..., None], 0)
            length.masked_fill_(outside, 0)
            centre.masked_fill_(outside, 0)
        self.unit[index], self.centre[index], self.length["error"][index] = unit, centre, length
        self.direction[index] = (torch.where(length > 0, 1 / length, 0)[:, None] @ error)[:, 0]
        return error

    def values(self, items: Items) -> Tensor:
        """``[n, S, E]``; those that no query sees are 0: they must not reach a sum through ``0 * NaN``."""
        value = self.scores.take(self.record.value, items)
        if self._complete:
            return value
        unseen = ~self._keys_seen[items.batches].repeat_interleave(items.number, 0)
        return value.masked_fill(unseen[..., None], 0)


def _scaled(vectors: Tensor, factor: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[n, T, D]`` times ``factor`` ``[n]``, its lengths, and its products with ``other``, ``[n, T]``."""
    vectors = vectors * factor[:, None, None]
    return vectors, _lengths(vectors), (vectors * other).sum(-1)


def _lengths(vectors: Tensor) -> Tensor:
    """``[n, T]`` of ``[n, T, D]``."""
    length: Tensor = torch.linalg.vector_norm(vectors, dim=-1)
    return length
