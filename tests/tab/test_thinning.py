"""Fewer points that draw the same picture, over curves of every kind."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from attnprobe.view.thinning import evenly, extremes_kept
from tests.reproducible import reproducible

NUMBERS = st.one_of(
    st.floats(width=32), st.sampled_from([math.nan, math.inf, -math.inf, 0.0, -0.0, 1.0]), st.just(math.nan)
)
CURVES = st.lists(NUMBERS, max_size=120).map(lambda values: np.array(values, np.float32))


def stretches(number: int, most: int) -> list[range]:
    """As the documentation has it: ``most`` points are four for each of equally long stretches."""
    edges = [number * index // (most // 4) for index in range(most // 4 + 1)]
    return [range(low, high) for low, high in itertools.pairwise(edges)]


@given(CURVES, st.integers(4, 40))
@reproducible(400)
def test_every_stretch_keeps_its_ends_and_its_extremes(values: NDArray[np.float32], most: int) -> None:
    chosen = extremes_kept(values, most).tolist()
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(range(len(values)))
    assert len(chosen) <= most
    if len(values) <= most:
        assert chosen == list(range(len(values)))
        return
    assert (chosen[0], chosen[-1]) == (0, len(values) - 1)
    for stretch in stretches(len(values), most):
        here = [index for index in chosen if index in stretch]
        assert (here[0], here[-1]) == (stretch[0], stretch[-1])
        numbers = [value for value in values[list(stretch)].tolist() if not math.isnan(value)]
        shown = [value for value in values[here].tolist() if not math.isnan(value)]
        assert bool(shown) == bool(numbers), "a stretch without a number stays a gap"
        if numbers:
            assert (min(shown), max(shown)) == (min(numbers), max(numbers))


def test_a_spike_of_one_probe_in_a_long_run_is_seen() -> None:
    values = np.zeros(1_000_003, np.float32)
    values[[77_777, 500_000, 900_001]] = [5.0, -3.0, math.inf]
    chosen = extremes_kept(values, 1000)
    assert {0, 77_777, 500_000, 900_001, len(values) - 1} <= set(chosen.tolist())


@given(st.integers(0, 300), st.integers(1, 50), st.data())
@reproducible(200)
def test_evenly(number: int, most: int, data: st.DataObject) -> None:
    needed = data.draw(st.sets(st.integers(0, number - 1), max_size=5)) if number else set()
    chosen = evenly(number, most, needed)
    assert chosen == sorted(set(chosen))
    assert needed <= set(chosen) <= set(range(number))
    spaced = evenly(number, most)
    assert len(spaced) == min(number, most)
    if most > 1 and number:
        assert (spaced[0], spaced[-1]) == (0, number - 1)
        gaps = np.diff(spaced)
        assert gaps.size == 0 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize("most", [4, 5, 7, 8, 1000])
def test_all_the_same_numbers_are_few_points(most: int) -> None:
    chosen = extremes_kept(np.ones(5000), most)
    assert len(chosen) <= 2 * (most // 4) + most // 4
