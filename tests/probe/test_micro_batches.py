"""Several backward passes in one step are one large batch."""

from __future__ import annotations

import pytest
import torch

import attnprobe as ap
from tests.probe.models import KINDS, SDPA, batches, net

WHOLE = torch.cat([*batches(3, size=2)]).double()  # 6 sequences
EVERYTHING = ["all", "output_stable_rank"]


def model_of(kind):
    model = net(kind, heads=(2, 4)).double()
    return torch.nn.Sequential(*model.layers)  # without the batch norm, which mixes sequences


def loss_of(model, x):
    return (model(x) ** 2 * torch.linspace(-1, 1, 16, dtype=x.dtype)).sum()


def assert_same(report, expected):
    assert report.layers == expected.layers
    assert report.valid
    assert not report.warnings
    for table, other in ((report.statistics, expected.statistics), (report.layer, expected.layer)):
        assert table.keys() == other.keys()
        for name, values in table.items():
            torch.testing.assert_close(values, other[name], rtol=1e-6, atol=1e-12, equal_nan=True, msg=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [[6], [2, 2, 2], [1, 5], [1] * 6, [3, 0, 3]])
def test_micro_batches_combine_to_the_large_batch(kind, sizes):
    model = model_of(kind)
    expected = ap.analyze(model, lambda: loss_of(model, WHOLE), statistics=EVERYTHING)
    with ap.AttentionProbe(model, statistics=EVERYTHING) as probe:
        for part in WHOLE.split(sizes):
            loss_of(model, part).backward()
        assert_same(probe.step(), expected)


def test_forward_passes_first_and_backward_passes_later():
    model = model_of("sdpa")
    expected = ap.analyze(model, lambda: loss_of(model, WHOLE), statistics=EVERYTHING)
    with ap.AttentionProbe(model, statistics=EVERYTHING) as probe:
        sum(loss_of(model, part) for part in WHOLE.split(2)).backward()
        assert_same(probe.step(), expected)


def test_only_what_a_backward_reached_counts():
    model = model_of("sdpa")
    expected = ap.analyze(model, lambda: loss_of(model, WHOLE[:4]), statistics=EVERYTHING)
    with ap.AttentionProbe(model, statistics=EVERYTHING) as probe:
        loss_of(model, WHOLE[:4]).backward()
        loss_of(model, WHOLE[4:])  # nobody asks for its gradient
        with torch.no_grad():
            model(WHOLE)
        assert_same(probe.step(), expected)


def test_one_micro_batch_that_went_backward_twice_spoils_the_step():
    model = SDPA()
    with ap.AttentionProbe(model) as probe:
        for part in WHOLE.float().split(2):
            loss = loss_of(model, part)
            loss.backward(retain_graph=True)
        loss.backward()
        with pytest.warns(ap.AttnProbeWarning, match="more than once"):
            assert not probe.step().valid
