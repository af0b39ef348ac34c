from attnprobe.alarms import SinkFormation
from attnprobe.alarms.history import BASELINE
from tests.alarms.reports import NAN, alarms_of, make_report, standing

RULE = SinkFormation()
NONE, SINK = 0.1 * RULE.threshold, 1.1 * RULE.threshold
NEAR, GONE = 0.9 * RULE.threshold, 0.5 * RULE.threshold  # an alarm holds down to 0.8 of the threshold
START = [[NONE, NONE]] * BASELINE
FIRST = BASELINE + RULE.patience - 1


def masses(*rows):
    return [make_report(10 * index, heads=len(row), sink_mass=[row]) for index, row in enumerate(rows)]


def test_a_head_that_became_a_sink_is_told_after_patience():
    result = alarms_of(RULE, masses(*START, *[[NONE, SINK]] * (RULE.patience + 1)))
    assert standing(result) == [False] * FIRST + [True] * 2
    (alarm,) = result[FIRST]
    assert (alarm.name, alarm.severity, alarm.layer, alarm.heads) == ("sink_formation", "information", "attn", (1,))
    assert (alarm.value, alarm.threshold, alarm.since) == (SINK, RULE.threshold, 10 * BASELINE)


def test_heads_that_were_sinks_from_the_start_are_no_news():
    assert not any(alarms_of(RULE, masses(*[[SINK, SINK]] * 30)))
    half = 0.5 * RULE.threshold
    assert not any(alarms_of(RULE, masses(*[[half, half]] * BASELINE, *[[SINK, SINK]] * 30)))


def test_only_those_that_formed_are_named_and_the_value_is_theirs():
    rows = [[0.9, NONE, NONE]] * BASELINE + [[0.9, SINK, NONE]] * RULE.patience
    (alarm,) = alarms_of(RULE, masses(*rows))[-1]
    assert (alarm.heads, alarm.value) == ((1,), SINK)


def test_nothing_is_said_before_there_is_a_baseline():
    assert not any(alarms_of(RULE, masses([NONE, NONE], *[[SINK, SINK]] * (BASELINE - 2))))


def test_the_threshold_itself_is_silent():
    assert not any(alarms_of(RULE, masses(*START, *[[RULE.threshold] * 2] * 20)))


def test_an_interrupted_streak_starts_again():
    rows = [*START, *[[SINK, NONE]] * (RULE.patience - 1), [NONE, NONE], *[[SINK, NONE]] * RULE.patience]
    assert standing(alarms_of(RULE, masses(*rows))) == [False] * (len(rows) - 1) + [True]


def test_stands_down_to_the_release_and_clears_after_patience():
    rows = [*START, *[[SINK, NONE]] * RULE.patience, *[[NEAR, NONE]] * 5, *[[GONE, NONE]] * RULE.patience]
    result = alarms_of(RULE, masses(*rows))
    assert standing(result) == [False] * FIRST + [True] * (5 + RULE.patience) + [False]
    assert result[-2][0].heads == (0,)


def test_what_was_not_measured_is_left_alone():
    assert not any(alarms_of(RULE, masses(*[[NAN, NAN]] * 30)))
    holes = [row for each in [*START, *[[SINK, NAN]] * RULE.patience] for row in (each, [NAN, NAN])]
    assert standing(alarms_of(RULE, masses(*holes))) == [False] * 2 * FIRST + [True] * 2
