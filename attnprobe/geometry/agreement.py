"""Whether queries that want the same read the same prototypes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnprobe.errors import ConfigurationError
from attnprobe.geometry.points import Array, Labels, Numbers, as_floats, as_labels


@dataclass(frozen=True, eq=False)
class Agreement:
    """What a query's group says about the prototypes that it reads.

    Attributes:
        table: ``[groups, C]``, attention of each group on each prototype, of sum 1: a joint distribution.
        groups: ``[groups]``, the groups' numbers.
        information: mutual information of group and prototype, nats; at most ``entropy``.
        entropy: of the groups, nats.
        purity: share of the attention that a prototype gets from the group it gets most from.
        chance_information, chance_purity: the same where the groups are dealt to the queries at random, on average.
    """

    table: Array
    groups: Labels
    information: float
    entropy: float
    purity: float
    chance_information: float
    chance_purity: float


def agreement(shares: Numbers, groups: Numbers, *, draws: int = 20, seed: int = 0) -> Agreement:
    """Compare what queries read with which group they belong to, such as their target.

    Args:
        shares: ``[..., C]``, one head of ``who_uses``; queries that are NaN are left out.
        groups: ``[...]`` whole numbers, one per query; queries of a negative group (an ignored target) are left out.
        draws, seed: of the random dealings.

    Raises:
        ConfigurationError: shapes that do not fit, no query left, or no draws.
    """
    parts = as_floats(shares, "shares")
    labels = as_labels(groups, "groups")
    if parts.ndim < 2 or labels.shape != parts.shape[:-1]:
        raise ConfigurationError(
            f"shares must have shape [..., C] and groups [...], got {[*parts.shape]} and {[*labels.shape]}"
        )
    parts, labels = parts.reshape(-1, parts.shape[-1]), labels.reshape(-1)
    counted = np.isfinite(parts).all(1) & (labels >= 0)
    if draws < 1:
        raise ConfigurationError(f"draws must be at least 1, got {draws!r}")
    if not counted.any() or parts[counted].sum() <= 0:
        raise ConfigurationError("no query has both a group and attention on a cluster")
    names, index = np.unique(labels[counted], return_inverse=True)
    marks = np.eye(len(names))[index]
    generator = np.random.default_rng(seed)
    table = _joint(marks, parts[counted])
    dealt = [_joint(generator.permutation(marks), parts[counted]) for _ in range(draws)]
    return Agreement(
        table=table,
        groups=names,
        information=_information(table),
        entropy=_entropy(table.sum(1)),
        purity=float(table.max(0).sum()),
        chance_information=float(np.mean([_information(each) for each in dealt])),
        chance_purity=float(np.mean([each.max(0).sum() for each in dealt])),
    )


def _joint(marks: Array, shares: Array) -> Array:
    table: Array = marks.T @ shares
    table /= table.sum()
    return table


def _information(table: Array) -> float:
    # scikit-learn's mutual_info_score takes whole numbers only.
    return max(0.0, _entropy(table.sum(0)) + _entropy(table.sum(1)) - _entropy(table))


def _entropy(shares: Array) -> float:
    some = shares[shares > 0]
    return max(0.0, -float(np.sum(some * np.log(some))))
