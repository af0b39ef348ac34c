"""Lengths of the vectors of a call, and its errors as the pass over the weights wants them."""

from __future__ import annotations

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

    def measure(self, items: Items) -> None:
        """Fill in the lengths of everything but errors."""
        record = self.record
        tensors = {"query": record.query, "key": record.key, "value": record.value, "output": record.output}
        for name, tensor in tensors.items():
            if tensor is not None:
                vectors = self.scores.select(tensor, items)
                length = torch.linalg.vector_norm(vectors, dim=-1, dtype=self.scores.dtype)
                self.length[name][items.index] = length.flatten(0, 1)

    def errors(self, items: Items) -> Tensor | None:
        """``[n, T, E]`` times ``unit``; rows that do not count are 0, whatever garbage they hold."""
        if self.record.error is None:
            return None
        index = items.index
        error = self.scores.take(self.record.error, items)
        self.largest[index] = torch.maximum(error.amax((1, 2)), -error.amin((1, 2)))
        exponent = torch.frexp(self.largest[index])[1].clamp(-100, 100)  # NaN, Inf and 0 have none to speak of
        unit = torch.ldexp(torch.ones_like(self.largest[index]), -exponent)
        error = error * unit[:, None, None]
        centre = (error * self.scores.take(self.record.output, items)).sum(-1)
        if not self._complete:
            outside = ~self._rows[index]
            error.masked_fill_(outside[..., None], 0)
            centre.masked_fill_(outside, 0)
        length = torch.linalg.vector_norm(error, dim=-1)
        self.unit[index], self.centre[index], self.length["error"][index] = unit.double(), centre, length
        self.direction[index] = (torch.where(length > 0, 1 / length, 0)[:, None] @ error)[:, 0]
        return error

    def values(self, items: Items) -> Tensor:
        """``[n, S, E]``; those that no query sees are 0: they must not reach a sum through ``0 * NaN``."""
        value = self.scores.take(self.record.value, items)
        if self._complete:
            return value
        unseen = ~self._keys_seen[items.batches].repeat_interleave(items.number, 0)
        return value.masked_fill(unseen[..., None], 0)
