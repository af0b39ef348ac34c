"""A run that is saved and resumed anywhere raises what the uninterrupted run raises."""

import json
import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from attnprobe.alarms import DEFAULT_ALARMS, AlarmEngine
from tests.alarms.reports import NAN, feed, make_report

LAYERS = ("h.0", "h.1")
PROBES = 45


def troubled_run(seed):
    """Reports whose statistics stay for a while on one side of a threshold, or near it, or missing."""
    rng = random.Random(seed)

    def series(healthy, near, bad, shape):
        values = []
        while len(values) < PROBES:
            level = rng.choice([healthy, near, bad, bad, NAN])
            values += [[level] * shape if shape else level] * rng.randint(1, 9)
        return values[:PROBES]

    layers = {
        "logit_spread": (5.0, 90.0, 200.0, 2),
        "value_rms": (1.0, 18.0, 30.0, 2),
        "concentration": (0.3, 0.945, 0.99, 2),
        "shared_dead_columns": (0.0, 0.26, 0.4, 0),
        "entropy_8": (0.5, 0.7, 0.9, 0),
    }
    columns = {name: [series(*levels) for _ in LAYERS] for name, levels in layers.items()}
    losses = series(1.0, 1.97, 2.2, 0)
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


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), cut=st.integers(0, PROBES), uninformed=st.sampled_from([None, 2.0]))
def test_resuming_changes_nothing(seed, cut, uninformed):
    reports = list(troubled_run(seed))
    whole = list(feed(AlarmEngine(DEFAULT_ALARMS, uninformed_loss=uninformed), reports))

    first = AlarmEngine(DEFAULT_ALARMS, uninformed_loss=uninformed)
    before = list(feed(first, reports[:cut]))
    state = first.state_dict()
    assert json.loads(json.dumps(state, allow_nan=True)) == state
    second = AlarmEngine(DEFAULT_ALARMS, uninformed_loss=uninformed)
    list(feed(second, reports[:3]))  # loading replaces whatever was there
    second.load_state_dict(json.loads(json.dumps(state)))
    assert before + list(feed(second, reports[cut:])) == whole
    assert first.state_dict() == state  # and the saved state is nobody else's


def test_the_troubled_runs_raise_every_alarm():
    raised = {
        alarm.name
        for seed in range(20)
        for alarms in feed(AlarmEngine(DEFAULT_ALARMS, uninformed_loss=2.0), troubled_run(seed))
        for alarm in alarms
    }
    assert raised == {rule.name for rule in DEFAULT_ALARMS}


def test_state_of_other_rules_is_passed_over():
    saved = AlarmEngine(DEFAULT_ALARMS[:2])
    list(feed(saved, troubled_run(0)))
    AlarmEngine(DEFAULT_ALARMS[1:]).load_state_dict(saved.state_dict())
