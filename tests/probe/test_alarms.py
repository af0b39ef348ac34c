"""What alarms do in a training loop."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

import attnprobe as ap
from attnprobe.alarms import above, head_values
from tests.probe.models import net, run


@dataclass(frozen=True, kw_only=True)
class Sharp(ap.AlarmRule):
    """Fires from the third probe on, for every layer."""

    name = "sharp"
    advice = "Look."
    patience: int = 3

    def readings(self, report, history):
        for layer, values in head_values(report, report["entropy"]):
            yield above(layer, values, 0.1)


@dataclass(frozen=True, kw_only=True)
class NoProgress(ap.AlarmRule):
    name = "no_progress"

    def readings(self, report, history):
        yield above("", {0: float(history.loss.progress() is False)}, 0.5)


@pytest.mark.parametrize("action", ["record", "warn", "stop"])
def test_what_a_new_alarm_does(action):
    model = net()
    with ap.AttentionProbe(model, every_n_steps=2, alarms=Sharp(), action=action) as probe:
        run(probe, model, 4)
        assert not probe.should_stop
        if action == "record":
            (report,) = run(probe, model)
        else:
            with pytest.warns(ap.AttnProbeWarning, match="sharp: layers") as told:
                (report,) = run(probe, model)
            assert [str(w.message) for w in told] == [str(alarm) for alarm in report.alarms]
            assert told[0].filename == run.__code__.co_filename
        assert [(alarm.layer, alarm.step, alarm.since) for alarm in report.alarms] == [
            ("layers.0", 4, 0),
            ("layers.1", 4, 0),
        ]
        assert probe.should_stop == (action == "stop")
        later = [report for report in run(probe, model, 5) if report]  # said once, though it stands
        assert all(len(report.alarms) == 2 and not any(alarm.new for alarm in report.alarms) for report in later)


def test_an_alarm_that_stood_before_a_restart_does_not_stop_it_again():
    model, options = net(), {"every_n_steps": 1, "alarms": Sharp(), "action": "stop"}
    with ap.AttentionProbe(model, **options) as probe, pytest.warns(ap.AttnProbeWarning):
        run(probe, model, 3)
    assert probe.should_stop
    with ap.AttentionProbe(model, **options) as resumed:
        resumed.load_state_dict(probe.state_dict())
        assert len(run(resumed, model)[0].alarms) == 2
        assert not resumed.should_stop


@pytest.mark.parametrize(("uninformed", "alarmed"), [(None, False), (1.0, True), (100.0, False)])
def test_uninformed_loss_reaches_the_rules(uninformed, alarmed):
    model = net()
    with ap.AttentionProbe(
        model, every_n_steps=1, alarms=NoProgress(), uninformed_loss=uninformed, action="record"
    ) as probe:
        for _ in range(12):
            run(probe, model)
    state = probe.engine.state_dict()
    assert bool(state["streaks"]["no_progress"]) == alarmed
