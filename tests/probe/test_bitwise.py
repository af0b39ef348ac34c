"""Training with the probe is, bit for bit, the training without it."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

import attnprobe as ap
from tests.probe.models import KINDS, batch, batches, net

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
}


def train(kind, optimizer_name, probed, steps=50):
    """Losses and gradients of every step, then all state that the run ended with; how many reports were valid."""
    model = net(kind, dropout=0.1)
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    memory, trace = ap.MemoryWriter(), []
    options = {"statistics": "all", "maps": "*:1", "reference_batch": batch(), "writers": memory}
    probe = ap.AttentionProbe(model, every_n_steps=2, **options) if probed else None
    with probe or nullcontext():
        for x in batches(steps):
            loss = model(x).square().mean()
            loss.backward()
            trace += [loss.detach(), *(p.grad.clone() for p in model.parameters())]
            optimizer.step()
            optimizer.zero_grad()
            if probe:
                probe.step(loss)
    trace += [*model.state_dict().values(), torch.get_rng_state()]
    trace += [value for state in optimizer.state.values() for value in state.values() if value is not None]
    return trace, memory.reports


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_fifty_steps_are_the_same_with_every_second_one_probed(kind, optimizer):
    (plain, _), (probed, reports) = (train(kind, optimizer, probed) for probed in (False, True))
    assert len(plain) == len(probed)
    assert all(torch.equal(a, b) for a, b in zip(plain, probed, strict=True))
    assert [report.step for report in reports] == [*range(0, 50, 2)]
    assert all(report.valid and not report.warnings for report in reports)
    assert all(report["entropy"].isfinite().all() and len(report.maps) == 2 for report in reports)
    assert all(report["attention_displacement"].isfinite().all() for report in reports[1:])


def test_looking_in_between_changes_nothing_either():
    def train(looking):
        model, trace = net(dropout=0.1), []
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        with ap.AttentionProbe(model, every_n_steps=1) as probe:
            for x in batches(10):
                loss = model(x).square().mean()
                if looking:  # in the middle of a step, while its graph is alive
                    probe.evaluate(lambda x=x: model(x))
                    ap.analyze(model, lambda x=x: model(x).sum())
                    ap.analyze(model.layers[0], lambda x=x: model.layers[0](x).sum())
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                report = probe.step()
                trace += [loss.detach(), *report.statistics.values()]
        return [*trace, *model.state_dict().values(), torch.get_rng_state()]

    for a, b in zip(train(False), train(True), strict=True):
        assert torch.equal(a.nan_to_num(), b.nan_to_num())
