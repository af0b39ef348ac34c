"""Dimensions against numpy's SVD, and what must not change them."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ortho_group

from attnprobe import geometry

from ..reproducible import reproducible


def _cloud(seed: int, n: int, width: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, width)) * rng.uniform(0.1, 3, width) + rng.normal(size=width)


CLOUDS = st.builds(_cloud, st.integers(0, 2**31), st.integers(2, 40), st.integers(2, 12))


@given(CLOUDS, st.sampled_from([0.1, 0.5, 0.9, 1.0]))
@reproducible(40)
def test_equals_the_singular_values(points: np.ndarray, share: float) -> None:
    variance = np.linalg.svd(points - points.mean(0), compute_uv=False) ** 2
    np.testing.assert_allclose(geometry.spectrum(points), variance / variance.sum(), atol=1e-12)
    np.testing.assert_allclose(geometry.participation_ratio(points), variance.sum() ** 2 / (variance**2).sum())
    dimension = geometry.effective_dimension(points, share)
    held = variance.cumsum() / variance.sum()
    assert held[int(dimension) - 1] >= share - 1e-9
    assert dimension == 1 or held[int(dimension) - 2] < share


@given(CLOUDS, st.integers(0, 1000), st.sampled_from([1e-6, 0.3, 1e6]))
@reproducible(30)
def test_rotation_translation_and_scale_change_nothing(points: np.ndarray, seed: int, scale: float) -> None:
    turn = ortho_group.rvs(points.shape[1], random_state=seed)
    moved = scale * (points @ turn + np.random.default_rng(seed).normal(size=points.shape[1]))
    np.testing.assert_allclose(geometry.participation_ratio(moved), geometry.participation_ratio(points))
    np.testing.assert_allclose(geometry.spectrum(moved), geometry.spectrum(points), atol=1e-9)
    assert geometry.effective_dimension(moved, 0.77) == geometry.effective_dimension(points, 0.77)


def test_known_clouds() -> None:
    cross = np.concatenate([np.eye(6), -np.eye(6)])
    assert geometry.participation_ratio(cross) == pytest.approx(6)
    assert [geometry.effective_dimension(cross, share) for share in (0.1, 0.5, 0.51, 1)] == [1, 3, 4, 6]
    line = np.outer(np.arange(9), np.ones(4))
    assert geometry.participation_ratio(line) == pytest.approx(1)
    assert geometry.effective_dimension(line, 1) == 1


def test_random_baseline() -> None:
    flat = _cloud(0, 200, 2) @ np.random.default_rng(1).normal(size=(2, 10))
    before = torch.get_rng_state()
    drawn = geometry.random_baseline(flat)
    assert drawn.shape == (20,)
    assert drawn.min() >= 8 > geometry.effective_dimension(flat) == 2
    np.testing.assert_array_equal(drawn, geometry.random_baseline(flat))
    assert torch.equal(before, torch.get_rng_state())
    # Values of random weights have no more dimensions than what they are computed from.
    assert geometry.random_baseline(flat, inputs=flat[:, :3]).max() <= 3
    many = geometry.random_baseline(np.zeros((4000, 10)), geometry.participation_ratio, draws=3)
    np.testing.assert_allclose(many, 10, rtol=0.02)
