"""What holds for every default rule, and how rules are chosen."""

import dataclasses
import math
import re

import pytest

import attnprobe.alarms
from attnprobe.alarms import DEFAULT_ALARMS, AlarmEngine, AlarmRule, LogitExplosion, resolve
from attnprobe.catalog import STATISTICS
from attnprobe.errors import ConfigurationError, UnknownNameError
from attnprobe.report import Alarm, StepReport
from tests.alarms.reports import NAN, make_report

every_rule = pytest.mark.parametrize("rule", DEFAULT_ALARMS, ids=lambda rule: rule.name)


@every_rule
def test_has_a_name_and_sourced_advice(rule):
    assert re.fullmatch("[a-z_]+", rule.name)
    assert re.search(r"arXiv \d{4}\.\d{5}", rule.advice)
    assert type(rule).__doc__


@every_rule
def test_reads_core_statistics_only(rule):
    assert all(STATISTICS[name].core for name in rule.needs)


@every_rule
def test_is_a_value(rule):
    assert rule == type(rule)()
    assert hash(rule) == hash(type(rule)())
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.patience = 7
    assert rule.patience >= 1


@every_rule
def test_nan_never_fires(rule):
    nothing = {"logit_spread": [[NAN] * 2], "value_rms": [[NAN] * 2], "concentration": [[NAN] * 2]}
    nothing |= {"shared_dead_columns": [NAN], "entropy_8": [NAN]}
    engine = AlarmEngine([rule], uninformed_loss=1.0, strict=True)
    for step in range(0, 500, 10):
        assert engine.update(make_report(step, loss=2.0, **nothing)) == ()


@every_rule
def test_an_empty_report_is_no_trouble(rule):
    assert AlarmEngine([rule], strict=True).update(StepReport(step=0)) == ()


def test_alarms_hold_plain_python_values():
    engine = AlarmEngine(DEFAULT_ALARMS, uninformed_loss=1.0, strict=True)
    trouble = {"logit_spread": [[300.0, 5.0]], "concentration": [[0.99, 0.99]], "shared_dead_columns": [0.5]}
    trouble |= {"entropy_8": [0.9], "nonfinite": {"value": [[1, 0]]}}
    for step in range(0, 400, 10):
        size = 1.0 if step < 50 else 50.0
        alarms = engine.update(make_report(step, loss=2.0, value_rms=[[size, size]], **trouble))
    assert [alarm.name for alarm in alarms] == [rule.name for rule in DEFAULT_ALARMS]
    for alarm in alarms:
        assert type(alarm.value) is float
        assert type(alarm.threshold) is float
        assert {type(head) for head in alarm.heads} <= {int}
        assert (type(alarm.step), type(alarm.since)) == (int, int)
        assert math.isfinite(alarm.value)
        assert Alarm.from_dict(alarm.to_dict()) == alarm


def test_resolve_takes_rules_and_names():
    mine = LogitExplosion(threshold=80)
    assert resolve([mine, "nonfinite"]) == (mine, DEFAULT_ALARMS[0])
    assert resolve("dead_values")[0].name == "dead_values"
    assert resolve(mine) == (mine,)
    assert resolve(()) == ()
    assert resolve(DEFAULT_ALARMS) == DEFAULT_ALARMS


def test_resolve_refuses_what_it_cannot_run():
    with pytest.raises(UnknownNameError, match=r"Did you mean 'logit_explosion'\?"):
        resolve(["logit_explosions"])
    with pytest.raises(ConfigurationError, match="two alarms are named 'logit_explosion'"):
        resolve([LogitExplosion(threshold=80), "logit_explosion"])
    with pytest.raises(ConfigurationError, match=r"pass an instance, LogitExplosion\(\)"):
        resolve([LogitExplosion])
    with pytest.raises(ConfigurationError, match="not 3"):
        resolve([3])

    class Nameless(AlarmRule):
        def readings(self, report, history):
            return ()

    with pytest.raises(ConfigurationError, match="Nameless needs a name"):
        resolve([Nameless()])


def test_a_second_rule_of_a_kind_takes_a_name_of_its_own():
    class EarlyExplosion(LogitExplosion):
        name = "early_explosion"

    early = EarlyExplosion(threshold=50, patience=1)
    (alarm,) = AlarmEngine(resolve([early, "logit_explosion"])).update(make_report(0, logit_spread=[[60, 5]]))
    assert (alarm.name, alarm.threshold) == ("early_explosion", 50)


def test_all_names_exist():
    assert all(hasattr(attnprobe.alarms, name) for name in attnprobe.alarms.__all__)
