"""Snapshots of the same points in one basis, so that no flip or rotation of a PCA passes for movement."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from sklearn.decomposition import PCA

from attnprobe.errors import ConfigurationError, UnknownNameError
from attnprobe.geometry.points import Array, Numbers, as_points, varies
from attnprobe.report import StepReport


@dataclass(frozen=True, eq=False)
class Trajectory:
    """Where points were at several steps, in one basis.

    Attributes:
        steps: the snapshots' steps.
        points: ``[steps, n, K]``, coordinates, in the units of the points.
        shares: ``[steps]``, how much of each snapshot's own variance lies in the basis; NaN where it has none.
        axes: ``[K, E]``, the basis, orthonormal.
        centre: ``[E]``, the origin of the coordinates.
    """

    steps: tuple[int, ...]
    points: Array
    shares: Array
    axes: Array
    centre: Array


def common_basis(
    snapshots: Iterable[Numbers],
    components: int = 2,
    *,
    fit: Literal["last", "all"] = "last",
    steps: Sequence[int] | None = None,
) -> Trajectory:
    """Snapshots of the same points in the principal components of the last one, or of all of them.

    Args:
        snapshots: ``[steps, n, E]``, or as many ``[n, E]``; row ``i`` is the same point in each.
        components: ``K``, at most ``min(n, E)``.
        fit: where the components come from: ``"last"`` shows how the final picture came about, ``"all"`` loses the
            least of the whole movement.
        steps: what the snapshots are called; 0, 1, ... if None.

    Raises:
        ConfigurationError: NaN or Inf; shapes that differ; an option that cannot work; no variance to fit to.
    """
    arrays = [as_points(points, f"snapshot {i}") for i, points in enumerate(snapshots)]
    shapes = {array.shape for array in arrays}
    if len(shapes) != 1:
        raise ConfigurationError(f"snapshots must be of the same points, all of one shape [n, E], got {sorted(shapes)}")
    if fit not in ("last", "all"):
        raise ConfigurationError(f"fit must be 'last' or 'all', got {fit!r}")
    if not 1 <= components <= min(arrays[0].shape):
        raise ConfigurationError(f"components must be 1 to {min(arrays[0].shape)} for such points, got {components!r}")
    named = tuple(range(len(arrays)) if steps is None else steps)
    if len(named) != len(arrays):
        raise ConfigurationError(f"steps must name each of the {len(arrays)} snapshots, got {len(named)}")
    fitted = arrays[-1] if fit == "last" else np.concatenate(arrays)
    if not varies(fitted):
        raise ConfigurationError(f"there is no basis: the points have no variance (fit={fit!r})")
    found = PCA(components, svd_solver="full").fit(fitted)
    axes: Array = found.components_
    return Trajectory(
        steps=named,
        points=np.stack([(array - found.mean_) @ axes.T for array in arrays]),
        shares=np.array([_share(array, axes) for array in arrays]),
        axes=axes,
        centre=found.mean_,
    )


def trajectory(
    reports: Iterable[StepReport],
    layer: str,
    head: int,
    components: int = 2,
    *,
    fit: Literal["last", "all"] = "last",
) -> Trajectory:
    """How one head's values moved in training, from the pictures (``maps=``) in its reports; others are passed over.

    A picture shows the first sequence of its own batch: positions are tokens only where that sequence is the same at
    every probe. Where it is not, take ``values_of`` on a batch that is, and ``common_basis``.

    Args:
        reports: of one run, in its order.
        layer, head: as in ``HeadMap``.
        components, fit: as for ``common_basis``.

    Raises:
        UnknownNameError: no report has a picture of that head.
        ConfigurationError: as for ``common_basis``, or pictures of different positions.
    """
    pictures = [(report.step, picture) for report in reports for picture in report.maps]
    chosen = [(step, picture) for step, picture in pictures if (picture.layer, picture.head) == (layer, head)]
    if not chosen:
        known = {f"{picture.layer}:{picture.head}" for _, picture in pictures}
        raise UnknownNameError.among("head with pictures (maps=)", f"{layer}:{head}", known)
    if len({picture.positions for _, picture in chosen}) > 1:
        raise ConfigurationError(f"the pictures of {layer}:{head} show different positions: sequences differ in length")
    steps = [step for step, _ in chosen]
    return common_basis([picture.values for _, picture in chosen], components, fit=fit, steps=steps)


def _share(points: Array, axes: Array) -> float:
    if not varies(points):
        return float("nan")
    centred = points - points.mean(0)
    return float(np.sum((centred @ axes.T) ** 2) / np.sum(centred**2))
