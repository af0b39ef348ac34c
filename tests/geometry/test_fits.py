"""Linear and ring fits against least squares written out, and against what is known."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.model_selection import KFold

from attnprobe import geometry

from ..reproducible import reproducible


def _r2(design: np.ndarray, target: np.ndarray, weight: np.ndarray | None = None) -> float:
    """Of an ordinary or a weighted least-squares fit with a constant."""
    weight = np.ones(len(design)) if weight is None else weight
    root = np.sqrt(weight)[:, None]
    design = np.column_stack([np.ones(len(design)), design])
    target = target.reshape(len(target), -1)
    left = target - design @ np.linalg.pinv(root * design) @ (root * target)
    mean = weight @ target / weight.sum()
    return 1 - (weight @ left**2).sum() / (weight @ (target - mean) ** 2).sum()


@given(st.integers(0, 2**31), st.integers(12, 60), st.integers(1, 6))
@reproducible(25)
def test_linear_fit_equals_least_squares(seed: int, n: int, width: int) -> None:
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n, width)) * np.arange(1, width + 1)
    variable = points @ rng.normal(size=width) + rng.normal(size=n)
    found = geometry.linear_fit(points, variable)
    assert found.r2 == pytest.approx(_r2(points, variable), abs=1e-9)
    first = np.linalg.svd(points - points.mean(0))[2][0]
    assert found.pc1 == pytest.approx(abs(np.corrcoef(points @ first, variable)[0, 1]), abs=1e-9)
    guess = np.zeros(n)
    for fit, left_out in KFold(5, shuffle=True, random_state=0).split(points):
        design = np.column_stack([np.ones(len(fit)), points[fit]])
        solved = np.linalg.lstsq(design, variable[fit], rcond=None)[0]
        guess[left_out] = solved[0] + points[left_out] @ solved[1:]
    expected = 1 - ((variable - guess) ** 2).sum() / ((variable - variable.mean()) ** 2).sum()
    assert found.r2_cv == pytest.approx(expected, abs=1e-9)
    assert found.reason == ""


def test_cross_validation_sees_through_chance() -> None:
    rng = np.random.default_rng(0)
    chance = geometry.linear_fit(rng.normal(size=(60, 40)), rng.normal(size=60))
    assert chance.r2 > 0.5 > 0 > chance.r2_cv
    # Eight symbols, many times each: only leaving out whole symbols tells that there is nothing to generalise from.
    symbol = np.arange(400) % 8
    points = rng.normal(size=(8, 7))[symbol] + 0.01 * rng.normal(size=(400, 7))
    variable = rng.normal(size=8)[symbol]
    assert geometry.linear_fit(points, variable).r2_cv > 0.99
    assert geometry.linear_fit(points, variable, groups=symbol).r2_cv < 0.5


def test_first_components() -> None:
    rng = np.random.default_rng(0)
    points = rng.normal(size=(600, 4)) * [10, 5, 1, 0.1]
    one, all_of_them = (geometry.linear_fit(points, points[:, 1], components=k) for k in (1, 4))
    assert one.r2 < 0.05
    assert one.r2 == pytest.approx(one.pc1**2)
    assert all_of_them.r2 == pytest.approx(1)
    assert all_of_them.r2_cv == pytest.approx(1)


def test_undefined_linear_fits() -> None:
    points = np.random.default_rng(0).normal(size=(20, 3))
    entropy = np.full(20, 1.8833) * (1 + 1e-8 * np.arange(20))  # of a circulant chain, as computed
    found = geometry.linear_fit(points, entropy)
    assert all(math.isnan(number) for number in (found.r2, found.r2_cv, found.pc1))
    assert found.reason == "undefined: the variable does not vary"
    assert "points do not vary" in geometry.linear_fit(np.ones((20, 3)), np.arange(20)).reason
    few = geometry.linear_fit(points[:4], np.arange(4))
    assert few.r2 == pytest.approx(1)
    assert math.isnan(few.r2_cv)
    assert "too few" in few.reason
    assert "too few" in geometry.linear_fit(points[:5], np.arange(5), components=3, folds=2).reason


@given(st.integers(0, 2**31), st.integers(4, 12), st.sampled_from(["equal", "counts"]))
@reproducible(30)
def test_ring_fit_equals_least_squares(seed: int, classes: int, weights: str) -> None:
    rng = np.random.default_rng(seed)
    label = np.concatenate([np.arange(classes), rng.integers(0, classes, 50)])
    phase = 2 * np.pi * label / classes + 2 * np.pi * rng.integers(-2, 3, len(label))
    points = rng.normal(size=(len(label), 5))
    found = geometry.ring_fit(points, phase, weights=weights)
    means = np.stack([points[label == c].mean(0) for c in range(classes)])
    weight = np.bincount(label).astype(float) if weights == "counts" else None
    angle = 2 * np.pi * np.arange(classes) / classes
    assert found.r2 == pytest.approx(_r2(np.column_stack([np.cos(angle), np.sin(angle)]), means, weight), abs=1e-9)
    assert found.classes == classes
    assert 0 <= found.r2 <= 1
    assert 0 <= found.order <= 1


def test_a_ring_and_a_shuffled_ring() -> None:
    rng = np.random.default_rng(0)
    label = np.arange(800) % 8
    phase = 2 * np.pi * label / 8
    ring = np.column_stack([np.cos(phase), np.sin(phase)]) @ rng.normal(size=(2, 6))
    noisy = ring + 5 + 0.3 * rng.normal(size=ring.shape)
    found = geometry.ring_fit(noisy, phase)
    assert found.r2 > 0.97
    assert found.order == 1
    assert geometry.ring_fit(noisy, -phase).order == 1
    order = np.array([0, 3, 6, 1, 4, 7, 2, 5])
    shuffled = geometry.ring_fit(noisy, 2 * np.pi * order[label] / 8)
    assert shuffled.r2 < 0.1
    assert shuffled.order == 0


def test_chance_is_what_random_points_give() -> None:
    phase = 2 * np.pi * np.arange(8) / 8
    rng = np.random.default_rng(0)
    fits = [geometry.ring_fit(rng.normal(size=(8, 15)), phase) for _ in range(1000)]
    assert np.mean([fit.r2 for fit in fits]) == pytest.approx(fits[0].chance, abs=0.01)
    assert np.mean([fit.order for fit in fits]) == pytest.approx(fits[0].chance, abs=0.02)


def test_undefined_rings() -> None:
    phase = 2 * np.pi * np.arange(9) / 3
    few = geometry.ring_fit(np.random.default_rng(0).normal(size=(9, 2)), phase)
    assert math.isnan(few.r2)
    assert few.classes == 3
    assert "3 phases" in few.reason
    still = geometry.ring_fit(np.ones((9, 2)), np.arange(9.0))
    assert math.isnan(still.r2)
    assert "do not differ" in still.reason
    line = geometry.ring_fit(np.outer(np.arange(8.0), [1, 2]), 2 * np.pi * np.arange(8) / 8)
    assert line.r2 > 0
    assert math.isnan(line.order)
    assert "line" in line.reason


@pytest.mark.parametrize("classes", [8, 128, 360])
def test_phases_that_differ_by_rounding_are_one_class(classes: int) -> None:
    label = np.arange(4 * classes) % classes
    phase = (2 * np.pi * label / classes).astype(np.float32) + 2 * np.pi * (np.arange(4 * classes) // classes)
    assert geometry.ring_fit(np.random.default_rng(0).normal(size=(4 * classes, 3)), phase).classes == classes
