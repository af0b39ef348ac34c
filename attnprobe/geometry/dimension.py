"""How many dimensions a cloud of points takes up."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from sklearn.decomposition import PCA

from attnprobe.errors import ConfigurationError
from attnprobe.geometry.points import Array, Numbers, as_points, varies

#: That much of the variance may be rounding.
_SLACK = 1e-12


def spectrum(points: Numbers) -> Array:
    """Shares of the variance on the principal components, ``[min(n, E)]``, falling, of sum 1.

    NaN throughout for points without variance. Points are centred, so ``n`` of them span ``n - 1`` dimensions at most.

    Args:
        points: ``[n, E]``.

    Raises:
        ConfigurationError: NaN or Inf, or another shape.
    """
    points = as_points(points)
    if not varies(points):
        return np.full(min(points.shape), np.nan)
    shares: Array = PCA(svd_solver="full").fit(points).explained_variance_ratio_
    return shares


def effective_dimension(points: Numbers, share: float = 0.9) -> float:
    """How many principal components hold ``share`` of the variance; NaN for points without variance.

    Args:
        points: ``[n, E]``.
        share: above 0, at most 1.

    Raises:
        ConfigurationError: as for ``spectrum``, or an impossible share.
    """
    if not 0 < share <= 1:
        raise ConfigurationError(f"share must lie above 0 and be at most 1, got {share!r}")
    shares = spectrum(points)
    if np.isnan(shares[0]):
        return float("nan")
    return float(1 + np.searchsorted(shares.cumsum()[:-1], share - _SLACK))


def participation_ratio(points: Numbers) -> float:
    """``(sum l)^2 / sum l^2`` of the variances ``l`` on the principal components; NaN for points without variance.

    1 for points on a line, ``E`` for a round cloud; unlike ``effective_dimension`` it has no threshold.

    Args:
        points: ``[n, E]``.

    Raises:
        ConfigurationError: as for ``spectrum``.
    """
    return float(1 / np.sum(spectrum(points) ** 2))


def random_baseline(
    points: Numbers,
    measure: Callable[[Array], float] = effective_dimension,
    *,
    inputs: Numbers | None = None,
    draws: int = 20,
    seed: int = 0,
) -> Array:
    """What ``measure`` gives on random points of the same shape, ``[draws]``: to hold a measured number against.

    Args:
        points: ``[n, E]``; only the shape counts.
        measure: any function of ``[n, E]`` points that returns a number, ``participation_ratio`` or
            ``lambda points: ring_fit(points, phase).r2`` as well.
        inputs: ``[n, N]``, what the values are computed from: random points are then ``inputs @ W`` with a Gaussian
            ``W``, as at random initialisation. None: independent Gaussian points.
        draws: how many.
        seed: of numpy's generator; torch's random state is not touched.

    Raises:
        ConfigurationError: as for ``spectrum``; inputs of another ``n``; no draws.
    """
    n, width = as_points(points).shape
    if draws < 1:
        raise ConfigurationError(f"draws must be at least 1, got {draws!r}")
    given = None if inputs is None else as_points(inputs, "inputs")
    if given is not None and len(given) != n:
        raise ConfigurationError(f"inputs must be one row for each of the {n} points, got {len(given)}")
    generator = np.random.default_rng(seed)

    def draw() -> Array:
        if given is None:
            return generator.standard_normal((n, width))
        return given @ generator.standard_normal((given.shape[1], width))

    return np.array([measure(draw()) for _ in range(draws)], dtype=np.float64)
