"""What the experiments compute from models, on cases whose answer is known."""

import math

import numpy as np
import pytest
import torch

from attnprobe.experiments.ensemble.model import Ensemble
from attnprobe.experiments.ensemble.pairs import Pairs
from attnprobe.experiments.markov.model import FORM
from attnprobe.experiments.paper import compatibility, specialization, timescales
from attnprobe.experiments.retrieval import FORM as RETRIEVAL
from attnprobe.experiments.retrieval import KEYS, retrieval


def test_overlap_of_heads() -> None:
    disjoint = np.kron(np.eye(4), np.ones((1, 2)))  # four heads, two of eight kinds each
    assert specialization.overlap(disjoint) == pytest.approx(0, abs=1e-12)
    assert specialization.overlap(np.ones((3, 8))) == pytest.approx(1)
    half = np.array([[1.0, 1, 0, 0], [0, 1, 1, 0]])
    assert specialization.overlap(half) == pytest.approx(0.5)


def test_overlap_by_chance_is_that_of_permuted_kinds() -> None:
    """Two heads with one kind each of eight share it in one of eight cases."""
    weights = np.eye(8)[:2]
    found = np.mean([specialization._by_chance(weights, np.random.default_rng(seed)) for seed in range(10)])
    assert found == pytest.approx(1 / 8, abs=0.03)


def test_disagreement_of_heads() -> None:
    one, other = torch.zeros(16), torch.zeros(16)
    one[3] = other[5] = 1
    rows = torch.stack([one, other]).view(1, 1, 2, 1, 16).expand(2, 3, 2, KEYS, 16)
    assert specialization._disagreement(rows, 2) == pytest.approx([1, 1])
    assert specialization._disagreement(rows[:, :, [0, 0]], 2) == pytest.approx([0, 0])
    three = torch.stack([one, one, other]).view(1, 1, 3, 1, 16).expand(1, 3, 3, KEYS, 16)
    assert specialization._disagreement(three, 3) == pytest.approx([2 / 3])


def test_attention_of_each_layer_is_that_of_its_own_input() -> None:
    import dataclasses

    model = Ensemble(dataclasses.replace(RETRIEVAL, layers=2, heads=2, residual=True), (0, 1))
    x = retrieval((0, 1), sequences=2).x
    found = specialization._attention(model, x)
    hidden = x + model.attention[0](x)
    expected = model.attention[1].scores(hidden).softmax(-1)[:, :, KEYS:]
    torch.testing.assert_close(found["1"][1, :, 1], expected[:, 3])  # head 1 of seed 1 is head 3 of the call


def test_means_by_symbol() -> None:
    """Against a loop over all pairs."""
    random = torch.Generator().manual_seed(0)
    length = compatibility.LENGTH
    y, z = (torch.randint(8, (2, 1, length), generator=random) for _ in range(2))
    scores = torch.randn(2, 1, length, length, generator=random)
    visible = torch.ones(length, length).tril().bool()
    attention = scores.masked_fill(~visible, -math.inf).softmax(-1)
    found = compatibility._by_symbol(Pairs(scores, attention, scores, -scores), y, z)
    uniform = visible / visible.sum(1, keepdim=True)
    for target, symbol in ((0, 0), (3, 5), (7, 2)):
        where = (y[:, 0, :, None] == target) & (z[:, 0, None] == symbol) & visible
        assert float(found["compatibility"][0, target, symbol]) == pytest.approx(
            float(scores[:, 0][where].mean()) * 2 * length, rel=1e-3
        )
        share = attention[:, 0][where].sum() / uniform.expand(2, -1, -1)[where].sum()
        assert float(found["attention"][0, target, symbol]) == pytest.approx(float(share), rel=1e-4)


def test_scores_that_follow_their_advantage() -> None:
    advantage = torch.tensor([[1.0, 9.0, 9.0], [-1.0, 1.0, 9.0], [1.0, -1.0, 1.0]])[None, None]
    scores = torch.zeros(1, 1, 3, 3).masked_fill(~torch.ones(3, 3, dtype=torch.bool).tril(), -math.inf)
    after = scores + torch.tensor([[1.0, 0, 0], [1.0, 1.0, 0], [1.0, -1.0, -1.0]])
    found = compatibility._followed(Pairs(scores, scores, scores, advantage), after)
    assert found.tolist() == pytest.approx([4 / 6])


def test_correlation_of_maps_leaves_row_means_out() -> None:
    random = torch.Generator().manual_seed(1)
    left, right = torch.randn(2, 8, 8, generator=random), torch.randn(8, 8, generator=random)
    found = compatibility._correlation(left + 100 * torch.randn(2, 8, 1, generator=random), right)
    for seed in range(2):
        a, b = (m - m.mean(1, keepdim=True) for m in (left[seed], right))
        assert found[seed] == pytest.approx(float(np.corrcoef(a.flatten(), b.flatten())[0, 1]), abs=1e-4)


@pytest.mark.parametrize(
    ("low", "high", "attention", "said"),
    [
        (5.0, 9.0, 100.0, "attention first"),
        (-9.0, -5.0, 100.0, "values first"),
        (-1.0, 5.0, 100.0, "not told apart"),
        (None, None, 100.0, "not told apart"),
        (5.0, 9.0, None, "still moving"),
        (5.0, 9.0, 950.0, "still moving"),
    ],
)
def test_who_settles_first(low: float | None, high: float | None, attention: float | None, said: str) -> None:
    later = {"low": low, "high": high, "mean": None if low is None else (low + high) / 2}
    run = {
        "values_later": {"half": later},
        "settled": {"half": {"attention": {"mean": attention}, "values": {"mean": 90.0}}},
    }
    assert timescales.verdict(run, "half", 1000) == said


def test_markov_weights_know_nothing_of_the_data() -> None:
    """They come from other random numbers than the symbols' means."""
    from attnprobe.experiments.markov.task import sequences

    weights = Ensemble(FORM, (3,)).attention[0].W_Q.detach().flatten()
    means = sequences("clean", 2, 3)[0].means.flatten()
    size = min(len(weights), len(means))
    assert abs(float(np.corrcoef(weights[:size], means[:size])[0, 1])) < 0.3
