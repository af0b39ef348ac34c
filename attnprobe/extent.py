"""How much of each attention call is measured."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from attnprobe.errors import ConfigurationError
from attnprobe.record import AttentionRecord
from attnprobe.statistics.reduce import Partial
from attnprobe.statistics.sampling import LEAST
from attnprobe.statistics.subset import some_heads

#: Partial results of a whole layer.
_OF_LAYER = ("entropy_8.", "shared_dead_columns.", "masked_rows.")


@dataclass(frozen=True)
class Extent:
    """All of it, unless told otherwise.

    Args:
        rows: so many queries of each sequence, drawn anew for each call; what they say of all is an estimate.
        exact_routing: take all queries for what needs no errors, and so only part of the time.
        heads: numbers of the heads to measure in every layer.
        sequences: how many sequences to measure, from the first.

    Raises:
        ConfigurationError: a number that makes no sense.
    """

    rows: int | None = None
    exact_routing: bool = False
    heads: tuple[int, ...] | None = None
    sequences: int | None = None

    @classmethod
    def of(cls, rows: object, exact_routing: bool, heads: object, sequences: object) -> Extent:
        """From a user's options."""
        for name, given, least in (("rows", rows, LEAST), ("sequences", sequences, 1)):
            if given is not None and not (_whole(given) and int(given) >= least):  # type: ignore[call-overload]
                raise ConfigurationError(f"{name} must be None or a whole number of at least {least}, got {given!r}")
        if exact_routing and rows is None:
            raise ConfigurationError("exact_routing=True is about a sample of the rows: it needs rows=")
        if heads is None:
            return cls(rows, exact_routing, None, sequences)  # type: ignore[arg-type]
        chosen = tuple(heads) if isinstance(heads, Iterable) and not isinstance(heads, str) else (heads,)
        if not chosen or not all(_whole(head) and head >= 0 for head in chosen):
            raise ConfigurationError(f"heads must be numbers of heads, from 0, got {heads!r}")
        return cls(rows, exact_routing, tuple(sorted(set(chosen))), sequences)  # type: ignore[arg-type]

    def part(self, record: AttentionRecord) -> AttentionRecord:
        """What of a call is to be measured, as a call of its own."""
        if self.heads is None and self.sequences is None:
            return record
        return some_heads(record, self._heads(record.shape[1]), self.sequences)

    def whole(self, partial: Partial, heads: int) -> Partial:
        """Partial results of a part as those of all ``heads`` of the layer, of which the others have none."""
        if self.heads is None:
            return partial
        chosen = torch.tensor(self._heads(heads), dtype=torch.long, device="cpu")
        return {
            key: _of_part(key, value, len(chosen) == heads)
            if key.startswith(_OF_LAYER)
            else _spread(key, value, chosen, heads)
            for key, value in partial.items()
        }

    def _heads(self, heads: int) -> list[int]:
        return [head for head in self.heads if head < heads] if self.heads is not None else [*range(heads)]


def _of_part(key: str, value: Tensor, whole: bool) -> Tensor:
    """Nothing is said of a layer from some of its heads, but how many rows are masked."""
    return value if whole or key == "masked_rows.sum" else torch.full_like(value, torch.nan)


def _spread(key: str, value: Tensor, chosen: Tensor, heads: int) -> Tensor:
    nothing = -torch.inf if key.endswith(".max") else torch.nan if key.startswith("nonfinite") else 0.0
    chosen = chosen.to(value.device)
    if key == "output.gram":
        spread = value.new_zeros(heads, heads, *value.shape[2:])
        spread[chosen[:, None], chosen] = value
        return spread
    spread = value.new_full((heads, *value.shape[1:]), nothing)
    spread[chosen] = value
    return spread


def _whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)
