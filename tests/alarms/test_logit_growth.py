import math

import pytest

from attnprobe.alarms import LogitGrowth
from attnprobe.alarms.losses import LATELY
from tests.alarms.reports import NAN, alarms_of, make_report, standing

RULE = LogitGrowth()
START = 2 * RULE.floor
CALM = 2 * LATELY  # probes after which it is known whether the loss falls
FIRST = CALM + RULE.probes - 1 + RULE.patience - 1  # the last calm probe is where growth starts


def climb(total, *, start=START, probes=RULE.probes + RULE.patience + 2):
    """Calm, then growth by ``total`` over each ``rule.probes`` probes."""
    return [start] * CALM + [start * total ** ((index + 1) / RULE.probes) for index in range(probes)]


STEEP = climb(1.5 * RULE.threshold)
FLAT = [2.0] * 100
FALLING = [2.0 - 4.0 * RULE.fall / LATELY * index for index in range(CALM + RULE.probes + RULE.patience + 2)]


def run(*heads, losses=FLAT):
    return [
        make_report(10 * index, heads=len(heads), logit_spread=[row], loss=loss)
        for index, (row, loss) in enumerate(zip(map(list, zip(*heads, strict=True)), losses, strict=False))
    ]


def test_steady_growth_with_a_flat_loss_fires_after_the_last_of_its_probes():
    result = alarms_of(RULE, run([5.0] * len(STEEP), STEEP))
    assert standing(result) == [False] * FIRST + [True] * (len(STEEP) - FIRST)
    (alarm,) = result[FIRST]
    assert (alarm.name, alarm.layer, alarm.heads) == ("logit_growth", "attn", (1,))
    assert (alarm.threshold, alarm.new) == (RULE.threshold, True)
    assert alarm.value == pytest.approx(1.5 * RULE.threshold)
    assert (alarm.step, alarm.since) == (10 * FIRST, 10 * (CALM + RULE.probes - 1))


def test_an_infinite_spread_says_nothing_of_growth():
    result = alarms_of(RULE, run([*STEEP, math.inf, math.inf]))
    assert standing(result[FIRST:]) == [True] * len(result[FIRST:])  # what was raised is not cleared by it
    (alarm,) = result[-1]
    assert alarm.value == result[len(STEEP) - 1][0].value
    assert alarm.evidence[-1][0] == 10 * (len(STEEP) - 1)  # and nothing is made up for these probes


def test_growth_just_below_the_threshold_is_silent():
    steady = climb(0.99 * RULE.threshold)
    assert not any(alarms_of(RULE, run(steady)))
    assert any(alarms_of(RULE, run(climb(1.01 * RULE.threshold))))


def test_growth_below_the_floor_is_silent():
    below = [min(value, RULE.floor) for value in climb(1.5 * RULE.threshold, start=0.1 * RULE.floor, probes=20)]
    assert not any(alarms_of(RULE, run(below)))


def test_growth_that_pauses_starts_again():
    broken = [*STEEP[: CALM + RULE.probes - 1], STEEP[CALM - 1]]
    again = [STEEP[CALM - 1] * (1.5 * RULE.threshold) ** ((index + 1) / RULE.probes) for index in range(RULE.probes)]
    result = alarms_of(LogitGrowth(patience=1), run(broken + again))
    assert standing(result) == [False] * (len(broken) + RULE.probes - 1) + [True]


def test_a_falling_loss_excuses_it():
    assert not any(alarms_of(RULE, run(STEEP, losses=FALLING)))


def test_a_loss_that_falls_too_little_does_not_excuse_it():
    little = [2.0 - 0.25 * (2.0 - loss) for loss in FALLING]
    assert standing(alarms_of(RULE, run(STEEP, losses=little))).index(True) == FIRST


def test_a_rising_loss_does_not_excuse_it():
    rising = [4.0 - loss for loss in FALLING]
    assert standing(alarms_of(RULE, run(STEEP, losses=rising))).index(True) == FIRST


@pytest.mark.parametrize("offset", [-10.0, -2.0 * 1e3])
def test_negative_losses_that_fall_excuse_it_too(offset):
    scale = abs(offset) / 2.0
    assert not any(alarms_of(RULE, run(STEEP, losses=[offset + scale * (loss - 2.0) for loss in FALLING])))
    assert any(alarms_of(RULE, run(STEEP, losses=[offset - scale * (loss - 2.0) for loss in FALLING])))


def test_silent_where_the_loss_says_nothing():
    assert not any(alarms_of(RULE, run(STEEP, losses=[NAN] * 100)))
    assert not any(alarms_of(RULE, run(STEEP, losses=[0.0] * 100)))
    short = STEEP[CALM - 1 :][: CALM - 1]  # fewer probes than it takes to know whether the loss falls
    assert len(short) >= RULE.probes + RULE.patience
    assert not any(alarms_of(RULE, run(short)))


def test_only_heads_that_grow_are_named_and_the_value_is_theirs():
    small = [value / START * 0.01 * RULE.floor for value in climb(5 * RULE.threshold)]
    result = alarms_of(RULE, run(small, STEEP, [START] * len(STEEP)))
    (alarm,) = result[FIRST]
    assert alarm.heads == (1,)
    assert alarm.value == pytest.approx(1.5 * RULE.threshold)


def test_layers_have_their_own_alarms():
    reports = [
        make_report(10 * index, layers=("a", "b"), logit_spread=[[5.0, 5.0], [value, value]], loss=2.0)
        for index, value in enumerate(STEEP)
    ]
    assert {(alarm.layer, alarm.heads) for alarms in alarms_of(RULE, reports) for alarm in alarms} == {("b", (0, 1))}


def test_stands_while_it_grows_at_all_and_clears_after_patience():
    slow = [STEEP[-1] * 1.001 ** (index + 1) for index in range(2 * RULE.probes)]
    still = [slow[-1]] * (RULE.patience + 1)
    result = alarms_of(RULE, run(STEEP + slow + still))
    raised = len(STEEP) + len(slow) - FIRST
    # The first probe that does not grow is quiet already.
    assert standing(result) == [False] * FIRST + [True] * (raised + RULE.patience - 1) + [False] * 2
    assert result[len(STEEP + slow) - 1][0].heads == (0,)


def test_growth_of_a_small_head_keeps_no_alarm_standing():
    large = STEEP + [STEEP[-1]] * (RULE.patience + 1)
    small = [0.01 * RULE.floor * 1.01**index for index in range(len(large))]
    result = standing(alarms_of(RULE, run(large, small)))
    assert result[FIRST]
    assert not result[-1]


def test_probes_that_did_not_measure_it_are_passed_over():
    holes = [value for each in STEEP for value in (each, NAN)]
    result = alarms_of(RULE, run(holes, losses=[2.0] * len(holes)))
    assert standing(result) == [False] * 2 * FIRST + [True] * (len(holes) - 2 * FIRST)
    assert not any(alarms_of(RULE, run([NAN] * 40)))


def test_a_head_that_is_measured_late_has_to_grow_over_as_many_probes():
    steep = [START * (3 * RULE.threshold) ** index for index in range(RULE.probes + RULE.patience + 1)]
    late = [NAN] * CALM + steep
    first = CALM + RULE.probes + RULE.patience - 1
    assert standing(alarms_of(RULE, run(late))) == [False] * first + [True] * (len(late) - first)
