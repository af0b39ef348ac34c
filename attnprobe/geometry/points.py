"""What users hand over as points, checked once: float64 numpy, finite, of the right shape."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from attnprobe.errors import ConfigurationError

Array: TypeAlias = NDArray[np.float64]
Labels: TypeAlias = NDArray[np.int64]
Numbers: TypeAlias = Tensor | ArrayLike

#: A spread below this share of the numbers' size is rounding, not variance (float32 resolves 1.2e-7).
ROUNDING = 1e-6


def as_points(given: Numbers, name: str = "points") -> Array:
    """``[n, E]``.

    Raises:
        ConfigurationError: another shape, no point at all, or NaN or Inf in a row.
    """
    points = as_floats(given, name)
    if points.ndim != 2 or 0 in points.shape:
        raise ConfigurationError(f"{name} must have shape [n, E], one row per point, got {[*points.shape]}")
    _refuse_nonfinite(np.isfinite(points).all(axis=1), name)
    return points


def as_variable(given: Numbers, n: int, name: str) -> Array:
    """``[n]``, one number per point.

    Raises:
        ConfigurationError: another shape, or NaN or Inf.
    """
    variable = as_floats(given, name)
    if variable.shape != (n,):
        raise ConfigurationError(f"{name} must be one number for each of the {n} points, got shape {[*variable.shape]}")
    _refuse_nonfinite(np.isfinite(variable), name)
    return variable


def as_labels(given: Numbers, name: str) -> Labels:
    """Whole numbers, of any shape.

    Raises:
        ConfigurationError: other numbers.
    """
    labels = np.asarray(given.detach().cpu() if isinstance(given, Tensor) else given)
    if labels.dtype.kind not in "iub":
        raise ConfigurationError(f"{name} must be whole numbers, got {labels.dtype}")
    return labels.astype(np.int64)


def varies(numbers: Array) -> bool:
    """Whether ``[n]`` or ``[n, E]`` numbers differ from their mean by more than rounding."""
    deviation = np.sqrt(np.mean((numbers - numbers.mean(0)) ** 2))
    return bool(deviation > ROUNDING * np.abs(numbers).max())


def as_floats(given: Numbers, name: str) -> Array:
    """Of any shape, finite or not."""
    try:
        return np.asarray(given.detach().cpu().double() if isinstance(given, Tensor) else given, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"{name} must be an array of numbers: {error}") from None


def _refuse_nonfinite(finite: Any, name: str) -> None:
    if not finite.all():
        raise ConfigurationError(
            f"{name} has NaN or Inf in {int((~finite).sum())} of {len(finite)} rows, first in row "
            f"{int(finite.argmin())}: find out where they come from (report.nonfinite counts them by layer and head) "
            "or leave these rows out"
        )
