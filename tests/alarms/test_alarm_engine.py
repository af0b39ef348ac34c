import math
from dataclasses import dataclass, replace

import pytest

from attnprobe.alarms import AlarmEngine, AlarmRule, DeadValues, LogitExplosion, above, head_values
from attnprobe.errors import ConfigurationError
from tests.alarms.reports import NAN, Script, alarms_of, feed, make_report, standing


def outcome(text, **options):
    """The probes of ``text``: ``N`` newly raised, ``s`` stands, ``.`` nothing."""
    engine = AlarmEngine([Script(text=text, **options)])
    letters = []
    for step in range(len(text)):
        alarms = engine.update(make_report(step))
        letters.append(("N" if alarms[0].new else "s") if alarms else ".")
    return "".join(letters)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("FFF", ".Ns"),
        ("F.FF", "...N"),
        ("FHFF", "...N"),  # holding alone is no streak
        ("HHHH", "...."),
        ("FFHHH", ".Nsss"),
        ("FF..F", ".Ns.."),
        ("FF.H..F", ".Nsss.."),
        ("FF..FF", ".Ns..N"),
        ("F-F-", "..Ns"),
        ("FF.--.", ".Nsss."),
    ],
)
def test_patience_and_hysteresis(text, expected):
    assert outcome(text) == expected


def test_streaks_run_during_the_warm_up():
    assert outcome("FFFFF", min_step=3) == "...Ns"


def test_an_invalid_report_leaves_streaks_alone():
    engine = AlarmEngine([Script(text="F..FFF")])
    reports = [make_report(step, invalid="no backward" if step in (1, 2) else "") for step in range(6)]
    result = list(feed(engine, reports))
    assert standing(result) == [False, False, False, True, True, True]
    assert result[3][0].since == 0


def test_an_alarm_of_an_absent_layer_shows_its_last_reading():
    result = alarms_of(Script(text="FF-"), [make_report(step) for step in range(3)])
    assert (result[2][0].value, result[2][0].step, result[2][0].heads) == (1.0, 2, (1,))


def test_a_crash_switches_one_rule_off_and_is_told_once():
    broken, sound = Script(text="FFxFFF"), LogitExplosion(threshold=100, patience=1)
    engine = AlarmEngine([broken, sound])
    alarms = [engine.update(make_report(step, logit_spread=[[150, 5]])) for step in range(6)]
    assert [[alarm.name for alarm in some] for some in alarms] == [
        ["logit_explosion"],
        ["script", "logit_explosion"],
        *[["logit_explosion"]] * 4,
    ]
    ((name, error),) = engine.failures
    assert (name, str(error)) == ("script", "boom")
    engine.failures.clear()
    engine.update(make_report(5))
    assert engine.failures == []


def test_strict_raises_what_a_rule_raises():
    engine = AlarmEngine([Script(text="x")], strict=True)
    with pytest.raises(RuntimeError, match="boom"):
        engine.update(make_report(0))


def test_a_rule_is_not_asked_about_a_report_without_its_statistics():
    report = make_report(0, logit_spread=[[150, 5]])
    without = replace(report, statistics={}, layer={})
    rules = [LogitExplosion(threshold=100, patience=1), DeadValues(min_step=0)]
    engine = AlarmEngine(rules)
    assert list(feed(engine, [without])) == [()]
    assert [rule.missing(without.statistics) for rule in rules] == [("logit_spread",), ("shared_dead_columns",)]


def test_the_padding_of_narrow_layers_is_not_read():
    report = replace(make_report(0, layers=("a", "b"), logit_spread=[[5, 150], [5, 150]]), heads=(1, 2))
    (alarm,) = AlarmEngine([LogitExplosion(threshold=100, patience=1)]).update(report)
    assert alarm.layer == "b"


def test_a_rule_of_your_own_as_the_documentation_shows():
    @dataclass(frozen=True, kw_only=True)
    class Spread(AlarmRule):
        name = "spread"
        advice = "Look."
        needs = ("logit_spread",)
        threshold: float = 0.9
        patience: int = 3

        def readings(self, report, history):
            for layer, mass in head_values(report, report["logit_spread"]):
                yield above(layer, mass, self.threshold)

    result = alarms_of(Spread(), [make_report(step, logit_spread=[[1.0, NAN]]) for step in range(3)])
    assert standing(result) == [False, False, True]
    assert result[2][0].heads == (0,)


@pytest.mark.parametrize("value", [math.nan, -1.0, "60", None, True])
def test_a_threshold_that_is_none_is_refused(value):
    with pytest.raises(ConfigurationError, match="logit_explosion: threshold must be a number from 0 to inf, not"):
        LogitExplosion(threshold=value)


@pytest.mark.parametrize("value", [0, -1.0, math.inf, math.nan, "2.0"])
def test_an_uninformed_loss_that_is_none_is_refused(value):
    with pytest.raises(ConfigurationError, match="uninformed_loss must be a positive, finite number, not"):
        AlarmEngine([], uninformed_loss=value)
