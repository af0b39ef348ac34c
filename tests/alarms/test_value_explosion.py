from attnprobe.alarms import ValueExplosion
from tests.alarms.reports import NAN, alarms_of, make_report, standing

# The numbers below go with these thresholds, whatever the defaults are.
RULE = ValueExplosion(threshold=20.0, release=0.8, patience=2, min_step=0)


def sizes(*rows):
    return [make_report(10 * index, value_rms=[row]) for index, row in enumerate(rows)]


def test_each_head_is_compared_with_its_own_first_probes():
    start = [[0.1, 1.0], [0.2, 2.0], [0.3, 3.0], [0.4, 4.0], [0.5, 5.0]]  # medians .3 and 3
    result = alarms_of(RULE, sizes(*start, [6.3, 59.0], [7.5, 59.0], [7.5, 63.0]))
    assert standing(result) == [False] * 6 + [True, True]
    assert result[6][0].heads == (0,)
    assert result[6][0].value == 25.0
    assert result[6][0].since == 50
    assert result[7][0].heads == (0, 1)


def test_twenty_times_the_baseline_is_silent():
    assert not any(alarms_of(RULE, sizes(*[[1.0, 0.5]] * 5, *[[20.0, 10.0]] * 5)))


def test_nothing_fires_before_there_is_a_baseline():
    assert not any(alarms_of(RULE, sizes([1, 1], [1000, 1], [1000, 1], [1000, 1])))


def test_unmeasured_and_infinite_values_make_no_baseline():
    start = [[NAN, 1.0], [float("inf"), 1.0], *[[0.0, 1.0]] * 3]
    reports = sizes(*start, *[[1.0, 1.0]] * 5, *[[25.0, 1.0]] * 2)
    assert standing(alarms_of(RULE, reports)) == [False] * 11 + [True]


def test_an_invalid_probe_makes_no_baseline():
    reports = [make_report(0, value_rms=[[100.0, 1.0]], invalid="two backwards")] * 5
    reports += sizes(*[[1.0, 1.0]] * 5, *[[25.0, 1.0]] * 2)
    assert standing(alarms_of(RULE, reports)) == [False] * 11 + [True]


def test_stands_down_to_the_release():
    reports = sizes(*[[1.0, 1.0]] * 5, [25, 1], [25, 1], [17, 1], [15, 1], [15, 1])
    assert standing(alarms_of(RULE, reports)) == [False] * 6 + [True, True, True, False]
