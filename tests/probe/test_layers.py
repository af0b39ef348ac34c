"""Layers that differ, come and go, are shared or frozen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import attnprobe as ap
from tests.probe.models import SDPA, MultiHead, Softmax, batch, loss_of, net, run

X = batch()


def test_layers_of_all_kinds_and_head_counts_in_one_table():
    model = nn.Sequential(SDPA(4), nn.LayerNorm(16), Softmax(1), MultiHead(8))
    with ap.AttentionProbe(model, statistics="all", maps=["0:3", "3"]) as probe:
        (report,) = run(probe, model)
    assert report.layers == ("0", "2", "3")
    assert report.heads == (4, 1, 8)
    for name in ("entropy", "error_norm", "max_logit"):
        assert report[name].shape == (3, 8)
        assert report[name].isfinite().sum(1).tolist() == [4, 1, 8]
    assert report.residual.nan_to_num(0).max() < 1e-5
    assert [len(row) for row in (report.rows(), report.maps)] == [13, 9]
    assert "2: one head; if heads are folded into the batch, they are averaged" in report.notes


class Dropping(nn.Module):
    """Layer drop: only the chosen layers run."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(SDPA(heads) for heads in (2, 4, 2))
        self.chosen = (0, 1, 2)

    def forward(self, x):
        for index in self.chosen:
            x = x + self.layers[index](x)
        return x


def test_a_layer_that_comes_later_is_appended_and_a_missing_one_is_nan():
    model = Dropping()
    with ap.AttentionProbe(model, every_n_steps=1) as probe:
        reports = []
        for model.chosen in [(0, 2), (0, 1, 2), (1,), (0, 1, 2)]:
            reports += run(probe, model)
    names = [f"layers.{index}" for index in (0, 2, 1)]
    assert [report.layers for report in reports] == [tuple(names[:2]), *[tuple(names)] * 3]
    assert [report.heads for report in reports] == [(2, 2), (2, 2, 4), (0, 0, 4), (2, 2, 4)]
    assert [report["entropy"].isfinite().any(1).tolist() for report in reports] == [
        [True, True],
        [True] * 3,
        [False, False, True],
        [True] * 3,
    ]
    assert all(report.valid and not report.warnings for report in reports)
    again = ap.analyze(model, lambda: loss_of(model, X))
    assert again.layers == ("layers.0", "layers.1", "layers.2")  # analyze remembers nothing


class Recurrent(nn.Module):
    """One attention module, run several times."""

    def __init__(self, times):
        super().__init__()
        self.attention, self.times = SDPA(), times

    def forward(self, x):
        for _ in range(self.times):
            x = x + self.attention(x)
        return x


def test_a_shared_module_has_a_row_for_each_of_its_calls():
    model = Recurrent(2)
    with ap.AttentionProbe(model, every_n_steps=1) as probe:
        loss_of(model, X).backward()
        loss_of(model, X).backward()  # a second micro-batch: the calls are counted anew
        report = probe.step()
        model.times = 3
        (more,) = run(probe, model)
    assert report.layers == ("attention#0", "attention#1")
    assert more.layers == ("attention#0", "attention#1", "attention#2")
    inner = [X, X + model.attention(X)]
    for row, x in enumerate(inner):
        alone = ap.analyze(model.attention, lambda x=x: model.attention(x).sum())
        torch.testing.assert_close(report["entropy"][row], alone["entropy"][0], rtol=1e-6, atol=0)


def test_one_module_under_two_names_is_one_layer_of_two_calls():
    shared = SDPA()
    report = ap.analyze(model := nn.Sequential(shared, nn.Tanh(), shared), lambda: loss_of(model, X))
    assert report.layers == ("0#0", "0#1")


def test_a_frozen_layer_is_named_in_a_warning():
    model = net()
    model.layers[0].requires_grad_(False)
    with pytest.warns(ap.AttnProbeWarning) as told, ap.AttentionProbe(model, every_n_steps=1) as probe:
        reports = run(probe, model, 3)
    (message,) = {str(w.message) for w in told}
    assert len(told) == 1
    assert message.startswith("attnprobe: layers.0: no gradient reaches it: its inputs and weights are frozen")
    for report in reports:
        assert report.valid
        assert report["entropy"].isnan().all(1).tolist() == [True, False]
    thawed = X.clone().requires_grad_()  # a frozen layer through which a gradient flows is measured
    report = ap.analyze(model, lambda: loss_of(model, thawed))
    assert report["entropy"].isfinite().all()
    assert thawed.grad is not None


def test_the_routing_of_a_frozen_layer_on_request():
    model = net()
    model.layers[0].requires_grad_(False)
    with ap.AttentionProbe(model, every_n_steps=1, include_frozen=True) as probe:
        reports = run(probe, model, 2)
    for report in reports:
        assert report.valid
        assert report["entropy"].isfinite().all()
        assert report["score_grad_norm"].isnan().all(1).tolist() == [True, False]
        assert "no error signal" in " ".join(report.notes)


def test_layer_patterns():
    model = nn.Sequential(SDPA(), Softmax(), SDPA())
    with ap.AttentionProbe(model, layers=["0", "[12]"], every_n_steps=1) as probe:
        assert run(probe, model)[0].layers == ("0", "1", "2")
    with ap.AttentionProbe(model, layers="1", every_n_steps=1) as probe:
        assert run(probe, model)[0].layers == ("1",)


def test_wrappers_do_not_show_in_names():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    model = Wrapper(net())
    report = ap.analyze(model, lambda: loss_of(model, X), layers="layers.*")
    assert report.layers == ("layers.0", "layers.1")
