"""How well a variable of the task can be read off points linearly."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from sklearn.model_selection import GroupKFold, KFold, cross_val_predict
from sklearn.pipeline import make_pipeline

from attnprobe.errors import ConfigurationError
from attnprobe.geometry.points import Numbers, as_labels, as_points, as_variable, varies


@dataclass(frozen=True)
class LinearFit:
    """A linear regression of a variable on points.

    Attributes:
        r2: on the points that it was fitted to; it rises with every component, also without any relation.
        r2_cv: on points left out of the fit; below 0 where the mean of the variable would have been the better guess.
        pc1: ``|r|``, Pearson correlation of the variable with the first principal component, whose sign means nothing.
        reason: why numbers are NaN; ``""`` where none is.
    """

    r2: float = math.nan
    r2_cv: float = math.nan
    pc1: float = math.nan
    reason: str = ""


def linear_fit(
    points: Numbers,
    variable: Numbers,
    *,
    components: int | None = None,
    folds: int = 5,
    groups: Numbers | None = None,
    seed: int = 0,
) -> LinearFit:
    """Fit ``variable`` to the points, or to their first principal components.

    Args:
        points: ``[n, E]``.
        variable: ``[n]``.
        components: so many principal components, found anew in each fold; None for the points as they are.
        folds: of the cross-validation.
        groups: ``[n]`` whole numbers; points of one group are left out together. Give it where points repeat each
            other (the same symbol at many positions), which would otherwise be on both sides.
        seed: of the order in which points are dealt to folds without groups.

    Raises:
        ConfigurationError: NaN or Inf, a shape or an option that cannot work.
    """
    points = as_points(points)
    variable = as_variable(variable, len(points), "variable")
    if folds < 2:
        raise ConfigurationError(f"folds must be at least 2, got {folds!r}")
    if components is not None and not 1 <= components <= min(points.shape):
        raise ConfigurationError(f"components must be None or 1 to {min(points.shape)}, got {components!r}")
    together = None if groups is None else as_labels(groups, "groups")
    if together is not None and together.shape != variable.shape:
        raise ConfigurationError(f"groups must be one number for each of the {len(points)} points")
    if not varies(variable):
        return LinearFit(reason="undefined: the variable does not vary")
    if not varies(points):
        return LinearFit(reason="undefined: the points do not vary")

    line = LinearRegression()
    model = line if components is None else make_pipeline(PCA(components, svd_solver="full"), line)
    r2 = float(model.fit(points, variable).score(points, variable))
    first = PCA(1, svd_solver="full").fit_transform(points)[:, 0]
    pc1 = abs(float(np.corrcoef(first, variable)[0, 1]))
    blocks = len(points) if together is None else len(np.unique(together))
    what = "points" if together is None else "groups"
    few = LinearFit(r2, pc1=pc1, reason=f"not cross-validated: {blocks} {what} are too few for {folds} folds")
    if blocks < folds:
        return few
    split = KFold(folds, shuffle=True, random_state=seed) if together is None else GroupKFold(folds)
    parts = list(split.split(points, groups=together))
    if components is not None and components > min(len(fitted) for fitted, _ in parts):
        return few
    # One R^2 of all predictions together: in a fold of its own a handful of points has hardly any variance.
    return LinearFit(r2, float(r2_score(variable, cross_val_predict(model, points, variable, cv=parts))), pc1)
