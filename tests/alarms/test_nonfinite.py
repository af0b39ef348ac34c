import math

import torch

from attnprobe.alarms import NonFinite
from attnprobe.report import StepReport
from tests.alarms.reports import NAN, alarms_of, make_report, standing

LAYERS = ("h.0", "h.1", "h.2")


def one(**nonfinite):
    loss = nonfinite.pop("loss", 1.0)
    return make_report(7, layers=LAYERS, loss=loss, nonfinite=nonfinite)


def found(report):
    (alarms,) = alarms_of(NonFinite(), [report])
    return [(alarm.layer, alarm.heads, alarm.value) for alarm in alarms]


def test_clean_reports_are_silent():
    assert found(one()) == []
    assert found(StepReport(step=0)) == []
    assert found(one(loss=NAN)) == []  # nobody passed the loss
    assert found(one(query=[[NAN, NAN]] * 3)) == []


def test_names_the_first_layer_with_bad_inputs_at_once():
    report = one(query=[[0, 0], [0, 3], [5, 5]], key=[[0, 0], [0, 1], [5, 5]], error=[[9, 9]] * 3)
    assert found(report) == [("h.1", (1,), 4.0)]
    ((alarm,),) = alarms_of(NonFinite(), [report])
    assert alarm.advice.startswith("NaN or Inf in query, key.")
    assert (alarm.step, alarm.since, alarm.threshold, alarm.new) == (7, 7, 0.0, True)


def test_names_the_last_layer_where_only_errors_are_bad():
    assert found(one(error=[[4, 4], [0, 2], [0, 0]])) == [("h.1", (1,), 2.0)]


def test_a_bad_loss_comes_before_the_errors_that_it_causes():
    assert found(one(error=[[4, 4]] * 3, loss=math.inf)) == [("", (), 1.0)]
    assert found(one(loss=-math.inf)) == [("", (), 1.0)]


def test_a_nan_loss_counts_where_the_report_says_so():
    report = make_report(7, loss=NAN, nonfinite={"loss": [1]})
    assert found(report) == [("", (), 1.0)]
    assert found(make_report(7, loss=NAN, nonfinite={"loss": [0]})) == []


def test_bad_inputs_come_before_the_loss():
    assert found(one(value=[[0, 0], [0, 0], [1, 0]], loss=math.inf)) == [("h.2", (0,), 1.0)]


def test_logits_are_inputs_too():
    assert found(one(logits=[[0, 0], [1, 1], [1, 1]], error=[[1, 1]] * 3)) == [("h.1", (0, 1), 2.0)]


def test_reads_invalid_reports():
    report = make_report(0, invalid="two backwards", nonfinite={"value": [[1, 0]]})
    assert standing(alarms_of(NonFinite(), [report])) == [True]


def test_integer_counts():
    report = make_report(0, nonfinite={"value": torch.tensor([[2, 0]]).tolist()})
    assert found(report) == [("attn", (0,), 2.0)]


def test_a_layer_that_is_measured_no_more_hides_no_other():
    first = make_report(0, layers=("a",), nonfinite={"query": [[1, 0]]})
    later = [make_report(step, layers=("b",), nonfinite={"query": [[0, int(step > 1)]]}) for step in (1, 2, 3)]
    result = alarms_of(NonFinite(), [first, *later])
    found = [[(alarm.layer, alarm.new) for alarm in alarms] for alarms in result]
    assert found == [[("a", True)], [("a", False)], [("a", False), ("b", True)], [("a", False), ("b", False)]]


def test_the_origin_keeps_the_blame_while_everything_is_nan():
    spread = one(query=[[9, 9]] * 3, error=[[9, 9]] * 3)
    result = alarms_of(NonFinite(), [one(query=[[0, 0], [0, 0], [0, 1]]), spread, spread])
    assert [[alarm.layer for alarm in alarms] for alarms in result] == [["h.2"]] * 3
    assert [alarms[0].new for alarms in result] == [True, False, False]


def test_clears_when_finite_again_and_names_a_new_origin_at_the_same_probe():
    reports = [one(value=[[0, 0], [1, 0], [0, 0]]), one(error=[[2, 0], [0, 0], [0, 0]]), one()]
    result = alarms_of(NonFinite(), reports)
    assert [[alarm.layer for alarm in alarms] for alarms in result] == [["h.1"], ["h.0"], []]


def test_an_unknown_loss_leaves_the_alarm_of_a_bad_one_standing():
    result = alarms_of(NonFinite(), [one(loss=math.inf), one(loss=NAN), one(loss=1.0)])
    assert standing(result) == [True, True, False]
