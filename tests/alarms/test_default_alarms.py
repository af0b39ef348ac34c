"""What holds for every rule, and how rules are chosen."""

import dataclasses
import math
import re

import pytest

import attnprobe.alarms
from attnprobe.alarms import (
    ALL_ALARMS,
    DEFAULT_ALARMS,
    AlarmEngine,
    AlarmRule,
    InactiveHead,
    LogitExplosion,
    MaskViolation,
    resolve,
)
from attnprobe.catalog import STATISTICS
from attnprobe.errors import ConfigurationError, UnknownNameError
from attnprobe.report import Alarm, StepReport
from tests.alarms.reports import HEALTHY, HEALTHY_LAYER, NAN, make_report

every_rule = pytest.mark.parametrize("rule", ALL_ALARMS, ids=lambda rule: rule.name)


@every_rule
def test_has_a_name_and_sourced_advice(rule):
    assert re.fullmatch("[a-z_]+", rule.name)
    assert re.search(r"arXiv \d{4}\.\d{5}", rule.advice)
    assert type(rule).__doc__


@every_rule
def test_the_defaults_read_core_statistics_and_the_others_more(rule):
    assert all(STATISTICS[name].core for name in rule.needs) == (rule in DEFAULT_ALARMS)


@every_rule
def test_remembers_and_may_be_calibrated_by_what_it_has(rule):
    assert {*rule.remembers} <= {*rule.needs}
    assert all(each.low < getattr(rule, each.field) < each.high and each.looser in (-1, 1) for each in rule.tunable)


def test_only_the_formation_of_sinks_is_mere_information():
    assert {rule.name for rule in ALL_ALARMS if rule.severity == "information"} == {"sink_formation"}


@every_rule
def test_is_a_value(rule):
    assert rule == type(rule)()
    assert hash(rule) == hash(type(rule)())
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.patience = 7
    assert rule.patience >= 1


@every_rule
def test_nan_never_fires(rule):
    nothing = {name: [[NAN] * 2] for name in HEALTHY} | {name: [NAN] for name in HEALTHY_LAYER}
    engine = AlarmEngine([rule], uninformed_loss=1.0, strict=True)
    for step in range(0, 500, 10):
        assert engine.update(make_report(step, loss=2.0 + step / 1e6, **nothing)) == ()


@every_rule
def test_a_healthy_model_with_a_stuck_loss_is_silent(rule):
    engine = AlarmEngine([rule], uninformed_loss=1.0, strict=True)
    for step in range(0, 500, 10):
        assert engine.update(make_report(step, loss=2.0 + step / 1e6)) == ()


@every_rule
def test_an_empty_report_is_no_trouble(rule):
    assert AlarmEngine([rule], strict=True).update(StepReport(step=0)) == ()


def trouble(step):
    """A report that makes every rule fire sooner or later."""
    changed = 1 if step < 50 else 2  # the first five probes are the baselines
    values = {
        "logit_spread": [[1000.0 * 2.0 ** (step / 10), 5.0]],
        "value_rms": [[1e3**changed, 1.0]],
        "concentration": [[0.9999, 0.9999]],
        "shared_dead_columns": [0.9],
        "entropy_8": [0.99],
        "output_norm": [[1.0, 0.0]],
        "sink_mass": [[0.01 if step < 50 else 0.99, 0.01]],
        "head_similarity": [[1.0, 1.0]],
        "output_stable_rank": [[1.0, 1.0]],
        "padding_mass": [[0.5, 0.0]],
        "attention_displacement": [[0.0, 0.0]],
        "value_displacement": [[0.0, 0.0]],
        "nonfinite": {"value": [[1, 0]]},
    }
    return make_report(step, loss=2.0 + 0.01 * (-1) ** (step // 10), **values)


def test_alarms_hold_plain_python_values():
    engine = AlarmEngine(ALL_ALARMS, uninformed_loss=1.0, strict=True)
    for step in range(0, 400, 10):
        alarms = engine.update(trouble(step))
    assert [alarm.name for alarm in alarms] == [rule.name for rule in ALL_ALARMS]
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


def test_resolve_knows_the_sets():
    assert resolve("default") == DEFAULT_ALARMS
    assert resolve("all") == ALL_ALARMS
    assert resolve(["default", "all"]) == ALL_ALARMS
    assert {*DEFAULT_ALARMS} < {*ALL_ALARMS}


@pytest.mark.parametrize("order", [1, -1])
def test_a_rule_takes_the_place_of_its_like_in_a_set(order):
    mine = LogitExplosion(threshold=60)
    chosen = resolve(["default", mine][::order])
    assert chosen == tuple(mine if rule.name == mine.name else rule for rule in DEFAULT_ALARMS)


def test_what_a_set_lacks_comes_after_it():
    mask, silent = MaskViolation(causal=True), InactiveHead(patience=7)
    chosen = resolve([mask, "default", "rank_collapse", silent])
    assert [rule.name for rule in chosen] == [*(rule.name for rule in DEFAULT_ALARMS), mask.name, "rank_collapse"]
    assert mask in chosen
    assert silent in chosen


def test_resolve_refuses_what_it_cannot_run():
    with pytest.raises(UnknownNameError, match=r"Did you mean 'logit_explosion'\?"):
        resolve(["logit_explosions"])
    with pytest.raises(ConfigurationError, match="two alarms are named 'logit_explosion'"):
        resolve([LogitExplosion(threshold=80), "logit_explosion"])
    with pytest.raises(ConfigurationError, match="two alarms are named 'logit_explosion'"):
        resolve(["all", LogitExplosion(threshold=80), LogitExplosion(threshold=90)])
    with pytest.raises(UnknownNameError, match=r"Did you mean 'default'\?"):
        resolve("defaults")
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
