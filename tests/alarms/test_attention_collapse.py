from attnprobe.alarms import AttentionCollapse
from tests.alarms.reports import NAN, alarms_of, make_report, standing

# The numbers below go with these thresholds, whatever the defaults are.
RULE = AttentionCollapse(
    share=0.5, spread=0.05, logit_threshold=100.0, stall_step=100, release=0.8, patience=3, min_step=0
)

SHARP = [[0.97, 0.99, 0.3, 0.3]]  # half of the heads are one-hot


def run(rows, *, losses=None, step=10, **values):
    losses = [NAN] * len(rows) if losses is None else losses
    return [
        make_report(index * step, heads=4, concentration=row, loss=loss, **values)
        for index, (row, loss) in enumerate(zip(rows, losses, strict=True))
    ]


def test_sharp_heads_with_exploding_scores_fire_at_the_third_probe():
    result = alarms_of(RULE, run([SHARP] * 4, logit_spread=[[5, 5, 5, 101]]))
    assert standing(result) == [False, False, True, True]
    (alarm,) = result[2]
    assert (alarm.layer, alarm.heads, alarm.value, alarm.threshold, alarm.since) == ("attn", (0, 1), 0.5, 0.5, 0)
    assert alarm.advice.startswith("Scores explode (logit_spread 101).")


def test_sharp_heads_with_a_stuck_loss_fire_from_step_100_on():
    reports = run([SHARP] * 15, losses=[2.0] * 15)
    result = alarms_of(RULE, reports, uninformed_loss=2.0)
    assert standing(result) == [False] * 12 + [True] * 3
    assert result[12][0].since == 100
    assert "no progress" in result[12][0].advice


def test_scores_of_another_layer_do_not_count():
    reports = [
        make_report(
            step, layers=("a", "b"), concentration=[[0.99, 0.99], [0.3, 0.3]], logit_spread=[[5, 5], [500, 500]]
        )
        for step in range(10)
    ]
    assert not any(alarms_of(RULE, reports))


def test_sharp_heads_alone_are_healthy():
    assert not any(alarms_of(RULE, run([SHARP] * 60)))  # nobody passes the loss
    falling = [2.0 - 0.02 * index for index in range(60)]
    assert not any(alarms_of(RULE, run([SHARP] * 60, losses=falling)))
    assert not any(alarms_of(RULE, run([SHARP] * 60, losses=[1.9] * 60), uninformed_loss=2.0))


def test_just_below_share_and_sharpness_is_silent():
    fewer = [[0.99, 0.3, 0.3, 0.3]]
    blunter = [[0.95, 0.95, 0.95, 0.95]]
    for row in (fewer, blunter):
        assert not any(alarms_of(RULE, run([row] * 10, logit_spread=[[200] * 4])))


def test_only_measured_heads_are_counted():
    rows = [[[0.99, NAN, NAN, 0.3]]] * 3
    assert standing(alarms_of(RULE, run(rows, logit_spread=[[200] * 4]))) == [False, False, True]
    assert not any(alarms_of(RULE, run([[[NAN] * 4]] * 5, logit_spread=[[200] * 4])))


def test_clears_when_the_loss_makes_progress_again():
    losses = [2.0] * 20 + [0.5] * 20
    result = standing(alarms_of(RULE, run([SHARP] * 40, losses=losses), uninformed_loss=2.0))
    assert result[19]
    # The average needs one probe, the alarm three more.
    assert result[20:23] == [True, True, False]


def test_stands_on_slightly_blunter_heads():
    blunter = [[0.94, 0.94, 0.3, 0.3]]
    gone = [[0.9, 0.9, 0.3, 0.3]]
    result = alarms_of(RULE, run([SHARP] * 3 + [blunter] * 5 + [gone] * 3, logit_spread=[[200] * 4]))
    assert standing(result) == [False, False] + [True] * 8 + [False]
