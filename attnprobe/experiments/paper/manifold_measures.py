"""The geometry of one head's values and outputs on a sequence whose hidden symbols are known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from attnprobe.experiments.markov.task import SYMBOLS, Protocol, Sequence, predictive, transitions
from attnprobe.geometry import (
    LinearFit,
    agreement,
    common_basis,
    effective_dimension,
    linear_fit,
    participation_ratio,
    prototypes,
    ring_fit,
)

#: Targets before this one are left out: their outputs, means of a few values, would have most of the variance.
FIRST = 50
#: Neighbouring outputs read nearly the same keys, so blocks of that many targets are left out of a fit together.
BLOCK = 50


@dataclass(frozen=True)
class Known:
    """What is known of the positions from ``FIRST`` on, ``[n]`` where nothing else is said.

    Attributes:
        symbol: behind the observation.
        target: the next symbol.
        entropy: of the best possible prediction of the target from all observations up to now, nats.
        stay: how likely the symbol stays.
        loss: of the best possible prediction, nats.
        symbol_entropy: ``[8]``, of the next symbol after each, for one who knows it.
    """

    symbol: Tensor
    target: Tensor
    entropy: Tensor
    stay: Tensor
    loss: Tensor
    symbol_entropy: Tensor

    @classmethod
    def of(cls, protocol: Protocol, sequence: Sequence) -> Known:
        """Of a sequence, by the forward algorithm."""
        best, chain = predictive(protocol, sequence)[FIRST:], transitions(protocol)
        symbol, target = sequence.z[FIRST:], sequence.y[FIRST:]
        return cls(
            symbol,
            target,
            entropy=torch.special.entr(best).sum(-1),
            stay=chain.diagonal()[symbol],
            loss=-best.gather(1, target[:, None])[:, 0].log(),
            symbol_entropy=torch.special.entr(chain).sum(-1),
        )


def geometry_of(values: Tensor, means: Tensor, attention: Tensor, known: Known, first: Tensor) -> dict[str, float]:
    """All that is measured of one head; NaN where undefined.

    Args:
        values: ``[T, E]``.
        means: ``[8, E]``, the values of the symbols as they are without noise, which are their class means.
        attention: ``[T, T]``.
        known: of these positions.
        first: the values before training.
    """
    outputs, of_first = (attention @ values)[FIRST:], (attention @ first)[FIRST:]
    # The last bit of a sum on many threads depends on how many there are.
    with threadpool_limits(1):
        found = _dimensions({"values": values, "symbols": means, "outputs": outputs})
        for name, points, symbol in (
            ("symbols", means, torch.arange(SYMBOLS)),
            ("outputs", outputs, known.symbol),
            ("first", of_first, known.symbol),
        ):
            ring = ring_fit(points, 2 * math.pi * symbol / SYMBOLS)
            found |= {f"ring/{name}": ring.r2, f"order/{name}": ring.order}
        for name, points in (("values", values[FIRST:]), ("outputs", outputs)):
            found |= _readable(f"entropy/{name}", points, known.entropy, known.symbol)
            found[f"entropy/{name}/others"] = _without_most_frequent(points, known)
            found[f"stay/{name}"] = blockwise(points, known.stay).r2_cv
        # Each symbol once: with the frequent ones' weight PC1 is about the symbol that is there half of the time.
        found["entropy/symbols/r"] = linear_fit(means, known.symbol_entropy).pc1
        return found | _prototypes(values, attention, known)


def _dimensions(clouds: dict[str, Tensor]) -> dict[str, float]:
    return {f"components/{name}": effective_dimension(points) for name, points in clouds.items()} | {
        f"participation/{name}": participation_ratio(points) for name, points in clouds.items()
    }


def blockwise(points: Tensor, variable: Tensor, components: int | None = None) -> LinearFit:
    """A linear fit, cross-validated on blocks of neighbouring targets."""
    return linear_fit(points, variable, components=components, groups=torch.arange(len(points)) // BLOCK)


def _readable(name: str, points: Tensor, variable: Tensor, symbol: Tensor) -> dict[str, float]:
    one = blockwise(points, variable, 1)
    return {
        f"{name}/r": one.pc1,
        f"{name}/1": one.r2_cv,
        f"{name}/2": blockwise(points, variable, 2).r2_cv,
        f"{name}/all": blockwise(points, variable).r2_cv,
        f"{name}/new symbols": linear_fit(points, variable, groups=symbol).r2_cv,
    }


def _without_most_frequent(points: Tensor, known: Known) -> float:
    """``|r|`` of the entropy with PC1 of all points, over the targets that do not follow the most frequent symbol.

    The chain that stays longest at a symbol makes PC1 the difference between that one, of low entropy, and the others.
    """
    if math.isnan(participation_ratio(points)):
        return math.nan
    first = torch.from_numpy(common_basis([points], 1).points[0, :, 0])
    others = known.symbol != known.symbol.mode().values
    return linear_fit(first[others, None], known.entropy[others]).pc1


def _prototypes(values: Tensor, attention: Tensor, known: Known) -> dict[str, float]:
    """As many clusters as symbols; how far symbols, queries and targets can be told from them (0 to 1, 0 by chance)."""
    found = prototypes(values, SYMBOLS)
    marks = torch.eye(SYMBOLS)[torch.from_numpy(found.labels)].to(attention)
    read = (attention @ marks)[FIRST:]
    return {
        "prototypes/share": found.share,
        "prototypes/silhouette": found.silhouette,
        "prototypes/symbol": told(marks[FIRST:], known.symbol),
        "prototypes/read by symbol": told(read, known.symbol),
        "prototypes/read by target": told(read, known.target),
    }


def told(shares: Tensor, groups: Tensor) -> float:
    """Mutual information above that of random dealings, relative to the most there can be."""
    found = agreement(shares, groups)
    chance = found.chance_information
    return (found.information - chance) / (found.entropy - chance)
