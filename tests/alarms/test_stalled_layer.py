from attnprobe.alarms import StalledLayer
from tests.alarms.reports import NAN, alarms_of, make_report, standing

RULE = StalledLayer()
STILL, MOVING = 0.5 * RULE.threshold, 1.01 * RULE.threshold


def moves(*pairs, loss=None):
    """Probes of one head, which moved so far in its attention and its values."""
    return [
        make_report(
            10 * index,
            heads=1,
            attention_displacement=[[attention]],
            value_displacement=[[values]],
            loss=2.0 + 0.001 * index if loss is None else loss,
        )
        for index, (attention, values) in enumerate(pairs)
    ]


def test_a_layer_that_does_not_move_fires_after_patience():
    # The first probe has nothing to compare with.
    result = alarms_of(RULE, moves((NAN, NAN), *[(0.2 * STILL, STILL)] * (RULE.patience + 1)))
    assert standing(result) == [False] * RULE.patience + [True] * 2
    (alarm,) = result[RULE.patience]
    assert (alarm.name, alarm.layer, alarm.heads, alarm.since) == ("stalled_layer", "attn", (), 10)
    assert (alarm.value, alarm.threshold) == (STILL, RULE.threshold)


def test_moving_attention_or_moving_values_are_enough_to_stay_silent():
    assert not any(alarms_of(RULE, moves(*[(MOVING, 0.0)] * 20)))
    assert not any(alarms_of(RULE, moves(*[(0.0, MOVING)] * 20)))


def test_one_moving_head_is_enough_to_stay_silent():
    displacements = {"attention_displacement": [[0.0, 0.0]], "value_displacement": [[MOVING, 0.0]]}
    assert not any(alarms_of(RULE, [make_report(10 * i, loss=2.0 + i, **displacements) for i in range(20)]))


def test_silent_where_no_loss_says_that_anything_trains():
    still = [(0.0, 0.0)] * 20
    assert not any(alarms_of(RULE, moves(*still, loss=2.0)))
    assert not any(alarms_of(RULE, moves(*still, loss=NAN)))
    assert any(alarms_of(RULE, moves(*still)))


def test_names_the_layer_that_stands_still():
    displacements = {
        "attention_displacement": [[0.1, 0.1], [0.0, 0.0]],
        "value_displacement": [[0.1, 0.1], [0.0, 0.0]],
    }
    reports = [make_report(10 * i, layers=("a", "b"), loss=2.0 + i, **displacements) for i in range(20)]
    assert [alarm.layer for alarm in alarms_of(RULE, reports)[-1]] == ["b"]


def test_an_interrupted_streak_starts_again():
    pairs = [(NAN, NAN), *[(0.0, 0.0)] * (RULE.patience - 1), (MOVING, 0.0), *[(0.0, 0.0)] * RULE.patience]
    assert standing(alarms_of(RULE, moves(*pairs))) == [False] * (len(pairs) - 1) + [True]


def test_clears_after_patience_once_it_moves():
    pairs = [(NAN, NAN), *[(0.0, 0.0)] * RULE.patience, *[(MOVING, MOVING)] * RULE.patience]
    assert standing(alarms_of(RULE, moves(*pairs))) == [False] * RULE.patience + [True] * RULE.patience + [False]


def test_what_was_not_measured_is_left_alone():
    assert not any(alarms_of(RULE, moves(*[(NAN, NAN)] * 20)))
    pairs = [(NAN, NAN), *[(0.0, 0.0)] * RULE.patience, *[(NAN, NAN)] * 20]
    assert standing(alarms_of(RULE, moves(*pairs))) == [False] * RULE.patience + [True] * 21
