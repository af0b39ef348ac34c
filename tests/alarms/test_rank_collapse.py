import math

from attnprobe.alarms import RankCollapse
from attnprobe.alarms.losses import ENOUGH
from tests.alarms.reports import NAN, alarms_of, make_report, standing

RULE = RankCollapse()
LOW = 0.5 * (1 + RULE.threshold)
NEAR = 0.5 * (1 + 1 / RULE.release) * RULE.threshold
HIGH = 1.1 / RULE.release * RULE.threshold
UNINFORMED = 2.0
STUCK, LEARNING = [UNINFORMED] * 100, [0.5 * UNINFORMED] * 100
# The loss is known to be stuck from its fifth probe on.
FIRST = max(ENOUGH - 1 + RULE.patience - 1, math.ceil(RULE.min_step / 10))


def ranks(*rows, losses=STUCK):
    return [
        make_report(10 * index, heads=len(row), output_stable_rank=[row], loss=loss)
        for index, (row, loss) in enumerate(zip(rows, losses, strict=False))
    ]


def alarms(*rows, losses=STUCK, uninformed_loss=UNINFORMED):
    return alarms_of(RULE, ranks(*rows, losses=losses), uninformed_loss=uninformed_loss)


def test_one_direction_and_a_stuck_loss_fire_after_the_warm_up():
    result = alarms(*[[LOW, 1.0]] * (FIRST + 2))
    assert standing(result) == [False] * FIRST + [True] * 2
    (alarm,) = result[FIRST]
    assert (alarm.name, alarm.layer, alarm.heads) == ("rank_collapse", "attn", ())
    assert (alarm.value, alarm.threshold, alarm.since) == (LOW, RULE.threshold, 10 * (ENOUGH - 1))


def test_patience_is_waited_for_after_the_warm_up_too():
    rows = [[HIGH, HIGH]] * (FIRST + 1) + [[LOW, LOW]] * RULE.patience
    assert standing(alarms(*rows)) == [False] * (len(rows) - 1) + [True]


def test_one_head_with_more_directions_is_enough_to_stay_silent():
    assert not any(alarms(*[[LOW, RULE.threshold]] * 60))


def test_silent_while_the_loss_makes_progress_or_is_unknown():
    low = [[LOW, LOW]] * 60
    assert not any(alarms(*low, losses=LEARNING))
    assert not any(alarms(*low, losses=[NAN] * 60))
    falling = [4.0 - 0.05 * index for index in range(60)]
    assert not any(alarms(*low, losses=falling, uninformed_loss=None))
    assert any(alarms(*low, uninformed_loss=None))


def test_stands_up_to_the_release_and_clears_after_patience():
    assert RULE.threshold < NEAR < RULE.threshold / RULE.release < HIGH
    rows = [[LOW, LOW]] * (FIRST + 1) + [[LOW, NEAR]] * 8 + [[LOW, HIGH]] * RULE.patience
    assert standing(alarms(*rows)) == [False] * FIRST + [True] * (8 + RULE.patience) + [False]


def test_clears_when_the_loss_makes_progress():
    losses = STUCK[: FIRST + 1] + [0.1 * UNINFORMED] * (RULE.patience + 10)
    result = standing(alarms(*[[LOW, LOW]] * len(losses), losses=losses))
    assert result[FIRST]
    assert not result[-1]


def test_layers_have_their_own_alarms():
    reports = [
        make_report(10 * index, layers=("a", "b"), output_stable_rank=[[HIGH, LOW], [LOW, LOW]], loss=UNINFORMED)
        for index in range(FIRST + 1)
    ]
    assert [alarm.layer for alarm in alarms_of(RULE, reports, uninformed_loss=UNINFORMED)[-1]] == ["b"]


def test_what_was_not_measured_is_left_alone():
    assert not any(alarms(*[[NAN, NAN]] * 60))
    assert standing(alarms(*[[LOW, NAN]] * (FIRST + 1))) == [False] * FIRST + [True]
    assert standing(alarms(*[[LOW, LOW]] * (FIRST + 1), *[[NAN, NAN]] * 20))[FIRST:] == [True] * 21
