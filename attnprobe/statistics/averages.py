"""From one value for each row to the partial results of its statistic, for all statistics at once."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnprobe.statistics.reduce import Partial


@dataclass(frozen=True)
class Draws:
    """How the rows of a sample were chosen.

    Attributes:
        weight: ``[B, T]``, how many rows of the sequence each stands for: 1 for those taken for certain, which come
            first, and 1 / (number of draws * probability of a draw) for the others, drawn with replacement.
        certain: how many are taken for certain.
    """

    weight: Tensor
    certain: int


@dataclass
class _Group:
    """Values of several statistics over the same rows."""

    where: Tensor
    of_layer: bool
    names: list[str] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    powers: list[int] = field(default_factory=list)


class Averages:
    """Collects ``[N, T]`` values, ``N = B * H``; ``partial`` gives the sums over everything but the heads.

    Args:
        heads: ``H``.
        wanted: names of the statistics that are to be kept.
        unit: ``[N]``, what errors were multiplied by; a value may hold a power of it.
        draws: for a sample of the rows.
    """

    def __init__(self, heads: int, wanted: set[str], unit: Tensor, draws: Draws | None = None) -> None:
        self.heads, self.wanted, self.unit = heads, wanted, unit
        self.draws = draws
        self._weight = None if draws is None else draws.weight.repeat_interleave(heads, 0)
        self._groups: dict[int, _Group] = {}
        self._largest: Partial = {}

    def mean(self, name: str, values: Tensor, where: Tensor, power: int = 0, *, of_layer: bool = False) -> None:
        """Sum and count over the rows ``where``, and the heads if ``of_layer``; values are times ``unit ** power``."""
        if name in self.wanted:
            group = self._groups.setdefault(id(where), _Group(where, of_layer))
            group.names.append(name)
            group.values.append(values)
            group.powers.append(power)

    def largest(self, name: str, values: Tensor, where: Tensor, power: int = 0) -> None:
        """Maximum over the rows ``where``."""
        if name in self.wanted:
            each = torch.where(where, values, -torch.inf).amax(-1).double()
            each = each / self.unit**power if power else each
            self._largest[f"{name}.max"] = each.unflatten(0, (-1, self.heads)).amax(0)

    def partial(self) -> Partial:
        """``{name}.sum``, ``.count``, ``.max``, and for a sample the moments that ``reduce.finish_error`` needs."""
        result = dict(self._largest)
        for group in self._groups.values():
            result |= self._reduced(group)
        return result

    def _reduced(self, group: _Group) -> Partial:
        where, heads = group.where, self.heads
        everywhere = where.device.type == "cpu" and bool(where.all())  # elsewhere the answer would cost more
        values = group.values if everywhere else [torch.where(where, each, 0) for each in group.values]
        counts = where if self._weight is None else where * self._weight
        if self._weight is not None:
            values = [each * self._weight for each in values]
        scale = torch.stack([self.unit**-power if power else torch.ones_like(self.unit) for power in group.powers])
        if group.of_layer:  # whose heads have the rows in common
            values, counts, heads = [self._over_heads(each) for each in values], self._over_heads(counts), 1
            scale = scale[:, :: self.heads]
        result: Partial = {}
        sums = by_head(torch.stack([each.sum(-1) for each in values]).double() * scale, heads)
        count = by_head(counts.sum(-1).double(), heads)
        for index, name in enumerate(group.names):
            result |= {f"{name}.sum": sums[index], f"{name}.count": count}
        if self.draws is not None:
            drawn = slice(self.draws.certain, None)
            spread = torch.stack([each[..., drawn] for each in values]).double() * scale[..., None]
            for moment, each in _moments(spread, counts[:, drawn].double(), heads).items():
                result |= {f"{name}.{moment}": each[index] for index, name in enumerate(group.names)}
        return result

    def _over_heads(self, values: Tensor) -> Tensor:
        """``[..., N, T]`` -> ``[..., B, T]``."""
        total: Tensor = values.unflatten(-2, (-1, self.heads)).sum(-2)
        return total


def _moments(values: Tensor, counts: Tensor, heads: int) -> Partial:
    """Estimated variances and covariance of sums ``[K, N, draws]`` and counts ``[N, draws]`` over drawn rows."""
    draws = values.shape[-1]
    values, counts = values - values.mean(-1, keepdim=True), counts - counts.mean(-1, keepdim=True)
    products = {"yy": values * values, "yc": values * counts, "cc": (counts * counts).expand_as(values)}
    return {moment: draws / (draws - 1) * by_head(each.sum(-1), heads) for moment, each in products.items()}


def by_head(values: Tensor, heads: int) -> Tensor:
    """``[..., N]`` -> ``[..., heads]``, the sum over sequences."""
    total: Tensor = values.unflatten(-1, (-1, heads)).sum(-2)
    return total
