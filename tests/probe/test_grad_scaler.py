"""Mixed precision: errors are divided by the loss scale, and a step that the scaler skips is no finding."""

from __future__ import annotations

import math

import pytest
import torch

import attnprobe as ap
from attnprobe.collect import ALL_OFF
from attnprobe.probe import SKIPPED
from tests.probe.models import batch, loss_of, net, run

X = batch()


class Scaler:
    """What the probe needs of a GradScaler."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def get_scale(self) -> float:
        return self.scale


def assert_same(a, b, rtol=1e-5):
    for name, values in a.statistics.items():
        torch.testing.assert_close(values, b[name], rtol=rtol, atol=1e-6, equal_nan=True, msg=name)


@pytest.mark.parametrize("scale", [1.0, 2.0**16, 1000.0])
@pytest.mark.parametrize("update", ["before step", "after step"])
def test_statistics_are_those_of_the_unscaled_loss(scale, update):
    model, scaler = net().double(), Scaler(2.0)
    expected = ap.analyze(model, lambda: loss_of(model, X.double()))
    with ap.AttentionProbe(model, every_n_steps=1, statistics="all", grad_scaler=scaler, alarms=()) as probe:
        scaler.scale = scale  # changed since the step began
        for growth in (1, 2, 3):
            (loss_of(model, X.double()) * scaler.scale).backward()
            if update == "after step":
                report = probe.step()
            scaler.scale *= growth
            if update == "before step":
                report = probe.step()
            assert report.valid
            assert_same(report, expected)


def scaled_step(probe, model, scaler, optimizer, loss):
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return probe.step(loss)


def test_a_skipped_step_is_invalid_and_no_alarm():
    model = net()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=1)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    memory = ap.MemoryWriter()
    with ap.AttentionProbe(
        model, every_n_steps=1, statistics="all", grad_scaler=scaler, strict=True, writers=memory
    ) as probe:  # strict: neither a warning nor an error
        while len(memory.reports) < 8:
            before = scaler.get_scale()
            report = scaled_step(probe, model, scaler, optimizer, loss_of(model, X))
            assert report.valid == (scaler.get_scale() > before)
            assert report.invalid in ("", SKIPPED)
            assert report.alarms == ()
            assert "error" in report.nonfinite if report.valid else "error" not in report.nonfinite
    kinds = {report.valid for report in memory.reports}
    assert kinds == {True, False}
    assert_same(next(r for r in memory.reports if r.valid), ap.analyze(model, lambda: loss_of(model, X)))


def test_an_input_that_is_not_finite_is_a_finding_even_where_the_step_was_skipped():
    model, scaler = net(), torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    x = X.clone()
    x[0, 0, 0] = math.nan
    with ap.AttentionProbe(model, grad_scaler=scaler, action="record") as probe:
        report = scaled_step(probe, model, scaler, optimizer, loss_of(model, x))
    assert report.invalid == SKIPPED
    assert [(alarm.name, alarm.layer) for alarm in report.alarms] == [("nonfinite", "layers.0")]


def test_without_backward_no_scale_is_read():
    class Unread:
        def get_scale(self):
            raise AssertionError("read")

    model = net()
    with ap.AttentionProbe(model, grad_scaler=Unread()) as probe:
        loss = loss_of(model, X)
        with pytest.warns(ap.AttnProbeWarning):
            assert not probe.step(loss).valid
        for _ in range(9):
            loss_of(model, X).backward()
            assert probe.step() is None


def test_a_scaler_that_breaks_does_not_stop_the_training():
    class Breaks(Scaler):
        def get_scale(self):
            raise RuntimeError("no scale")

    model = net()
    with (
        pytest.warns(ap.AttnProbeWarning) as told,
        ap.AttentionProbe(model, every_n_steps=1, grad_scaler=Breaks(1)) as p,
    ):
        reports = run(p, model, 2)
    assert [report.invalid for report in reports] == [ALL_OFF] * 2
    causes = [f"attnprobe: layers.{index}: switched off after RuntimeError: no scale" for index in (1, 0)]
    assert [str(w.message) for w in told][1:] == causes


def test_a_scaler_that_breaks_later_spoils_the_report_only():
    class Breaks(Scaler):
        def get_scale(self):
            self.scale -= 1
            return 1 / self.scale if self.scale >= 0 else 1.0  # the second call divides by zero

    model = net()
    with ap.AttentionProbe(model, every_n_steps=1, grad_scaler=Breaks(2)) as probe:
        loss_of(model, X).backward()
        with pytest.warns(ap.AttnProbeWarning, match="error in the probe: ZeroDivisionError"):
            assert not probe.step().valid
        loss_of(model, X).backward()
        assert probe.step().valid
