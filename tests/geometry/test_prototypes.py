"""Prototypes and agreement against scikit-learn and sums written out."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import mutual_info_score, silhouette_score

from attnprobe import geometry

from ..reproducible import reproducible


def _blobs(count: int, n: int = 120, width: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    label = np.arange(n) % count
    return rng.normal(size=(count, width))[label] * 10 + rng.normal(size=(n, width)) * 0.1, label


@pytest.mark.parametrize("count", [2, 3, 6])
def test_finds_the_number_of_clusters(count: int) -> None:
    points, label = _blobs(count)
    found = geometry.prototypes(points)
    assert found.centres.shape == (count, 4)
    assert len(set(zip(found.labels, label, strict=True))) == count
    means = np.stack([points[found.labels == c].mean(0) for c in range(count)])
    np.testing.assert_allclose(found.centres, means)
    within = ((points - means[found.labels]) ** 2).sum()
    assert found.share == pytest.approx(1 - within / ((points - points.mean(0)) ** 2).sum())
    assert found.silhouette == pytest.approx(silhouette_score(points, found.labels))


def test_the_same_in_every_run_and_for_torch() -> None:
    points, _ = _blobs(5)
    state = np.random.get_state()[1].copy()
    one, other = geometry.prototypes(points, 4), geometry.prototypes(torch.tensor(points), 4)
    np.testing.assert_array_equal(one.centres, other.centres)
    np.testing.assert_array_equal(one.labels, other.labels)
    assert (np.random.get_state()[1] == state).all()


def test_few_values() -> None:
    two = geometry.prototypes([[0.0, 1.0], [1.0, 0.0]])
    assert len(two.centres) == 2
    assert two.share == 1
    assert math.isnan(two.silhouette)
    assert len(geometry.prototypes([[0.0], [1.0], [0.0], [1.0]]).centres) == 2
    one = geometry.prototypes(_blobs(2)[0], 1)
    assert one.share == pytest.approx(0)
    assert math.isnan(one.silhouette)


def test_assigns_by_the_nearest_centre() -> None:
    points, _ = _blobs(3)
    found = geometry.prototypes(points, 3)
    others = torch.randn(2, 1, 7, 4) * 10
    nearest = torch.cdist(others.double(), torch.tensor(found.centres)).argmin(-1)
    np.testing.assert_array_equal(found.assign(others), nearest)
    np.testing.assert_array_equal(found.assign(points), found.labels)


@given(st.integers(0, 2**31), st.integers(1, 5), st.integers(1, 4))
@reproducible(30)
def test_hard_attention_is_scikit_learns_mutual_information(seed: int, groups: int, clusters: int) -> None:
    rng = np.random.default_rng(seed)
    group, cluster = rng.integers(0, groups, (3, 10)), rng.integers(0, clusters, (3, 10))
    found = geometry.agreement(np.eye(clusters)[cluster], group)
    assert found.information == pytest.approx(mutual_info_score(group.ravel(), cluster.ravel()), abs=1e-12)
    assert found.entropy == pytest.approx(mutual_info_score(group.ravel(), group.ravel()), abs=1e-12)
    assert found.information <= found.entropy + 1e-12
    largest = sum(max(np.sum((group == g) & (cluster == c)) for g in range(groups)) for c in range(clusters))
    assert found.purity == pytest.approx(largest / 30)
    assert found.table.sum() == pytest.approx(1)


def test_soft_attention() -> None:
    rng = np.random.default_rng(0)
    shares, group = rng.dirichlet(np.ones(3), 50), rng.integers(2, 6, 50)
    found = geometry.agreement(shares, group)
    table = np.stack([shares[group == g].sum(0) for g in np.unique(group)]) / 50
    np.testing.assert_allclose(found.table, table)
    np.testing.assert_array_equal(found.groups, np.unique(group))
    product = np.outer(table.sum(1), table.sum(0))
    assert found.information == pytest.approx((table * np.log(table / product)).sum())


def test_chance_and_what_is_left_out() -> None:
    rng = np.random.default_rng(0)
    group = rng.integers(0, 4, 400)
    right = geometry.agreement(np.eye(4)[group], group)
    assert right.purity == 1
    assert right.information == pytest.approx(right.entropy)
    assert right.chance_information < 0.05
    assert right.chance_purity < 0.4
    unrelated = geometry.agreement(np.eye(4)[rng.integers(0, 4, 400)], group)
    assert unrelated.information < 3 * unrelated.chance_information
    shares, some = np.eye(4)[group], group.copy()
    shares[:100], some[100:150] = np.nan, -100
    np.testing.assert_array_equal(
        geometry.agreement(shares, some).table, geometry.agreement(shares[150:], group[150:]).table
    )
