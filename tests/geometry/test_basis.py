"""Trajectories in one basis: no movement that is none, none lost."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import pdist
from scipy.stats import ortho_group

from attnprobe import StepReport, geometry
from attnprobe.errors import ConfigurationError, UnknownNameError
from attnprobe.report import HeadMap

from ..reproducible import reproducible

SNAPSHOTS = st.builds(
    lambda seed, steps, n, width: np.random.default_rng(seed).normal(size=(steps, n, width)),
    *(st.integers(0, 2**31), st.integers(1, 4), st.integers(3, 15), st.integers(2, 6)),
)


def _moves(found: geometry.Trajectory) -> np.ndarray:
    """Distances between all points of all steps."""
    return pdist(found.points.reshape(-1, found.points.shape[-1]))


@given(SNAPSHOTS, st.sampled_from(["last", "all"]), st.integers(0, 1000))
@reproducible(30)
def test_a_change_of_basis_leaves_distances_alone(snapshots: np.ndarray, fit: str, seed: int) -> None:
    found = geometry.common_basis(snapshots, fit=fit)
    turned = geometry.common_basis(snapshots @ ortho_group.rvs(snapshots.shape[-1], random_state=seed), fit=fit)
    np.testing.assert_allclose(_moves(turned), _moves(found), atol=1e-9)
    np.testing.assert_allclose(turned.shares, found.shares, atol=1e-9)


@given(SNAPSHOTS, st.sampled_from(["last", "all"]))
@reproducible(30)
def test_equals_the_projection_on_singular_vectors(snapshots: np.ndarray, fit: str) -> None:
    width = min(snapshots.shape[1:])
    found = geometry.common_basis(snapshots, width, fit=fit)
    fitted = snapshots[-1] if fit == "last" else snapshots.reshape(-1, snapshots.shape[-1])
    centred = fitted - fitted.mean(0)
    axes = np.linalg.svd(centred, full_matrices=False)[2][:2]
    expected = (snapshots - fitted.mean(0)) @ axes.T
    np.testing.assert_allclose(np.abs(found.points[..., :2]), np.abs(expected), atol=1e-8)
    np.testing.assert_allclose(found.axes @ found.axes.T, np.eye(width), atol=1e-9)
    if width == snapshots.shape[-1]:  # nothing is left out
        np.testing.assert_allclose(_moves(found), pdist(snapshots.reshape(-1, width)), atol=1e-9)
        np.testing.assert_allclose(found.shares, 1)
    own = snapshots - snapshots.mean(1, keepdims=True)
    shares = ((own @ found.axes.T) ** 2).sum((1, 2)) / (own**2).sum((1, 2))
    np.testing.assert_allclose(found.shares, shares)


def test_what_stands_still_does_not_move() -> None:
    points = np.random.default_rng(0).normal(size=(20, 5))
    found = geometry.common_basis([points, points, points])
    assert np.ptp(found.points, axis=0).max() == 0
    assert found.steps == (0, 1, 2)


def test_a_snapshot_without_variance_has_no_share() -> None:
    points = np.random.default_rng(0).normal(size=(6, 3))
    found = geometry.common_basis([np.ones((6, 3)), points])
    assert np.isnan(found.shares[0])
    assert found.shares[1] > 0.5
    with pytest.raises(ConfigurationError, match="snapshot 1 has NaN"):
        geometry.common_basis([points, points * np.nan])


def _report(step: int, values: torch.Tensor, positions: tuple[int, ...] = (0, 1, 2, 3)) -> StepReport:
    picture = torch.zeros(1, 1)
    return StepReport(step, maps=(HeadMap("layer", 1, picture, None, None, values, positions),))


def test_from_reports() -> None:
    values = torch.randn(3, 4, 5)
    reports = [_report(10 * i, x) for i, x in enumerate(values)]
    found = geometry.trajectory([*reports, StepReport(99)], "layer", 1, fit="all")
    assert found.steps == (0, 10, 20)
    np.testing.assert_array_equal(found.points, geometry.common_basis(values, fit="all").points)
    with pytest.raises(UnknownNameError, match="Known: layer:1"):
        geometry.trajectory(reports, "layer", 0)
    other = replace(reports[1], maps=_report(0, values[0], (0, 1, 2, 4)).maps)
    with pytest.raises(ConfigurationError, match="different positions"):
        geometry.trajectory([reports[0], other], "layer", 1)
