"""A run that is saved and resumed anywhere raises what the uninterrupted run raises."""

import json
import math
import random

from hypothesis import given
from hypothesis import strategies as st

from attnprobe.alarms import DEFAULT_ALARMS, AlarmEngine, MaskViolation, resolve
from tests.alarms.reports import HEALTHY, HEALTHY_LAYER, NAN, feed, make_report
from tests.reproducible import reproducible

LAYERS = ("h.0", "h.1")
PROBES = 45
RULES = resolve(["all", MaskViolation(causal=True)])
RULE = {rule.name: rule for rule in RULES}


def levels():
    """By statistic: what no rule minds, what keeps an alarm standing, what raises one."""
    explosion, growth, collapse = RULE["logit_explosion"], RULE["value_explosion"], RULE["attention_collapse"]
    dead, diffuse, silent = RULE["dead_values"], RULE["diffuse_routing"], RULE["inactive_head"]
    sink, copies, rank = RULE["sink_formation"], RULE["redundant_heads"], RULE["rank_collapse"]
    still, mask = RULE["stalled_layer"], RULE["mask_violation"]
    return {
        "logit_spread": (0.1 * explosion.threshold, 0.9 * explosion.threshold, 2 * explosion.threshold),
        "value_rms": (1.0, 0.9 * growth.threshold, 2 * growth.threshold),
        "concentration": (0.3, 1 - 1.1 * collapse.spread, 1 - 0.2 * collapse.spread),
        "shared_dead_columns": (0.0, 0.9 * dead.stalled, 1.3 * dead.stalled),
        "entropy_8": (0.5 * diffuse.threshold, 0.93 * diffuse.threshold, 1.2 * diffuse.threshold),
        "output_norm": (1.0, 1.0, 1.0),
        "error_norm": (1.0, 1.1 * silent.threshold, 0.1 * silent.threshold),
        "sink_mass": (0.3 * sink.threshold, 0.9 * sink.threshold, 1.5 * sink.threshold),
        "head_similarity": (0.5, copies.threshold, 1.0),
        "output_stable_rank": (3 * rank.threshold, 1.1 * rank.threshold, 1.0),
        "future_mass": (0.0, 0.5 * mask.threshold, 2 * mask.threshold),
        "padding_mass": (0.0, 0.0, 2 * mask.threshold),
        "hidden_tokens": (0.0, 0.5 * mask.hidden, 2 * mask.hidden),
        "attention_displacement": (0.1, 2 * still.threshold, 0.1 * still.threshold),
        "value_displacement": (0.1, 0.1 * still.threshold, 0.1 * still.threshold),
    }


def troubled_run(seed):
    """Reports whose statistics stay for a while on one side of a threshold, or near it, or missing, or climb."""
    rng = random.Random(seed)
    growth = RULE["logit_growth"]
    climb = (2 * growth.threshold) ** (1 / growth.probes)

    def series(healthy, near, bad, *, per_head=True, steep=1.0):
        values = []
        while len(values) < PROBES:
            level, factor = rng.choice([healthy, near, bad, bad, NAN]), rng.choice([1.0, steep])
            run = [level * factor**index for index in range(rng.randint(1, 9))]
            values += [[value] * 2 for value in run] if per_head else run
        return values[:PROBES]

    columns = {
        name: [series(*each, per_head=name in HEALTHY, steep=climb if name == "logit_spread" else 1.0) for _ in LAYERS]
        for name, each in levels().items()
    }
    losses = series(1.0, 1.97, 2.2, per_head=False)
    for index in range(PROBES):
        sick = rng.random() < 0.1
        yield make_report(
            10 * index,
            layers=LAYERS,
            loss=rng.choice([NAN, math.inf]) if sick else losses[index] + rng.gauss(0, 0.01),
            invalid="no backward" if rng.random() < 0.1 else "",
            nonfinite={"error": [[0, 0], [0, int(sick)]]},
            **{name: [column[index] for column in rows] for name, rows in columns.items()},
        )


@reproducible(40)
@given(seed=st.integers(0, 10**6), cut=st.integers(0, PROBES), uninformed=st.sampled_from([None, 2.0]))
def test_resuming_changes_nothing(seed, cut, uninformed):
    reports = list(troubled_run(seed))
    whole = list(feed(AlarmEngine(RULES, uninformed_loss=uninformed), reports))

    first = AlarmEngine(RULES, uninformed_loss=uninformed)
    before = list(feed(first, reports[:cut]))
    state = first.state_dict()
    assert json.loads(json.dumps(state, allow_nan=True)) == state
    second = AlarmEngine(RULES, uninformed_loss=uninformed)
    list(feed(second, reports[:3]))  # loading replaces whatever was there
    second.load_state_dict(json.loads(json.dumps(state)))
    assert before + list(feed(second, reports[cut:])) == whole
    assert first.state_dict() == state  # and the saved state is nobody else's


def test_the_troubled_runs_trouble_every_statistic_and_raise_every_alarm():
    assert levels().keys() == HEALTHY.keys() | HEALTHY_LAYER.keys()
    raised = {
        alarm.name
        for seed in range(20)
        for alarms in feed(AlarmEngine(RULES, uninformed_loss=2.0), troubled_run(seed))
        for alarm in alarms
    }
    assert raised == {rule.name for rule in RULES}


def test_state_of_other_rules_is_passed_over():
    saved = AlarmEngine(DEFAULT_ALARMS[:2])
    list(feed(saved, troubled_run(0)))
    AlarmEngine(DEFAULT_ALARMS[1:]).load_state_dict(saved.state_dict())


def test_a_state_of_before_there_were_pasts_evidence_and_snoozes_is_loaded():
    reports = list(troubled_run(0))
    saved, resumed = AlarmEngine(RULES), AlarmEngine(RULES)
    list(feed(saved, reports[:20]))
    resumed.snooze("*", until=10**6)
    state = saved.state_dict()
    del state["evidence"], state["snoozes"], state["history"]["pasts"]
    resumed.load_state_dict(state)
    for alarms in feed(resumed, reports[20:22]):
        assert not any(alarm.snoozed for alarm in alarms)
        assert all(len(alarm.evidence) <= 2 for alarm in alarms)
