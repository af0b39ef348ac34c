"""The text of ``attnprobe report``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from scipy.stats import median_abs_deviation

import attnprobe as ap
from attnprobe.alarms import LogitExplosion
from attnprobe.logs import LoggedRun, read_logs
from attnprobe.logs.episodes import Episodes
from attnprobe.logs.reports import ReportSource
from attnprobe.report import Alarm, StepReport
from attnprobe.run_summary import summarize
from attnprobe.run_summary.blocks import blocks
from attnprobe.run_summary.course import course, course_of, trend
from attnprobe.run_summary.heads import Head, HeadAlarm, StandsOut, stand_out, worst_first
from attnprobe.run_summary.spread import spread
from attnprobe.writers import JSONLWriter, TensorBoardWriter
from tests.probe.models import net, run
from tests.reproducible import reproducible

NAN, INF = math.nan, math.inf
#: Few different numbers, so that ties and agreement are frequent, and those that are none.
SMALL = st.one_of(st.sampled_from([0.0, 1.0, -2.0, 0.5, NAN, INF, -INF]), st.floats(-1e6, 1e6, width=32))


def alarm(step: int, value: float = 2.0, name: str = "rule", layer: str = "a", **changes: object) -> Alarm:
    options = {"heads": (0,), "since": 0, "threshold": 1.0, "advice": f"Mend {name}."}
    return Alarm(name=name, layer=layer, step=step, value=value, **(options | changes))  # type: ignore[arg-type]


def probe(step: int, *alarms: Alarm, **changes: object) -> StepReport:
    return StepReport(step, alarms=alarms, **changes)  # type: ignore[arg-type]


def measured(step: int, *alarms: Alarm, **statistics: Sequence[Sequence[float]]) -> StepReport:
    """A probe of layers a, b ... with one number for each of their heads, as many in every statistic."""
    rows = next(iter(statistics.values()))
    heads = tuple(map(len, rows))
    padded = {name: [[*row, *[NAN] * (max(heads) - len(row))] for row in values] for name, values in statistics.items()}
    return StepReport(
        step,
        tuple("abcdefgh"[: len(rows)]),
        heads,
        {name: torch.tensor(values, dtype=torch.float64) for name, values in padded.items()},
        alarms=alarms,
    )


def log(*reports: StepReport, name: str = "log") -> LoggedRun:
    return LoggedRun(name, ReportSource(reports))


def table(text: str, head: str) -> list[list[str]]:
    """The cells of the table whose head line begins so, without that line."""
    lines = text.split("\n")
    start = next(index for index, line in enumerate(lines) if re.match(rf"    {head}( |$)", line))
    body = []
    for line in lines[start + 1 :]:
        if not line.startswith("    ") or line.startswith("    and "):
            break
        body.append(re.split(r"\s{2,}", line.strip()))
    return body


def rows(text: str) -> list[list[str]]:
    return table(text, "alarm")


def test_head_lines() -> None:
    reports = [
        probe(0),
        probe(5, loss=2.5),
        probe(10, invalid="no\x1bbackward"),
        probe(15, loss=1.25),
        probe(20, invalid="scaler"),
    ]
    assert summarize({"lightning_logs/version_0": log(*reports), "b": log(), "c": log(probe(3))}) == (
        "lightning_logs/version_0\n"
        "  5 probes, step 0 to 20; loss 2.5 (step 5) -> 1.25 (step 15)\n"
        "  2 of them invalid, the last at step 20: scaler\n"
        "  no alarms\n"
        "\n"
        "b\n"
        "  no probes: nothing was logged yet, or the run ended before the first probed step\n"
        "\n"
        "c\n"
        "  1 probe, step 3 to 3; loss unknown\n"
        "  no alarms"
    )


def test_an_alarm_that_comes_again_is_a_row_of_its_own() -> None:
    reports = [
        probe(0),
        probe(10, alarm(10, 3.0, since=0, heads=(0, 1))),
        probe(20, alarm(20, 7.0, heads=(1, 2, 5), new=False), alarm(20, 4.0, "other", "")),
        probe(30, alarm(30, 2.0, heads=(1,), new=False, severity="information")),
        probe(40),
        probe(50, alarm(50, 5.0, since=45, snoozed=True, new=False)),
    ]
    assert rows(summarize({"run": log(*reports)})) == [
        ["rule", "information", "a", "0-2,5", "0", "10", "30", "cleared", "7", "1", "no"],
        ["other", "alarm", "run", "0", "0", "20", "20", "cleared", "4", "1", "no"],
        ["rule", "alarm", "a", "0", "45", "50", "50", "stands", "5", "1", "yes"],
    ]


@pytest.mark.parametrize(
    ("values", "peak"),
    [
        ([2.0, 5.0, 0.9], 5.0),
        ([0.5, 0.2, 1.1], 0.2),  # a rule about what is too small
        ([math.nan, 3.0, 4.0], 4.0),
        ([2.0, math.inf, 3.0], math.inf),
    ],
)
def test_the_peak_lies_beyond_the_threshold(values: Sequence[float], peak: float) -> None:
    (episode,) = Episodes([alarm(step, value)] for step, value in enumerate(values)).found
    assert episode.peak.value == peak


def test_a_peak_that_is_no_number_is_a_dash() -> None:
    ((*_, peak, _threshold, _snoozed),) = rows(summarize({"run": log(probe(0, alarm(0, math.nan)))}))
    assert peak == "-"


def test_evidence_of_the_last_report_and_advice_once() -> None:
    reports = [
        probe(0, alarm(0, evidence=((0, 9.0),)), alarm(0, layer="deeper.b"), alarm(0, 2.0, "another")),
        probe(1, alarm(1, evidence=((0, 2.0), (1, 2.25))), alarm(1, layer="deeper.b", evidence=((1, math.nan),))),
    ]
    text = summarize({"run": log(*reports)})
    evidence = text[text.index("  evidence") :]
    assert evidence == (
        "  evidence, the last probes of each as step:value:\n"
        "    rule, a         0:2 1:2.25\n"
        "    rule, deeper.b  1:-\n"
        "  what to try:\n"
        "    another: Mend another.\n"
        "    rule: Mend rule."
    )


def test_text_from_logs_cannot_move_the_cursor() -> None:
    hostile = "h\n\x1b[31m\u202e<b>"
    raised = alarm(0, name=hostile, layer=hostile, advice=hostile, severity=hostile, evidence=((0, 1.0),))
    values = {name: torch.tensor([[1.0, 2.0, NAN]], dtype=torch.float64) for name in (hostile, "sink_mass")}
    first = probe(0, raised, layers=(hostile,), heads=(3,), statistics=values, warnings=(hostile,) * 5)
    text = summarize({hostile: log(first, probe(1, invalid=hostile))})
    assert len(text.split("\n")) == 25
    assert all(line.isprintable() for line in text.split("\n"))


def test_warnings_are_counted_and_the_first_shown() -> None:
    reports = [probe(0, warnings=("one", "two")), probe(1, warnings=("one", "three", "four"))]
    assert "\n  4 warnings, the first 3:\n    one\n    two\n    three\n  no alarms" in summarize({"": log(*reports)})
    assert "\n  1 warning:\n    one\n" in summarize({"": log(probe(0, warnings=("one",)))})


def test_what_could_not_be_read_is_said_first() -> None:
    found = log(probe(0))
    found.source.problems = ["damaged\x1b"]  # type: ignore[misc]
    assert summarize({"": found}).startswith("\n  1 problem:\n    damaged\\x1b\n  1 probe,")


def test_long_texts_are_wrapped() -> None:
    advice = "Lower the learning-rate of layers.11.self_attn. " * 10
    text = summarize({"": log(probe(0, alarm(0, advice=advice), invalid=advice, warnings=(advice, "x" * 200)))})
    lines = text.split("\n")
    assert max(map(len, lines)) == 204
    assert [len(line) for line in lines if len(line) > 160] == [204]  # a name is not broken
    assert " ".join(text.split()).count(advice.strip()) == 3


@reproducible(300)
@given(arrays(np.float64, array_shapes(max_dims=2, max_side=9, min_side=0), elements=SMALL))
def test_spread_is_the_median_absolute_deviation(values: NDArray[np.float64]) -> None:
    finite = values[np.isfinite(values)]
    found = spread(values)
    if not finite.size:
        assert np.isnan(found).all()
        return
    expected = float(median_abs_deviation(finite, axis=None, scale=1 / 1.4826))
    if expected == 0:
        expected = 1.2533 * np.abs(finite - np.median(finite)).mean()
    if expected:
        expected = max(expected, np.median(np.abs(finite)) / 100)
    assert found == pytest.approx((np.median(finite), expected))
    assert (found.width == 0) == (len(set(finite.tolist())) == 1)


def test_spread_of_a_normal_distribution_is_its_standard_deviation() -> None:
    assert spread(np.random.default_rng(0).normal(3, 2, 100_000)) == pytest.approx((3, 2), rel=0.01)


def test_numbers_beyond_the_range_of_floats_raise_no_warning() -> None:
    huge = np.array([[1e308, -1e308, 1.7e308, -1.7e308]])
    assert not stand_out({"max_logit": huge}, huge.shape).keys() - {(0, head) for head in range(4)}


@reproducible(200)
@given(st.data())
def test_a_head_stands_out_by_its_largest_distance(data: st.DataObject) -> None:
    shape = data.draw(array_shapes(min_dims=2, max_dims=2, max_side=5))
    statistics = {name: data.draw(arrays(np.float64, shape, elements=SMALL)) for name in ("x", "y", "z")}
    # With four heads a layer's own median counts; with fewer, or with gaps, that of all heads.
    found = stand_out(statistics, shape)
    for where in np.ndindex(*shape):
        distances = {}
        for name, values in statistics.items():
            layer = values[where[0]]
            peers = layer if np.isfinite(layer).sum() >= 4 else values
            finite = peers[np.isfinite(peers)]
            if math.isfinite(values[where]) and len({*finite.tolist()}) > 1:
                distances[name] = abs(values[where] - np.median(finite)) / spread(peers).width
            elif math.isinf(values[where]) and finite.size:
                distances[name] = INF
        largest = max(distances.values(), default=0.0)
        if largest < 0.0004:
            assert where not in found
        elif largest > 0.0006:
            one = found[where]
            for expected in (largest, distances[one.statistic]):
                assert one.distance == pytest.approx(expected, rel=1e-9, abs=0.0006)
            assert one.value == statistics[one.statistic][where]


def test_of_statistics_that_stand_out_alike_the_first_counts() -> None:
    values = np.array([[1.0, 2.0, 3.0, 9.0]])
    found = stand_out({"x": values, "y": 7 * values, "same": np.full((1, 4), 2.0)}, (1, 4))
    assert {one.statistic for one in found.values()} == {"x"}
    assert found[0, 3] == ("x", 9.0, 2.5, pytest.approx(6.5 / 1.4826, abs=0.001))


def test_the_worst_heads_come_first() -> None:
    values = [[1.0, 1.1, 1.2, 1.3], [1.4, 9.0, 1.6, NAN], [1.15]]
    severe, mild = alarm(0, heads=(2,)), alarm(0, layer="b", name="mild", severity="information", heads=(0, 2))
    gone = alarm(0, layer="a", name="gone", heads=(0, 3))
    second = alarm(1, layer="b", name="also", severity="information", heads=(2,))
    narrower = alarm(1, layer="b", name="mild", severity="information", heads=(2,))
    found = log(
        measured(0, severe, mild, gone, entropy=values),
        measured(1, alarm(1, heads=(2,)), narrower, second, entropy=values),
    )
    heads = worst_first(found)
    assert [(head.layer, head.head) for head in heads][:5] == [("a", 2), ("b", 2), ("a", 0), ("a", 3), ("b", 0)]
    assert heads[0].alarms == (HeadAlarm("rule", "alarm", True),)
    assert heads[4].alarms == (HeadAlarm("mild", "information", False),)  # it stands, for another head
    assert (heads[5].layer, heads[5].head) == ("b", 1)
    assert not heads[-1].measured
    assert len(heads) == 9


ALARMS = st.lists(
    st.builds(HeadAlarm, st.just("x"), st.sampled_from(["alarm", "information"]), st.booleans()), max_size=3
)


@reproducible(200)
@given(st.lists(st.tuples(ALARMS, st.sampled_from([None, 0.5, 2.0, INF])), max_size=8))
def test_standing_alarms_before_cleared_ones_before_the_rest(drawn: list[tuple[list[HeadAlarm], float | None]]) -> None:
    heads = [
        Head("a", 0, number, tuple(alarms), None if far is None else StandsOut("x", 1.0, 0.0, far), True)
        for number, (alarms, far) in enumerate(drawn)
    ]

    def rank(head: Head) -> tuple[float, ...]:
        kinds = [[each.severity for each in head.alarms if each.standing is state] for state in (True, False)]
        counts = [(kind.count("alarm"), len(kind)) for kind in kinds]
        state = 2 if kinds[0] else 1 if kinds[1] else 0
        return (state, *counts[0], *counts[1], head.stands_out.distance if head.stands_out else 0.0, -head.head)

    by_urgency = sorted(heads, key=lambda head: head.urgency)
    assert by_urgency == sorted(heads, key=rank, reverse=True)


def test_the_table_of_heads() -> None:
    first = measured(0, sink_mass=[[0.1, 0.2, 0.3], [0.2, 0.25]], own=[[1.0, 2.0, NAN], [3.0, 4.0]])
    last = measured(
        9, alarm(9, heads=(1,)), sink_mass=[[0.1, 0.1, NAN], [0.9, 0.25]], own=[[INF, 2.0, NAN], [3.0, 4.0]]
    )
    text = summarize({"": log(first, last)})
    assert table(text, "layer +head +alarms") == [
        ["a", "1", "rule", "sink_mass", "0.1", "0.175", "0.7"],
        ["a", "0", "-", "own", "inf", "3", "inf"],
        ["b", "0", "-", "sink_mass", "0.9", "0.175", "6.5"],
        ["b", "1", "-", "sink_mass", "0.25", "0.175", "0.7"],
        ["a", "2", "-", "-", "-", "-", "-"],
    ]
    assert table(text, "layer +head +sink_mass") == [
        ["a", "1", "0.2 -> 0.1 v"],
        ["a", "0", "0.1 -> 0.1 ="],
        ["b", "0", "0.2 -> 0.9 ^"],
        ["b", "1", "0.25 -> 0.25 ="],
        ["a", "2", "0.3 -> 0.3 ="],
    ]
    assert "\n  5 heads, worst first" in text
    assert "at step 9" in text
    assert "not by itself a fault" in text


def test_heads_that_were_not_measured_are_said_to_be_so() -> None:
    values = [[1.0, NAN, NAN, NAN, 3.0], [NAN]]
    text = summarize({"": log(measured(0, entropy=values))})
    assert "\n  nothing was measured of 4 heads: a 1-3, b 0\n" in text
    assert [row[3] for row in table(text, "layer +head +alarms")] == ["entropy"] * 2 + ["nothing measured"] * 4
    text = summarize({"": log(measured(0, entropy=[[NAN, NAN], [NAN]]))})
    assert text.endswith("\n  no alarms\n  nothing was measured of its 3 heads")
    many = summarize({"": log(measured(0, entropy=[[NAN]] * 7 + [[1.0]]))})
    assert "of 7 heads: a 0, b 0, c 0, d 0, e 0, 2 more layers" in many


def test_a_head_measured_earlier_is_measured() -> None:
    found = log(
        measured(0, x=[[1.0, NAN]], y=[[1.0, NAN]]),
        measured(1, x=[[1.0, NAN]], y=[[NAN, 5.0]]),
        measured(2, x=[[1.0, NAN]], y=[[1.0, NAN]]),
    )
    assert [head.measured for head in worst_first(found)] == [True, True]


def test_invalid_probes_do_not_count() -> None:
    wrong = measured(2, max_logit=[[900.0, 1.0, 1.0]])
    bad = StepReport(2, wrong.layers, wrong.heads, wrong.statistics, invalid="broken")
    found = log(bad, measured(3, max_logit=[[1.0, 2.0, 3.0]]), bad)
    text = summarize({"": found})
    assert "at step 3," in text
    assert "900" not in text
    assert table(text, "layer +head +max_logit") == [["a", "0", "1"], ["a", "2", "3"], ["a", "1", "2"]]


def test_one_head_has_no_others_to_stand_out_from() -> None:
    text = summarize({"": log(measured(0, entropy=[[1.0]]), measured(1, entropy=[[2.0]]))})
    assert table(text, "layer +head +alarms") == [["a", "0", "-", "-", "-", "-", "-"]]
    assert "\n  1 head, worst first" in text
    assert "distance:" not in text


@pytest.mark.parametrize(("limit", "shown", "more"), [(10, 10, "and 2 more"), (3, 3, "and 9 more"), (0, 12, "")])
def test_how_many_heads_are_shown(limit: int, shown: int, more: str) -> None:
    text = summarize({"": log(measured(0, sink_mass=[[*map(float, range(12))]]))}, limit)
    assert len(table(text, "layer +head +alarms")) == len(table(text, "layer +head +sink_mass")) == shown
    assert more in text
    assert ("more;" in text) == bool(more)


def test_many_alarms_of_a_head_are_counted() -> None:
    text = summarize({"": log(measured(0, *(alarm(0, name=name) for name in "wxyz"), entropy=[[1.0, 2.0]]))})
    assert table(text, "layer +head +alarms")[0][2] == "w, x, 2 more"


def test_layers_that_come_later_keep_their_heads() -> None:
    later = measured(5, entropy=[[1.0], [4.0, 5.0, 6.0]])
    found = log(measured(0, entropy=[[2.0, 3.0]]), later)
    assert {(head.layer, head.head) for head in worst_first(found)} == {
        ("a", 0),
        ("a", 1),
        *(("b", n) for n in range(3)),
    }
    assert course_of(found, "entropy").first[1].tolist() == [4.0, 5.0, 6.0]


@reproducible(200)
@given(arrays(np.float64, st.tuples(st.integers(0, 6), st.integers(1, 3)), elements=SMALL))
def test_course(values: NDArray[np.float64]) -> None:
    found = course(values)
    for index, column in enumerate(values.T.tolist()):
        known = [value for value in column if not math.isnan(value)] or [NAN]
        expected = (known[0], known[-1], min(known), max(known))
        assert [float(each[index]) for each in found] == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize(
    ("first", "last", "text"),
    [
        (1.0, 2.0, "1 -> 2 ^"),
        (0.99951, 0.99949, "1 -> 0.999 v"),
        (1.0001, 1.0002, "1 -> 1 ="),
        (-1e-9, 0.0, "-1e-09 -> 0 ^"),
        (1.0, -INF, "1 -> -inf v"),
        (INF, INF, "inf -> inf ="),
        (NAN, NAN, "-"),
        (NAN, 1.23456, "1.23"),
    ],
)
def test_trend(first: float, last: float, text: str) -> None:
    assert trend(first, last) == text


def test_a_table_wider_than_a_terminal_goes_on_below() -> None:
    names = [["layer", "a    "], ["head", "   0"]]
    columns = [[f"{letter}" * 40, " " * 39 + letter] for letter in "wxyz"]
    lines = [*blocks(names, columns)]
    assert [line.split() for line in lines] == [
        ["layer", "head", *(letter * 40 for letter in "wxy")],
        ["a", "0", *"wxy"],
        ["layer", "head", "z" * 40],
        ["a", "0", "z"],
    ]
    assert max(map(len, lines)) <= 156
    too_wide = [["x" * 300, "y" * 300]]
    assert next(blocks(names, too_wide)).endswith("x" * 300)


def test_a_model_of_144_heads_fits_a_terminal() -> None:
    generator = torch.Generator().manual_seed(0)
    layers = tuple(f"transformer.h.{index}.attn" for index in range(12))
    reports = []
    for step in (0, 5000):
        random = {name: torch.rand(12, 12, generator=generator, dtype=torch.float64) * 1e-5 for name in ap.STATISTICS}
        raised = [alarm(step, name=name, layer=layers[7], heads=(0, 5, 11)) for name in ("logit_explosion", "stalled")]
        reports.append(StepReport(step, layers, (12,) * 12, random, alarms=tuple(raised)))
    text = summarize({"version_0/attention.jsonl": log(*reports)})
    assert max(map(len, text.split("\n"))) <= 160


def test_a_training_reads_the_same_from_either_format(tmp_path: Path) -> None:
    model = net(heads=(2, 4))
    writers = [JSONLWriter(tmp_path / "lines"), TensorBoardWriter(tmp_path / "events")]
    rule = LogitExplosion(threshold=0.0, patience=2)
    with ap.AttentionProbe(model, every_n_steps=1, alarms=rule, action="record", writers=writers) as watched:
        reports = run(watched, model, 3)
    logs = read_logs(tmp_path)
    of_events, of_lines = (summarize({"": one}) for one in logs.values())
    assert of_events == of_lines == summarize({"": log(*reports)})
    assert [row[:8] for row in rows(of_lines)] == [
        ["logit_explosion", "alarm", f"layers.{layer}", heads, "0", "1", "2", "stands"]
        for layer, heads in enumerate(("0-1", "0-3"))
    ]
    assert " ".join(of_lines.split()).count(rule.advice) == 1
    assert max(map(len, of_lines.split("\n"))) <= 160
    assert len(table(of_lines, "layer +head +alarms")) == 6
