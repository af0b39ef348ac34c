import pytest

from attnprobe.alarms import MaskViolation
from tests.alarms.reports import NAN, alarms_of, make_report, standing

RULE, CAUSAL = MaskViolation(), MaskViolation(causal=True)
LIMIT = {"future_mass": RULE.threshold, "padding_mass": RULE.threshold, "hidden_tokens": RULE.hidden}
SAYS = {
    "future_mass": "Queries read keys that come after them.",
    "padding_mass": "Real queries read padding.",
    "hidden_tokens": "Tokens that are real are hidden from all others.",
}


def probes(count=RULE.patience + 1, **rows):
    return [make_report(10 * index, **{name: [row] for name, row in rows.items()}) for index in range(count)]


@pytest.mark.parametrize("name", LIMIT)
def test_each_violation_fires_after_patience(name):
    share = 2 * LIMIT[name]
    result = alarms_of(CAUSAL, probes(**{name: [0.0, share]}))
    assert standing(result) == [False] * (RULE.patience - 1) + [True] * 2
    (alarm,) = result[-1]
    assert (alarm.name, alarm.layer, alarm.heads, alarm.since) == ("mask_violation", "attn", (1,), 0)
    assert (alarm.value, alarm.threshold) == (share, LIMIT[name])
    assert alarm.advice == f"{SAYS[name]} {RULE.advice}"


@pytest.mark.parametrize("name", LIMIT)
def test_the_limit_itself_is_silent(name):
    assert not any(alarms_of(CAUSAL, probes(20, **{name: [LIMIT[name]] * 2})))


def test_hidden_tokens_have_a_limit_of_their_own():
    assert LIMIT["hidden_tokens"] > 100 * LIMIT["padding_mass"]
    assert not any(alarms_of(RULE, probes(hidden_tokens=[100 * RULE.threshold] * 2)))
    assert any(alarms_of(MaskViolation(hidden=0.1), probes(hidden_tokens=[0.11] * 2)))
    assert not any(alarms_of(MaskViolation(hidden=0.1), probes(hidden_tokens=[0.09] * 2)))


def test_the_future_counts_only_where_the_model_is_said_to_be_causal():
    future = probes(future_mass=[0.5, 0.5])
    assert not any(alarms_of(RULE, future))
    assert any(alarms_of(CAUSAL, future))


def test_several_violations_are_one_alarm_with_all_heads_and_the_worst_share():
    (alarm,) = alarms_of(CAUSAL, probes(future_mass=[0.0, 0.2], padding_mass=[0.3, 0.0]))[-1]
    assert (alarm.heads, alarm.value, alarm.threshold) == ((0, 1), 0.3, RULE.threshold)
    assert alarm.advice.startswith(f"{SAYS['future_mass']} {SAYS['padding_mass']} ")
    # 20 % of the tokens hidden are less beyond their limit than 20 % of the attention in the future.
    (alarm,) = alarms_of(CAUSAL, probes(future_mass=[0.2, 0.2], hidden_tokens=[0.2, 0.2]))[-1]
    assert alarm.threshold == RULE.threshold


def test_no_share_at_all_can_be_asked_for():
    strict = MaskViolation(causal=True, threshold=0.0, hidden=0.0)
    assert not any(alarms_of(strict, probes()))
    result = alarms_of(strict, probes(padding_mass=[0.0, 1e-12]))
    assert (result[-1][0].heads, result[-1][0].value, result[-1][0].threshold) == ((1,), 1e-12, 0.0)


def test_clears_when_the_mask_is_right_again():
    reports = probes(3, padding_mass=[0.1, 0.1]) + probes(2)
    assert standing(alarms_of(MaskViolation(patience=1), reports)) == [True] * 3 + [False] * 2


def test_layers_have_their_own_alarms():
    reports = [make_report(10 * i, layers=("a", "b"), padding_mass=[[0, 0], [0.1, 0]]) for i in range(RULE.patience)]
    assert [(alarm.layer, alarm.heads) for alarm in alarms_of(RULE, reports)[-1]] == [("b", (0,))]


def test_where_nobody_declared_padding_the_rest_is_read():
    assert not any(alarms_of(CAUSAL, probes(padding_mass=[NAN] * 2, hidden_tokens=[NAN] * 2)))
    assert any(alarms_of(CAUSAL, probes(padding_mass=[NAN] * 2, hidden_tokens=[NAN] * 2, future_mass=[0.0, 0.1])))


def test_what_was_not_measured_is_left_alone():
    nothing = {name: [NAN] * 2 for name in LIMIT}
    assert not any(alarms_of(CAUSAL, probes(20, **nothing)))
    bad = probes(RULE.patience, padding_mass=[0.1, 0.1])
    assert standing(alarms_of(CAUSAL, bad + probes(5, **nothing)))[-6:] == [True] * 6
