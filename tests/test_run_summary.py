"""The text of ``attnprobe report``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

import attnprobe as ap
from attnprobe.alarms import LogitExplosion
from attnprobe.logs import read_run
from attnprobe.logs.episodes import Episodes
from attnprobe.report import Alarm, StepReport
from attnprobe.run_summary import summarize
from attnprobe.writers import JSONLWriter, TensorBoardWriter
from tests.probe.models import net, run


def alarm(step: int, value: float = 2.0, name: str = "rule", layer: str = "a", **changes: object) -> Alarm:
    options = {"heads": (0,), "since": 0, "threshold": 1.0, "advice": f"Mend {name}."}
    return Alarm(name=name, layer=layer, step=step, value=value, **(options | changes))  # type: ignore[arg-type]


def probe(step: int, *alarms: Alarm, **changes: object) -> StepReport:
    return StepReport(step, alarms=alarms, **changes)  # type: ignore[arg-type]


def rows(text: str) -> list[list[str]]:
    """The cells of the table of alarms, without its head."""
    lines = text.split("\n")
    start = next(index for index, line in enumerate(lines) if line.startswith("    alarm "))
    body = []
    for line in lines[start + 1 :]:
        if not line.startswith("    "):
            break
        body.append(re.split(r"\s{2,}", line.strip()))
    return body


def test_head_lines() -> None:
    reports = [
        probe(0),
        probe(5, loss=2.5),
        probe(10, invalid="no\x1bbackward"),
        probe(15, loss=1.25),
        probe(20, invalid="scaler"),
    ]
    assert summarize({"lightning_logs/version_0": reports, "b": [], "c": [probe(3)]}) == (
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
    assert rows(summarize({"run": reports})) == [
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
    ((*_, peak, _threshold, _snoozed),) = rows(summarize({"run": [probe(0, alarm(0, math.nan))]}))
    assert peak == "-"


def test_evidence_of_the_last_report_and_advice_once() -> None:
    reports = [
        probe(0, alarm(0, evidence=((0, 9.0),)), alarm(0, layer="deeper.b"), alarm(0, 2.0, "another")),
        probe(1, alarm(1, evidence=((0, 2.0), (1, 2.25))), alarm(1, layer="deeper.b", evidence=((1, math.nan),))),
    ]
    text = summarize({"run": reports})
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
    hostile = "h\n\x1b[31m\u202e"
    raised = alarm(0, name=hostile, layer=hostile, advice=hostile, severity=hostile, evidence=((0, 1.0),))
    text = summarize({hostile: [probe(0, raised), probe(1, invalid=hostile)]})
    assert text.count("\n") == 9
    assert all(line.isprintable() for line in text.split("\n"))


def test_a_training_reads_the_same_from_either_format(tmp_path: Path) -> None:
    model = net()
    writers = [JSONLWriter(tmp_path / "lines"), TensorBoardWriter(tmp_path / "events")]
    rule = LogitExplosion(threshold=0.0, patience=2)
    with ap.AttentionProbe(model, every_n_steps=1, alarms=rule, action="record", writers=writers) as watched:
        reports = run(watched, model, 3)
    logs = read_run(tmp_path)
    of_events, of_lines = (summarize({"": log}) for log in logs.values())
    assert of_events == of_lines == summarize({"": reports})
    assert [row[:8] for row in rows(of_lines)] == [
        ["logit_explosion", "alarm", f"layers.{layer}", "0-1", "0", "1", "2", "stands"] for layer in (0, 1)
    ]
    assert of_lines.count(rule.advice) == 1
