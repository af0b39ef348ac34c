import pytest

from attnprobe.alarms import DiffuseRouting
from tests.alarms.reports import NAN, alarms_of, make_report, standing

# The numbers below go with these thresholds, whatever the defaults are.
RULE = DiffuseRouting(threshold=0.75, alike=0.05, release=0.8, patience=5, min_step=200)

FLAT = [2.0 + 0.01 * (-1) ** index for index in range(60)]


def run(entropies, losses, *, step=10, **values):
    layers = tuple(f"h.{index}" for index in range(len(entropies[0])))
    return [
        make_report(index * step, layers=layers, entropy_8=row, loss=loss, **values)
        for index, (row, loss) in enumerate(zip(entropies, losses, strict=False))
    ]


def test_uniform_layers_and_a_stuck_loss_fire_once_for_the_run():
    result = alarms_of(RULE, run([[0.9, 0.8]] * 30, FLAT))
    # Ten losses make the trend known at step 90; the warm-up of 200 steps is longer than the patience.
    assert standing(result) == [False] * 20 + [True] * 10
    (alarm,) = result[20]
    assert (alarm.layer, alarm.heads, alarm.value, alarm.threshold) == ("", (), 0.8, 0.75)
    assert (alarm.step, alarm.since) == (200, 90)


def test_patience_is_waited_for_after_the_warm_up_too():
    result = alarms_of(RULE, run([[0.9]] * 30, FLAT, step=100))
    assert standing(result) == [False] * (9 + RULE.patience - 1) + [True] * (22 - RULE.patience)


def test_warm_up_is_waited_for_whatever_the_cadence():
    result = alarms_of(RULE, run([[0.9]] * 60, FLAT, step=4))
    assert standing(result).index(True) == 50


def test_one_layer_that_chooses_is_enough_to_stay_silent():
    assert not any(alarms_of(RULE, run([[0.99, 0.75, 0.99]] * 60, FLAT)))


def test_progress_keeps_it_silent():
    uniform = [[0.99]] * 60
    assert not any(alarms_of(RULE, run(uniform, [NAN] * 60)))
    assert not any(alarms_of(RULE, run(uniform, FLAT[:9] + [NAN] * 51)))
    assert any(alarms_of(RULE, run(uniform, FLAT[:10] + [NAN] * 50)))
    assert not any(alarms_of(RULE, run(uniform, [1.5] * 60), uninformed_loss=2.0))
    # Still worse than uninformed, but on its way.
    assert not any(alarms_of(RULE, run(uniform, [9 - 0.1 * i for i in range(60)]), uninformed_loss=2.0))


def test_an_uninformed_loss_needs_the_trend_too():
    result = alarms_of(RULE, run([[0.9]] * 30, FLAT), uninformed_loss=2.0)
    assert standing(result).index(True) == 20
    assert result[20][0].since == 90  # five losses told that it is no better than uninformed


def test_absent_layers_are_passed_over():
    result = alarms_of(RULE, run([[NAN, 0.9]] * 30, FLAT))
    assert result[-1][0].value == 0.9
    assert not any(alarms_of(RULE, run([[NAN, NAN]] * 60, FLAT)))


def test_stands_down_to_the_release_and_clears_after_five_probes():
    rows = [[0.9]] * 30 + [[0.65]] * 10 + [[0.55]] * 5
    assert standing(alarms_of(RULE, run(rows, FLAT)))[23:] == [True] * 21 + [False]


def test_clears_when_the_loss_begins_to_fall():
    losses = FLAT[:30] + [2.0 - 0.1 * index for index in range(15)]
    result = standing(alarms_of(RULE, run([[0.9]] * 45, losses)))
    assert result[29]
    assert not result[-1]


ALIKE = {"logit_spread": [[0.04, 0.04]] * 2}
UNIFORM = [[0.99, 0.99]] * 40
FALLING = [9 - 0.1 * index for index in range(40)]


@pytest.mark.parametrize("losses", [FALLING, FLAT, [NAN] * 40], ids=["falling", "flat", "unknown"])
@pytest.mark.parametrize("uninformed", [None, 20.0])
def test_scores_that_stay_alike_fire_whatever_the_loss_does(losses, uninformed):
    result = alarms_of(RULE, run(UNIFORM, losses, **ALIKE), uninformed_loss=uninformed)
    assert standing(result) == [False] * 20 + [True] * 20  # after the warm-up of 200 steps
    assert result[20][0].advice.startswith("All scores are alike: ")
    assert (result[20][0].value, result[20][0].since) == (0.99, 0)


def test_one_head_whose_scores_differ_is_enough_to_be_judged_by_the_loss():
    spread = {"logit_spread": [[0.04, 0.04], [0.04, 0.05]]}
    assert not any(alarms_of(RULE, run(UNIFORM, FALLING, **spread)))
    result = alarms_of(RULE, run(UNIFORM, FLAT, **spread))
    assert any(result)
    assert result[-1][0].advice == RULE.advice


def test_scores_that_are_alike_in_sharp_layers_are_silent():
    assert not any(alarms_of(RULE, run([[0.99, 0.75]] * 40, FALLING, **ALIKE)))


def test_unmeasured_scores_are_not_alike():
    assert not any(alarms_of(RULE, run(UNIFORM, FALLING, logit_spread=[[NAN, NAN]] * 2)))
    partly = {"logit_spread": [[NAN, NAN], [NAN, 0.04]]}
    assert any(alarms_of(RULE, run(UNIFORM, FALLING, **partly)))


def test_clears_when_scores_begin_to_differ_while_the_loss_falls():
    reports = run(UNIFORM, FALLING, **ALIKE)[:30] + run(UNIFORM, FALLING)[30:]
    result = standing(alarms_of(RULE, reports))
    assert result[20:] == [True] * 10 + [True] * (RULE.patience - 1) + [False] * (11 - RULE.patience)
