import math

from attnprobe.alarms import RedundantHeads
from tests.alarms.reports import NAN, alarms_of, make_report, standing

RULE = RedundantHeads()
COPY = [0.5, 1.0, 1.0, 0.5]
APART = [0.5, RULE.threshold, RULE.threshold, 0.5]
FIRST = max(RULE.patience - 1, math.ceil(RULE.min_step / 10))


def similarities(*rows, step=10):
    return [make_report(step * index, heads=len(row), head_similarity=[row]) for index, row in enumerate(rows)]


def test_two_copies_fire_after_the_warm_up():
    result = alarms_of(RULE, similarities(*[COPY] * (FIRST + 2)))
    assert standing(result) == [False] * FIRST + [True] * 2
    (alarm,) = result[FIRST]
    assert (alarm.name, alarm.layer, alarm.heads, alarm.since) == ("redundant_heads", "attn", (1, 2), 0)
    assert (alarm.value, alarm.threshold) == (1.0, RULE.threshold)


def test_patience_is_waited_for_after_the_warm_up_too():
    rows = [APART] * (FIRST + 1) + [COPY] * RULE.patience
    assert standing(alarms_of(RULE, similarities(*rows))) == [False] * (len(rows) - 1) + [True]


def test_the_warm_up_is_waited_for_whatever_the_cadence():
    steps = range(RULE.min_step + 5)
    assert standing(alarms_of(RULE, similarities(*[COPY] * len(steps), step=1))).index(True) == RULE.min_step


def test_similar_heads_are_silent_up_to_the_threshold():
    assert not any(alarms_of(RULE, similarities(*[APART] * 40)))
    assert any(alarms_of(RULE, similarities(*[[math.nextafter(RULE.threshold, 2)] * 2] * 40)))


def test_clears_after_patience_below_the_threshold():
    rows = [COPY] * (FIRST + 1) + [APART] * RULE.patience
    assert standing(alarms_of(RULE, similarities(*rows))) == [False] * FIRST + [True] * RULE.patience + [False]


def test_layers_have_their_own_alarms():
    reports = [make_report(10 * i, layers=("a", "b"), head_similarity=[[0.5, 0.5], [1, 1]]) for i in range(FIRST + 1)]
    assert [(alarm.layer, alarm.heads) for alarm in alarms_of(RULE, reports)[-1]] == [("b", (0, 1))]


def test_what_was_not_measured_is_left_alone():
    assert not any(alarms_of(RULE, similarities(*[[NAN] * 4] * 40)))
    assert alarms_of(RULE, similarities(*[[NAN, 1.0, 1.0, NAN]] * 40))[-1][0].heads == (1, 2)
    holes = similarities(*[COPY, [NAN] * 4] * 40)
    assert standing(alarms_of(RULE, holes))[-2:] == [True, True]
