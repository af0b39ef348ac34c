import pytest

from attnprobe.alarms import InactiveHead
from tests.alarms.reports import NAN, alarms_of, make_report, standing

RULE = InactiveHead()
SILENT, NEAR, ACTIVE = 0.5 * RULE.threshold, 0.5 * (1 + 1 / RULE.release) * RULE.threshold, 1.1 / RULE.release
ACTIVE *= RULE.threshold
LAYERS = ("a", "b")


def outputs(*rows, **values):
    return [make_report(10 * index, heads=len(row), output_norm=[row], **values) for index, row in enumerate(rows)]


def errors(*pairs, loss=1.0, scale=1.0):
    """Two layers of two heads; ``pairs`` are the errors of layer ``b``, those of layer ``a`` are 1."""
    return [
        make_report(
            10 * index, layers=LAYERS, loss=loss, error_norm=[[scale, scale], [scale * value for value in pair]]
        )
        for index, pair in enumerate(pairs)
    ]


def test_a_silent_output_fires_after_patience():
    result = alarms_of(RULE, outputs(*[[1.0, SILENT, 0.5]] * (RULE.patience + 1)))
    assert standing(result) == [False] * (RULE.patience - 1) + [True] * 2
    (alarm,) = result[RULE.patience - 1]
    assert (alarm.name, alarm.layer, alarm.heads, alarm.since) == ("inactive_head", "attn", (1,), 0)
    assert (alarm.value, alarm.threshold) == (pytest.approx(SILENT), RULE.threshold)


def test_an_error_that_does_not_come_back_fires_after_patience():
    result = alarms_of(RULE, errors(*[[1.0, SILENT]] * RULE.patience))
    assert standing(result) == [False] * (RULE.patience - 1) + [True]
    assert [(alarm.layer, alarm.heads, alarm.value) for alarm in result[-1]] == [("b", (1,), pytest.approx(SILENT))]


def test_an_output_and_an_error_of_exactly_zero_fire():
    assert alarms_of(RULE, outputs(*[[1.0, 0.0]] * RULE.patience))[-1][0].value == 0.0
    assert alarms_of(RULE, errors(*[[0.0, 1.0]] * RULE.patience))[-1][0].heads == (0,)


def test_beside_an_infinite_norm_nothing_is_called_inactive():
    infinite = float("inf")
    assert not any(alarms_of(RULE, outputs(*[[infinite, 1.0], [infinite, infinite]] * 10)))
    assert not any(alarms_of(RULE, errors(*[[infinite, 1.0], [infinite, infinite]] * 10)))


def test_just_above_the_threshold_is_silent():
    above = 1.01 * RULE.threshold
    assert not any(alarms_of(RULE, outputs(*[[1.0, above]] * 20)))
    assert not any(alarms_of(RULE, errors(*[[1.0, above]] * 20)))


def test_errors_are_compared_with_those_of_the_run_and_outputs_with_those_of_the_layer():
    assert any(alarms_of(RULE, errors(*[[SILENT, SILENT]] * RULE.patience)))
    small = [make_report(10 * i, layers=LAYERS, output_norm=[[1.0, 1.0], [SILENT, SILENT]]) for i in range(20)]
    assert not any(alarms_of(RULE, small))


@pytest.mark.parametrize("scale", [1e6, 1e-6])
def test_the_scale_of_the_loss_and_of_the_outputs_is_no_matter(scale):
    pairs = [[1.0, SILENT]] * 5 + [[1.0, NEAR]] * 5 + [[1.0, ACTIVE]] * 5
    found = alarms_of(RULE, errors(*pairs))
    assert any(found)
    scaled = alarms_of(RULE, errors(*pairs, scale=scale))
    rows = [[scale * value for value in pair] for pair in pairs]
    for other in (scaled, alarms_of(RULE, outputs(*rows))):
        assert standing(other) == standing(found)
        for mine, theirs in zip(found, other, strict=True):
            assert [(a.heads, a.since, pytest.approx(a.value)) for a in mine] == [
                (a.heads, a.since, a.value) for a in theirs
            ]


def test_with_nothing_to_learn_no_error_is_missed():
    nothing = [[0.0, 0.0]] * 20
    assert not any(alarms_of(RULE, errors(*nothing, loss=0.0)))
    assert not any(alarms_of(RULE, errors(*nothing, loss=0.0, scale=0.0)))
    assert any(alarms_of(RULE, errors(*nothing, loss=1e-9)))
    assert any(alarms_of(RULE, errors(*nothing, loss=NAN)))
    # What says nothing says nothing all the same.
    assert any(alarms_of(RULE, outputs(*[[1.0, 0.0]] * 20, loss=0.0)))


def test_no_error_anywhere_is_that_of_every_head():
    result = alarms_of(RULE, errors(*[[0.0, 0.0]] * RULE.patience, scale=0.0))
    assert [(alarm.layer, alarm.heads, alarm.value) for alarm in result[-1]] == [("a", (0, 1), 0.0), ("b", (0, 1), 0.0)]


def test_a_branch_that_starts_at_zero_is_silent():
    assert RULE.patience > 1
    assert not any(alarms_of(RULE, outputs([0.0, 0.0], *[[1e-3, 2e-3]] * 20)))
    assert not any(alarms_of(RULE, errors([0.0, 0.0], *[[0.5, 1.0]] * 20)))


def test_the_only_head_of_a_layer_is_not_silent_beside_itself():
    assert not any(alarms_of(RULE, outputs(*[[1e-9]] * 20)))


def test_stands_up_to_the_release_and_clears_after_patience():
    assert RULE.threshold < NEAR < RULE.threshold / RULE.release < ACTIVE
    rows = [[1.0, SILENT]] * RULE.patience + [[1.0, NEAR]] * 5 + [[1.0, ACTIVE]] * RULE.patience
    result = alarms_of(RULE, outputs(*rows))
    assert standing(result) == [False] * (RULE.patience - 1) + [True] * (5 + RULE.patience) + [False]
    assert result[RULE.patience][0].heads == (1,)


def test_an_interrupted_streak_starts_again():
    rows = [[1.0, SILENT]] * (RULE.patience - 1) + [[1.0, 1.0]] + [[1.0, SILENT]] * RULE.patience
    assert standing(alarms_of(RULE, outputs(*rows))) == [False] * (len(rows) - 1) + [True]


def test_heads_that_were_not_measured_are_left_alone():
    assert not any(alarms_of(RULE, outputs(*[[NAN, 1e-9]] * 20)))  # beside itself
    assert not any(alarms_of(RULE, errors(*[[NAN, NAN]] * 20)))  # a frozen layer
    assert not any(alarms_of(RULE, outputs(*[[NAN, NAN]] * 20, error_norm=[[1.0, 0.0]])))
    result = alarms_of(RULE, outputs(*[[1.0, SILENT], [NAN, NAN]] * RULE.patience))
    assert standing(result) == [False] * (2 * RULE.patience - 2) + [True] * 2
