"""Displacement on a reference batch, against the dense reference and against what is known."""

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch import nn

import attnprobe as ap
from attnprobe.capture.session import Session
from attnprobe.catalog import STATISTICS
from attnprobe.statistics.dense import dense_displacement
from attnprobe.statistics.displacement import displacement
from attnprobe.statistics.reduce import finish

from .reproducible import reproducible
from .statistics.strategies import records

NAMES = ("attention_displacement", "value_displacement")


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True)


def _record(model: nn.Module, batch: torch.Tensor) -> ap.AttentionRecord:
    records = []
    session = Session(model, lambda module, record: records.append(record), forward_only=True)
    session.start()
    with torch.no_grad():
        model(batch)
    session.stop()
    return records[0]


def _train(model: nn.Module, probe: ap.AttentionProbe | None, steps: int = 12) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    torch.manual_seed(1)
    losses = []
    for _ in range(steps):
        loss = (model(torch.randn(4, 10, 16)) ** 2).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
        if probe is not None:
            probe.step(loss)
    return losses


def test_equals_the_dense_reference() -> None:
    batch = torch.randn(3, 9, 16)
    model, memory = _model(), ap.MemoryWriter()
    with ap.AttentionProbe(model, every_n_steps=10, reference_batch=batch, writers=memory) as probe:
        _train(model, probe, 1)
        first = copy.deepcopy(model).eval()
        _train(model, probe, 10)
        second = copy.deepcopy(model).eval()
    early, late = memory.reports
    assert all(early[name].isnan().all() for name in NAMES)  # nothing to compare with
    expected = dense_displacement(_record(second, batch), _record(first, batch))
    for name, values in zip(NAMES, expected, strict=True):
        torch.testing.assert_close(late[name][0], values, rtol=1e-5, atol=1e-6)
        assert (values > 0).all()


@reproducible(30)
@given(example=records())
def test_streaming_equals_dense(example: ap.AttentionRecord) -> None:
    torch.manual_seed(0)
    moved = replace(example, value=example.value + torch.randn_like(example.value))
    if example.query is not None:
        moved = replace(moved, query=example.query * 1.5)
    partial = displacement(moved, example)
    for name, expected in zip(NAMES, dense_displacement(moved, example), strict=True):
        value = finish(STATISTICS[name], partial)
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=5e-6, equal_nan=True)


@pytest.mark.parametrize("form", ["tensor", "tuple", "mapping", "function"])
def test_training_is_unchanged(form: str) -> None:
    batch = torch.randn(2, 5, 16)
    plain, watched = _model(), _model()
    forms = {"tensor": batch, "tuple": (batch,), "mapping": {"src": batch}, "function": lambda: watched(batch)}
    reference = forms[form]
    memory = ap.MemoryWriter()
    with ap.AttentionProbe(watched, every_n_steps=2, reference_batch=reference, writers=memory, strict=True) as probe:
        losses = _train(watched, probe)
    assert torch.equal(torch.stack(losses), torch.stack(_train(plain, None)))
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert torch.equal(a, b)
    assert watched.training
    assert memory.reports[-1][NAMES[0]].isfinite().all()


def test_a_broken_reference_batch_is_said_once() -> None:
    model = _model()
    with (
        ap.AttentionProbe(model, every_n_steps=2, reference_batch=torch.zeros(2, 5, 3)) as probe,
        pytest.warns(ap.AttnProbeWarning, match="reference batch") as said,
    ):
        _train(model, probe)
    assert len(said) == 1


def test_the_statistics_need_a_batch() -> None:
    with pytest.raises(ap.ConfigurationError, match="reference_batch="):
        ap.AttentionProbe(_model(), statistics=["attention_displacement"])
