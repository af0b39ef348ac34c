"""What the manifold experiment measures, on values whose geometry is known."""

import math

import numpy as np
import pytest
import torch

from attnprobe.experiments.ensemble.model import Attention, Ensemble
from attnprobe.experiments.markov.model import FORM
from attnprobe.experiments.markov.task import SYMBOLS, sequences, transitions
from attnprobe.experiments.paper.manifold import symbol_values
from attnprobe.experiments.paper.manifold_measures import FIRST, Known, blockwise, geometry_of, told
from attnprobe.experiments.paper.manifold_words import ROWS, changed
from attnprobe.geometry import linear_fit

LENGTH = 300


def _measured(protocol, means, attention=None):
    """Of values that are exactly their symbol's mean."""
    sequence = sequences(protocol, LENGTH, 0)[1]
    attention = torch.eye(LENGTH) if attention is None else attention
    values = means[sequence.z]
    return geometry_of(values, means, attention, Known.of(protocol, sequence), torch.zeros_like(values))


def _ring():
    phase = 2 * math.pi * torch.arange(SYMBOLS) / SYMBOLS
    return torch.stack([phase.cos(), phase.sin(), torch.zeros(SYMBOLS)], 1)


def test_a_ring_is_found_in_values_and_in_the_outputs_that_copy_them():
    found = _measured("clean", _ring())
    assert found["participation/symbols"] == pytest.approx(2)
    assert found["components/symbols"] == 2
    for cloud in ("symbols", "outputs"):
        assert found[f"ring/{cloud}"] == pytest.approx(1)
        assert found[f"order/{cloud}"] == 1
    # Every key is its own cluster, and every query reads its own.
    assert found["prototypes/share"] == pytest.approx(1)
    assert found["prototypes/symbol"] == pytest.approx(1)
    assert found["prototypes/read by symbol"] == pytest.approx(1)
    assert 0 < found["prototypes/read by target"] < 0.5


def test_uniform_attention_tells_nothing_of_a_query():
    uniform = torch.ones(LENGTH, LENGTH) / LENGTH
    found = _measured("clean", torch.eye(SYMBOLS), uniform)
    assert found["prototypes/read by symbol"] == pytest.approx(0, abs=1e-9)
    assert math.isnan(found["ring/outputs"])
    assert math.isnan(found["entropy/outputs/others"])


def test_values_on_a_line_in_the_order_of_entropy():
    chain = transitions("varied")
    entropy = -(chain * chain.log()).sum(1)
    found = _measured("varied", entropy[:, None].float() * torch.tensor([[3.0, 4.0]]))
    assert found["components/values"] == 1
    assert found["entropy/symbols/r"] == pytest.approx(1)
    # Observations are noisy, so the best prediction is not quite that of one who knows the symbol.
    assert found["entropy/values/r"] > 0.98
    assert found["entropy/values/1"] > 0.95
    assert found["entropy/values/new symbols"] > 0.9


def test_entropy_that_only_the_most_frequent_symbol_tells():
    """Values that say whether it is that symbol, and nothing else."""
    sequence = sequences("varied", LENGTH, 0)[1]
    most = int(sequence.z[FIRST:].mode().values)
    generator = torch.Generator().manual_seed(1)
    means = torch.randn(SYMBOLS, 1, generator=generator) * 1e-3 + 5.0 * (torch.arange(SYMBOLS) == most)[:, None]
    known = Known.of("varied", sequence)
    found = _measured("varied", means * torch.tensor([[0.6, 0.8]]))
    assert found["entropy/values/r"] > 0.8
    others = known.symbol != most
    wanted = np.corrcoef(means[known.symbol[others], 0].numpy(), known.entropy[others].numpy())[0, 1]
    assert found["entropy/values/others"] == pytest.approx(abs(wanted), abs=1e-3)


def test_what_does_not_vary_is_undefined():
    found = _measured("clean", torch.eye(SYMBOLS))
    undefined = {name for name, value in found.items() if math.isnan(value)}
    assert undefined == {"stay/values", "stay/outputs", "entropy/symbols/r", "ring/first", "order/first"}
    assert set(ROWS) <= set(found)


def test_known_positions_belong_together():
    sequence = sequences("varied", LENGTH, 3)[1]
    known = Known.of("varied", sequence)
    assert torch.equal(known.symbol, sequence.z[FIRST:])
    assert torch.equal(known.target[:-1], known.symbol[1:])
    assert torch.equal(known.stay, transitions("varied").diagonal()[sequence.z[FIRST:]])
    sure = known.symbol_entropy[known.symbol]
    # Most observations leave hardly a doubt about the symbol.
    assert (known.entropy - sure).abs().median() < 0.01
    assert float(known.loss.mean()) == pytest.approx(float(known.entropy.mean()), abs=0.2)


def test_neighbours_are_left_out_together():
    """A smooth variable and smooth points that have nothing to do with it: only blocks show that."""
    generator = np.random.default_rng(0)
    points, variable = generator.standard_normal((450, 12)).cumsum(0), generator.standard_normal(450).cumsum()
    assert linear_fit(points, variable).r2_cv > 0.5
    assert blockwise(torch.from_numpy(points), torch.from_numpy(variable)).r2_cv < 0.3


def test_told_is_the_share_of_the_information():
    groups = torch.arange(8).repeat(50)
    assert told(torch.eye(8)[groups], groups) == pytest.approx(1)
    # Only the half of the symbols is told: ln 2 of ln 8, but for what chance gives.
    assert told(torch.eye(2)[groups // 4], groups) == pytest.approx(1 / 3, abs=0.02)
    generator = torch.Generator().manual_seed(0)
    assert told(torch.eye(8)[groups[torch.randperm(400, generator=generator)]], groups) == pytest.approx(0, abs=0.02)


def test_symbol_values_are_projected_means():
    seeds = (0, 5)
    held = [sequences("clean", 60, seed)[1] for seed in seeds]
    layer = Ensemble(FORM, seeds).attention[0]
    assert isinstance(layer, Attention)
    means = torch.stack([sequence.means for sequence in held])[None]
    torch.testing.assert_close(symbol_values(layer, held), layer.project(means)[2][0].detach())


@pytest.mark.parametrize(
    ("mean", "low", "high", "wanted"),
    [(1, 0.5, 1.5, True), (-1, -1.5, -0.5, True), (1, -0.5, 2.5, False), (0, 0, 0, False), (1, None, None, False)],
)
def test_what_counts_as_a_change(mean, low, high, wanted):
    assert changed({"mean": mean, "low": low, "high": high}) is wanted
