"""What breaks inside the probe is told once, with its cause, and does not stop the training."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

import attnprobe as ap
from attnprobe import assemble, collect
from tests.probe.models import NotUnderstood, batch, loss_of, net, run


class Boom(RuntimeError):
    pass


def explode(*_):
    raise Boom("cause")


@dataclass(frozen=True, kw_only=True)
class BrokenRule(ap.AlarmRule):
    name = "broken_rule"

    def readings(self, report, history):
        raise Boom("cause")


class Broken(ap.MemoryWriter):
    def write(self, report):
        raise Boom("cause")


def own(measure):
    return {"statistics": ["core", ap.Statistic("mine", "of the test", measure=measure)]}


#: what breaks -> options, how the one warning starts, what strict raises
FAULTS = {
    "statistic": (own(explode), "statistic 'mine': switched off after Boom: cause", Boom),
    "shape": (
        own(lambda record: (torch.ones(1), torch.ones(1))),
        "statistic 'mine': switched off after ValueError: expected (sum, count) of shape [2] each, got [1]",
        ValueError,
    ),
    "rule": ({"alarms": BrokenRule()}, "alarm 'broken_rule': switched off after Boom: cause", Boom),
    "writer": ({"writers": Broken()}, "error in Broken, which is switched off: Boom: cause", Boom),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_training_goes_on_and_the_cause_is_told_once(fault):
    options, message, _ = FAULTS[fault]
    memory = ap.MemoryWriter()
    writers = [writer for writer in (options.get("writers"), memory) if writer]
    model = net()
    with (
        pytest.warns(ap.AttnProbeWarning) as told,
        ap.AttentionProbe(model, every_n_steps=1, **{**options, "writers": writers}) as probe,
    ):
        reports = run(probe, model, 4)
    assert [str(w.message) for w in told] == [f"attnprobe: {message}"]
    assert told[0].filename == run.__code__.co_filename  # where step() is called
    assert memory.reports == reports  # the others go on
    assert all(report.valid and report["entropy"].isfinite().all() for report in reports)
    if "statistics" in options:
        assert all(report["mine"].isnan().all() for report in reports)


@pytest.mark.parametrize("fault", FAULTS)
def test_strict_raises_it(fault):
    options, _, error = FAULTS[fault]
    model = net()
    with ap.AttentionProbe(model, strict=True, **options) as probe, pytest.raises(error):
        run(probe, model)


def test_the_step_at_which_strict_raised_counts():
    model = net()
    with ap.AttentionProbe(model, every_n_steps=2, strict=True, alarms=BrokenRule()) as probe:
        for _ in range(2):
            with pytest.raises(Boom):
                run(probe, model)
            assert not probe.active
            assert run(probe, model) == [None]
        assert probe.state_dict()["step"] == 4


def test_a_built_in_measurement_that_breaks_switches_its_layer_off(monkeypatch):
    measure, calls = collect.measure, []

    def breaks_in_the_first_layer(record, statistics, **options):
        calls.append(record)
        if len(calls) == 2:  # backward comes to the last layer first
            raise Boom("cause")
        return measure(record, statistics, **options)

    monkeypatch.setattr(collect, "measure", breaks_in_the_first_layer)
    model = net()
    with pytest.warns(ap.AttnProbeWarning) as told, ap.AttentionProbe(model, every_n_steps=1) as probe:
        reports = run(probe, model, 3)
    assert [str(w.message) for w in told] == ["attnprobe: layers.0: switched off after Boom: cause"]
    for report in reports:
        assert report.valid
        assert report["entropy"].isnan().all(1).tolist() == [row != "layers.1" for row in report.layers]


def test_when_every_layer_is_off_the_report_says_so(monkeypatch):
    monkeypatch.setattr(collect, "measure", explode)
    model = net()
    with pytest.warns(ap.AttnProbeWarning) as told, ap.AttentionProbe(model, every_n_steps=1) as probe:
        reports = run(probe, model, 3)
    assert [report.invalid for report in reports] == [collect.ALL_OFF] * 3
    assert len(told) == 3  # two layers, and that nothing is left


def test_an_error_while_the_report_is_made_spoils_that_report_only(monkeypatch):
    model = net()
    with ap.AttentionProbe(model, every_n_steps=1) as probe:
        monkeypatch.setattr(assemble, "combine", explode)
        with pytest.warns(ap.AttnProbeWarning, match="error in the probe: Boom: cause") as told:
            reports = run(probe, model, 2)
        assert len(told) == 1
        assert [report.valid for report in reports] == [False, False]
        monkeypatch.undo()
        assert run(probe, model)[0].valid


def test_a_writer_that_cannot_close_does_not_keep_the_others_from_it():
    class Stuck(ap.MemoryWriter):
        def close(self):
            raise Boom("cause")

    class Good(ap.MemoryWriter):
        closed = 0

        def close(self):
            self.closed += 1

    good = Good()
    probe = ap.AttentionProbe(net(), writers=[Stuck(), good])
    with pytest.warns(ap.AttnProbeWarning, match="error in closing Stuck: Boom: cause"):
        probe.close()
    assert good.closed == 1


def test_an_own_statistic_joins_the_others():
    model = net(heads=(2, 4))

    def mine(record):
        return record.error.square().sum((0, 2, 3)), torch.full((record.shape[1],), 4 * 6)

    with ap.AttentionProbe(model, statistics=["error_norm", ap.Statistic("mine", "u^2", measure=mine)]) as probe:
        (report,) = run(probe, model)
    torch.testing.assert_close(report["mine"], report["error_norm"].square(), equal_nan=True, rtol=1e-5, atol=0)
    assert report["mine"].isnan().tolist() == [[False, False, True, True], [False] * 4]


def test_a_layer_that_is_not_understood_is_nan_and_named_once():
    model = torch.nn.Sequential(NotUnderstood())
    with pytest.warns(ap.AttnProbeWarning) as told, ap.AttentionProbe(model, every_n_steps=1) as probe:
        reports = run(probe, model, 3)
    assert len(told) == 1
    assert "0: not measured, because sum alpha b misses u.o" in str(told[0].message)
    assert all(report["entropy"].isnan().all() and report.residual.min() > 0.01 for report in reports)


@pytest.mark.parametrize(
    ("loss", "alarmed"), [(math.nan, True), (torch.tensor(math.nan), True), (math.inf, True), (None, False), (1, False)]
)
def test_a_loss_that_is_not_finite_is_a_finding_that_every_writer_can_write(tmp_path, loss, alarmed):
    model, memory = net(), ap.MemoryWriter()
    writers = [ap.JSONLWriter(tmp_path), ap.TensorBoardWriter(tmp_path), memory]
    with ap.AttentionProbe(model, writers=writers, action="record") as probe:
        loss_of(model, batch()).backward()
        report = probe.step(loss)
        assert len(probe.writers) == 3
    assert [(alarm.name, alarm.layer) for alarm in report.alarms] == [("nonfinite", "")] * alarmed
    assert all(counts.shape == (2, 2) for counts in report.nonfinite.values())
