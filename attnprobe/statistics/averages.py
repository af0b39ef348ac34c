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

    def mean(self, name: str, values: Tensor, where: Tensor, power: int = 0) -> None:
        """Sum and count over the rows ``where``; ``values`` are times ``unit ** power``."""
        if name in self.wanted:
            group = self._groups.setdefault(id(where), _Group(where))
            group.names.append(name)
            group.values.append(values)
            group.powers.append(power)

    def largest(self, name: str, values: Tensor, where: Tensor, power: int = 0) -> None:
        """Maximum over the rows ``where``."""
        if name in self.wanted:
            each = torch.where(where, values, -torch.inf).amax(-1).double() / self.unit**power
            self._largest[f"{name}.max"] = each.unflatten(0, (-1, self.heads)).amax(0)

    def partial(self) -> Partial:
        """``{name}.sum``, ``.count``, ``.max``, and for a sample the moments that ``reduce.finish_error`` needs."""
        result = dict(self._largest)
        for group in self._groups.values():
            result |= self._reduced(group)
        return result

    def _reduced(self, group: _Group) -> Partial:
        values = torch.where(group.where, torch.stack(group.values), 0)
        counts = group.where.to(values.dtype)
        if self._weight is not None:
            values, counts = values * self._weight, counts * self._weight
        scale = torch.stack([self.unit**-power for power in group.powers])
        sums, count = self._by_head(values.sum(-1).double() * scale), self._by_head(counts.sum(-1).double())
        result: Partial = {}
        for index, name in enumerate(group.names):
            result |= {f"{name}.sum": sums[index], f"{name}.count": count}
        if self.draws is not None:
            result |= self._moments(
                group.names, values[..., self.draws.certain :], counts[:, self.draws.certain :], scale
            )
        return result

    def _moments(self, names: list[str], values: Tensor, counts: Tensor, scale: Tensor) -> Partial:
        """Estimated variances and covariance of the sums and counts over drawn rows."""
        draws = values.shape[-1]
        values, counts = values.double() * scale[..., None], counts.double()
        values, counts = values - values.mean(-1, keepdim=True), counts - counts.mean(-1, keepdim=True)
        factor = draws / (draws - 1)
        products = {"yy": values * values, "yc": values * counts, "cc": (counts * counts).expand_as(values)}
        result: Partial = {}
        for moment, each in products.items():
            by_head = factor * self._by_head(each.sum(-1))
            result |= {f"{name}.{moment}": by_head[index] for index, name in enumerate(names)}
        return result

    def _by_head(self, values: Tensor) -> Tensor:
        """``[..., N]`` -> ``[..., H]``."""
        by_head: Tensor = values.unflatten(-1, (-1, self.heads)).sum(-2)
        return by_head
