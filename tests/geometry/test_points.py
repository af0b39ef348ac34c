"""What is refused, and what is undefined."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from attnprobe import geometry
from attnprobe.errors import ConfigurationError

RNG = np.random.default_rng(0)
POINTS = RNG.normal(size=(12, 3))
TAKE_POINTS: list[Callable] = [
    geometry.spectrum,
    geometry.effective_dimension,
    geometry.participation_ratio,
    geometry.prototypes,
    geometry.random_baseline,
    lambda points: geometry.common_basis([points]),
    lambda points: geometry.linear_fit(points, np.arange(12)),
    lambda points: geometry.ring_fit(points, np.arange(12)),
]


@pytest.mark.parametrize("function", TAKE_POINTS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nonfinite_rows_are_refused_with_their_number(function: Callable, bad: float) -> None:
    points = POINTS.copy()
    points[5, 1] = points[7, 0] = bad
    with pytest.raises(ConfigurationError, match="NaN or Inf in 2 of 12 rows, first in row 5"):
        function(points)


@pytest.mark.parametrize("function", TAKE_POINTS)
@pytest.mark.parametrize("bad", [np.zeros(12), np.zeros((0, 3)), np.zeros((2, 3, 4)), [["a", "b"]]])
def test_other_things_than_points_are_refused(function: Callable, bad: object) -> None:
    with pytest.raises(ConfigurationError, match=r"\[n, E\]|array of numbers"):
        function(bad)


def test_torch_and_numpy_and_lists_are_the_same() -> None:
    tensor = torch.tensor(POINTS, requires_grad=True)
    np.testing.assert_array_equal(geometry.spectrum(tensor), geometry.spectrum(POINTS))
    np.testing.assert_array_equal(geometry.spectrum(POINTS.tolist()), geometry.spectrum(POINTS))
    assert math.isfinite(geometry.participation_ratio(torch.randn(9, 2).bfloat16()))


@pytest.mark.parametrize("points", [np.full((7, 3), 0.1), np.zeros((7, 3)), np.ones((1, 3))])
def test_without_variance_nothing_is_zero(points: np.ndarray) -> None:
    assert np.isnan(geometry.spectrum(points)).all()
    assert math.isnan(geometry.effective_dimension(points))
    assert math.isnan(geometry.participation_ratio(points))
    assert math.isnan(geometry.prototypes(points).share)
    assert len(geometry.prototypes(points).centres) == 1
    with pytest.raises(ConfigurationError, match="no variance"):
        geometry.common_basis([points], 1)


def test_rounding_is_no_variance() -> None:
    points = torch.full((50, 4), 3.7) * (1 + 1e-7 * torch.randn(50, 4))
    assert math.isnan(geometry.participation_ratio(points))


CALLS: list[tuple[str, Callable]] = [
    ("share", lambda: geometry.effective_dimension(POINTS, 0)),
    ("share", lambda: geometry.effective_dimension(POINTS, 1.1)),
    ("draws", lambda: geometry.random_baseline(POINTS, draws=0)),
    ("inputs", lambda: geometry.random_baseline(POINTS, inputs=POINTS[1:])),
    ("one shape", lambda: geometry.common_basis([POINTS, POINTS[1:]])),
    ("one shape", lambda: geometry.common_basis([])),
    ("fit", lambda: geometry.common_basis([POINTS], fit="first")),
    ("components", lambda: geometry.common_basis([POINTS], 4)),
    ("steps", lambda: geometry.common_basis([POINTS], steps=[1, 2])),
    ("variable", lambda: geometry.linear_fit(POINTS, np.arange(3))),
    ("variable has NaN", lambda: geometry.linear_fit(POINTS, np.full(12, np.nan))),
    ("components", lambda: geometry.linear_fit(POINTS, np.arange(12), components=4)),
    ("folds", lambda: geometry.linear_fit(POINTS, np.arange(12), folds=1)),
    ("groups", lambda: geometry.linear_fit(POINTS, np.arange(12), groups=np.arange(3))),
    ("whole numbers", lambda: geometry.linear_fit(POINTS, np.arange(12), groups=np.arange(12) / 2)),
    ("phase", lambda: geometry.ring_fit(POINTS, np.arange(3))),
    ("weights", lambda: geometry.ring_fit(POINTS, np.arange(12), weights="size")),
    ("count", lambda: geometry.prototypes(POINTS, 13)),
    ("count", lambda: geometry.prototypes(POINTS, 0)),
    ("most", lambda: geometry.prototypes(POINTS, most=1)),
    (r"\[\.\.\., 3\]", lambda: geometry.prototypes(POINTS, 2).assign(np.zeros((4, 2)))),
    ("values has NaN", lambda: geometry.prototypes(POINTS, 2).assign(np.full((4, 3), np.nan))),
    ("shares must", lambda: geometry.agreement(np.ones((4, 2)), np.arange(3))),
    ("draws", lambda: geometry.agreement(np.ones((4, 2)), np.arange(4), draws=0)),
    ("no query", lambda: geometry.agreement(np.full((4, 2), np.nan), np.arange(4))),
    ("no query", lambda: geometry.agreement(np.ones((4, 2)), np.full(4, -100))),
]


@pytest.mark.parametrize(("message", "call"), CALLS)
def test_options_that_cannot_work_are_refused(message: str, call: Callable) -> None:
    with pytest.raises(ConfigurationError, match=message):
        call()
