from attnprobe.alarms import DeadValues
from tests.alarms.reports import NAN, alarms_of, make_report, standing

# The numbers below go with these thresholds, whatever the defaults are.
RULE = DeadValues(always=0.05, stalled=0.3, stall_step=100, release=0.8, patience=1, min_step=50)


def run(shares, *, losses=None, first=0):
    losses = [NAN] * len(shares) if losses is None else losses
    return [
        make_report(first + 10 * index, shared_dead_columns=[share], loss=loss)
        for index, (share, loss) in enumerate(zip(shares, losses, strict=True))
    ]


def test_a_layer_that_comes_late_needs_five_probes():
    result = alarms_of(RULE, run([0.1] * 6, first=5000))
    assert standing(result) == [False] * 4 + [True] * 2


def test_the_threshold_is_that_of_the_condition_that_fired():
    shares = [0.045] * 12 + [0.35] * 3
    result = alarms_of(RULE, run(shares, losses=[2.0] * 15), uninformed_loss=2.0)
    assert [(alarm.value, alarm.threshold) for (alarm,) in result[12:]] == [(0.35, 0.3)] * 3


def test_dead_since_the_first_probe_fires_at_step_50():
    result = alarms_of(RULE, run([0.05] * 7))
    assert standing(result) == [False] * 5 + [True] * 2
    (alarm,) = result[5]
    assert (alarm.layer, alarm.heads, alarm.value, alarm.threshold, alarm.since) == ("attn", (), 0.05, 0.05, 40)


def test_one_living_probe_is_enough_to_stay_silent():
    assert not any(alarms_of(RULE, run([0.2, 0.2, 0.0] + [0.2] * 20)))
    assert not any(alarms_of(RULE, run([0.049] * 20)))


def test_many_dead_with_a_stuck_loss_fire_from_step_100_on():
    reports = run([0.0] + [0.3] * 14, losses=[2.0] * 15)
    result = alarms_of(RULE, reports, uninformed_loss=2.0)
    assert standing(result) == [False] * 10 + [True] * 5
    assert (result[10][0].value, result[10][0].threshold, result[10][0].since) == (0.3, 0.3, 100)


def test_many_dead_are_silent_while_progress_is_made_or_unknown():
    shares = [0.0] + [0.9] * 39
    assert not any(alarms_of(RULE, run(shares)))
    assert not any(alarms_of(RULE, run(shares, losses=[1.0] * 40), uninformed_loss=2.0))
    assert not any(alarms_of(RULE, run([0.0] + [0.29] * 39, losses=[2.0] * 40), uninformed_loss=2.0))


def test_clears_when_keys_come_alive():
    result = alarms_of(RULE, run([0.1] * 6 + [0.045, 0.03, 0.1]))
    assert standing(result) == [False] * 5 + [True, True, False, False]


def test_stuck_alarm_clears_below_its_release():
    losses = [2.0] * 16
    result = alarms_of(RULE, run([0.0] + [0.35] * 11 + [0.25, 0.25, 0.23, 0.25], losses=losses), 2.0)
    assert standing(result) == [False] * 10 + [True] * 4 + [False, False]


def test_unmeasured_probes_do_not_break_the_series():
    assert standing(alarms_of(RULE, run([0.1, NAN, 0.1, NAN, 0.1, 0.1, 0.1])))[-1]
    assert not any(alarms_of(RULE, run([NAN] * 20)))
