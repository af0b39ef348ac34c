import pytest

from attnprobe.alarms import LogitExplosion
from tests.alarms.reports import NAN, alarms_of, make_report, standing

# The numbers below go with these thresholds, whatever the defaults are.
RULE = LogitExplosion(threshold=100.0, release=0.8, patience=2, min_step=0)


def spreads(*rows):
    return [make_report(10 * index, logit_spread=[row]) for index, row in enumerate(rows)]


def test_fires_at_the_second_probe_above_the_threshold():
    first, second, third = alarms_of(RULE, spreads([5, 101], [5, 280], [5, 300]))
    assert first == ()
    (alarm,) = second
    assert (alarm.name, alarm.layer, alarm.heads) == ("logit_explosion", "attn", (1,))
    assert (alarm.step, alarm.since, alarm.value, alarm.threshold) == (10, 0, 280.0, 100.0)
    assert alarm.new
    assert [(again.new, again.since, again.step) for again in third] == [(False, 0, 20)]


def test_just_below_the_threshold_is_silent():
    assert not any(alarms_of(RULE, spreads(*[[100.0, 85.0]] * 10)))


def test_an_interrupted_streak_starts_again():
    result = alarms_of(RULE, spreads([200, 5], [90, 5], [200, 5], [200, 5]))
    assert standing(result) == [False, False, False, True]
    assert result[-1][0].since == 20


def test_stands_down_to_the_release_and_clears_after_patience():
    rows = [[150, 5], [150, 5], [81, 5], [79, 5], [81, 5], [79, 5], [79, 5], [150, 5]]
    result = alarms_of(RULE, spreads(*rows))
    assert standing(result) == [False, True, True, True, True, True, False, False]
    assert result[2][0].value == 81.0
    assert result[2][0].heads == (0,)


def test_unmeasured_heads_are_silent_and_an_absent_layer_keeps_its_streak():
    assert not any(alarms_of(RULE, spreads([NAN, NAN], [NAN, 5])))
    result = alarms_of(RULE, spreads([150, NAN], [NAN, NAN], [150, NAN], [NAN, NAN]))
    assert standing(result) == [False, False, True, True]
    assert result[2][0].since == 0


def test_threshold_can_be_tuned():
    rows = [[60, 5], [90, 5]]
    assert alarms_of(LogitExplosion(threshold=80, patience=1), spreads(*rows))[1][0].threshold == 80
    assert standing(alarms_of(LogitExplosion(threshold=50, min_step=10), spreads(*rows))) == [False, True]
    with pytest.raises(TypeError):
        LogitExplosion(limit=80)


def test_layers_have_their_own_streaks():
    reports = [
        make_report(0, layers=("a", "b"), logit_spread=[[150, 5], [5, 5]]),
        make_report(10, layers=("a", "b"), logit_spread=[[5, 5], [150, 5]]),
        make_report(20, layers=("a", "b"), logit_spread=[[5, 5], [150, 150]]),
    ]
    result = alarms_of(RULE, reports)
    assert standing(result) == [False, False, True]
    assert [(alarm.layer, alarm.heads) for alarm in result[2]] == [("b", (0, 1))]
