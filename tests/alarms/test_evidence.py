"""The last readings, which an alarm shows as its evidence."""

import json

from attnprobe.alarms import AlarmEngine, LogitExplosion
from attnprobe.alarms.engine import EVIDENCE
from attnprobe.report import Alarm
from tests.alarms.reports import NAN, Script, alarms_of, make_report

RULE = LogitExplosion(patience=1, min_step=0)
HIGH = 2 * RULE.threshold


def probes(values, *, interval=10):
    return [make_report(interval * index, logit_spread=[[5.0, value]]) for index, value in enumerate(values)]


def test_evidence_is_step_and_value_of_the_probes_the_newest_last():
    (alarm,) = alarms_of(RULE, probes([6.0, 7.0, HIGH]))[-1]
    assert alarm.evidence == ((0, 6.0), (10, 7.0), (20, HIGH))
    assert alarm.evidence[-1] == (alarm.step, alarm.value)


def test_evidence_begins_before_the_alarm_and_goes_on_after_it():
    result = alarms_of(RULE, probes([6.0, HIGH, HIGH + 1]))
    assert [[value for _, value in alarm.evidence] for alarms in result for alarm in alarms] == [
        [6.0, HIGH],
        [6.0, HIGH, HIGH + 1],
    ]


def test_only_the_last_probes_are_kept():
    values = [HIGH + index for index in range(3 * EVIDENCE)]
    result = alarms_of(RULE, probes(values))
    assert [len(alarms[0].evidence) for alarms in result] == [min(index + 1, EVIDENCE) for index in range(len(values))]
    expected = [(10 * index, value) for index, value in enumerate(values)][-EVIDENCE:]
    assert result[-1][0].evidence == tuple(expected)


def test_probes_that_measured_nothing_are_no_evidence():
    (alarm,) = alarms_of(Script(text="F-F-FF", patience=1), [make_report(step) for step in range(6)])[-1]
    assert alarm.evidence == ((0, 0.0), (2, 2.0), (4, 4.0), (5, 5.0))
    reports = probes([6.0, NAN, HIGH])
    reports.insert(1, make_report(5, logit_spread=[[5.0, HIGH]], invalid="no backward"))
    (alarm,) = alarms_of(RULE, reports)[-1]
    assert [step for step, _ in alarm.evidence] == [0, 10, 20]  # the other head was measured at step 10


def test_layers_have_their_own_evidence():
    reports = [
        make_report(index, layers=("a", "b"), logit_spread=[[HIGH + index] * 2, [2 * HIGH + index] * 2])
        for index in range(2)
    ]
    assert {alarm.layer: alarm.evidence for alarm in alarms_of(RULE, reports)[-1]} == {
        "a": ((0, HIGH), (1, HIGH + 1)),
        "b": ((0, 2 * HIGH), (1, 2 * HIGH + 1)),
    }


def test_an_earlier_alarm_keeps_the_evidence_that_it_had():
    first, *_, last = alarms_of(RULE, probes([HIGH] * 5))
    assert len(first[0].evidence) == 1
    assert len(last[0].evidence) == 5


def test_evidence_survives_json():
    (alarm,) = alarms_of(RULE, probes([6.0, 1 / 3 * HIGH, HIGH]))[-1]
    data = json.loads(json.dumps(alarm.to_dict()))
    assert data["evidence"] == [[0, 6.0], [10, 1 / 3 * HIGH], [20, HIGH]]
    assert Alarm.from_dict(data) == alarm
    assert all(type(step) is int and type(value) is float for step, value in Alarm.from_dict(data).evidence)
    del data["evidence"], data["severity"], data["snoozed"]  # as earlier versions wrote it
    assert Alarm.from_dict(data).evidence == ()


def test_evidence_survives_a_restart():
    reports = probes([6.0 + index for index in range(EVIDENCE)] + [HIGH, HIGH + 1])
    first, second = AlarmEngine([RULE]), AlarmEngine([RULE])
    for report in reports[:-1]:
        first.update(report)
    state = first.state_dict()
    assert json.loads(json.dumps(state)) == state
    second.load_state_dict(json.loads(json.dumps(state)))
    assert second.update(reports[-1]) == first.update(reports[-1])
    assert json.loads(json.dumps(second.state_dict())) == first.state_dict()
    (alarm,) = second.update(make_report(500, logit_spread=[[5.0, HIGH]]))
    assert len(alarm.evidence) == EVIDENCE  # bounded after loading too
