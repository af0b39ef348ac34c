"""Values as a few prototypes: clusters and their centres."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from sklearn.cluster import KMeans
from sklearn.metrics import pairwise_distances_argmin, silhouette_score

from attnprobe.errors import ConfigurationError
from attnprobe.geometry.points import Array, Labels, Numbers, as_floats, as_points, varies

#: Points of which silhouettes are computed: their cost is quadratic.
_SILHOUETTES = 1000


@dataclass(frozen=True, eq=False)
class Prototypes:
    """Clusters of points.

    Attributes:
        centres: ``[C, E]``.
        labels: ``[n]``, the cluster of each point.
        share: of the points' variance that lies between the clusters, 0 to 1; NaN for points without variance.
        silhouette: mean silhouette, -1 to 1: near 0 the clusters run into each other. NaN for one cluster, and where
            every point is a cluster.
    """

    centres: Array
    labels: Labels
    share: float
    silhouette: float

    def assign(self, values: Numbers) -> Labels:
        """Clusters ``[...]`` of any ``[..., E]`` values, by the nearest centre.

        Raises:
            ConfigurationError: NaN or Inf, or another width than the centres'.
        """
        given = as_floats(values, "values")
        width = self.centres.shape[1]
        if given.ndim < 1 or given.shape[-1] != width:
            raise ConfigurationError(f"values must have shape [..., {width}], got {[*given.shape]}")
        flat = as_points(given.reshape(-1, width), "values")
        nearest: Labels = pairwise_distances_argmin(flat, self.centres).reshape(given.shape[:-1])
        return nearest


def prototypes(values: Numbers, count: int | None = None, *, most: int = 10, seed: int = 0) -> Prototypes:
    """Clusters of values by k-means, the same in every run.

    Args:
        values: ``[n, E]``.
        count: ``C``; None for the number with the largest silhouette. That is never 1 where values differ: look at the
            silhouette before believing in clusters.
        most: largest number to try.
        seed: of the starts.

    Raises:
        ConfigurationError: NaN or Inf, or a number of clusters that cannot be had from so many different values.
    """
    points = as_points(values, "values")
    # Values that differ by rounding are one value.
    different = len(np.unique(points, axis=0)) if varies(points) else 1
    if count is not None and not 1 <= count <= different:
        raise ConfigurationError(f"count must be None or 1 to {different}, so many values are different; got {count!r}")
    if most < 2:
        raise ConfigurationError(f"most must be at least 2, got {most!r}")
    tries = [count] if count is not None else [*range(2, min(most, different, len(points) - 1) + 1)] or [different]
    found = [_clusters(points, number, seed) for number in tries]
    return max(found, key=lambda each: -math.inf if math.isnan(each.silhouette) else each.silhouette)


def _clusters(points: Array, count: int, seed: int) -> Prototypes:
    means = KMeans(count, n_init=10, random_state=seed).fit(points)
    total = float(np.sum((points - points.mean(0)) ** 2))
    silhouette = math.nan
    if 2 <= count < len(points):
        some = np.linspace(0, len(points) - 1, min(len(points), _SILHOUETTES)).round().astype(int)
        if 2 <= len(np.unique(means.labels_[some])) < len(some):
            silhouette = float(silhouette_score(points[some], means.labels_[some]))
    share = 1 - float(means.inertia_) / total if varies(points) else math.nan
    return Prototypes(means.cluster_centers_, means.labels_.astype(np.int64), share, silhouette)
