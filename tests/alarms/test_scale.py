"""No rule depends on the scale of the loss, of the errors, or of the values."""

from dataclasses import replace

import pytest

from attnprobe.alarms import AlarmEngine
from tests.alarms.reports import feed
from tests.alarms.test_alarm_state import RULES, troubled_run


def scaled(report, loss=1.0, error=1.0, value=1.0):
    factors = {"error_norm": error, "value_rms": value, "output_norm": value}
    statistics = {name: values * factors.get(name, 1.0) for name, values in report.statistics.items()}
    return replace(report, loss=report.loss * loss, statistics=statistics)


def raised(reports, uninformed):
    engine = AlarmEngine(RULES, uninformed_loss=uninformed)
    return [
        (alarm.step, alarm.name, alarm.layer, alarm.heads, alarm.new)
        for alarms in feed(engine, reports)
        for alarm in alarms
    ]


@pytest.mark.parametrize("uninformed", [None, 2.0])
@pytest.mark.parametrize("factors", [{"loss": 1024.0}, {"error": 2.0**-20}, {"value": 256.0}])
def test_a_change_of_units_changes_no_alarm(factors, uninformed):
    """Powers of two, so that rounding stays the same."""
    found = 0
    for seed in range(10):
        reports = list(troubled_run(seed))
        known = None if uninformed is None else uninformed * factors.get("loss", 1.0)
        expected = raised(reports, uninformed)
        assert raised([scaled(report, **factors) for report in reports], known) == expected
        found += len(expected)
    assert found > 100
