"""What appears in the terminal, and what does not."""

from __future__ import annotations

import io
import math

import pytest
import torch
from sample_reports import HOSTILE, alarm, every_kind, full_report

from attnprobe.errors import UnknownNameError
from attnprobe.report import StepReport
from attnprobe.writers.console import ConsoleWriter, table


def printed(*reports: StepReport, **options: object) -> str:
    stream = io.StringIO()
    writer = ConsoleWriter(stream, **options)  # type: ignore[arg-type]
    for report in reports:
        writer.write(report)
    return stream.getvalue()


def test_a_healthy_run_prints_nothing() -> None:
    assert printed(full_report(0), full_report(50)) == ""


def test_findings_are_one_line_each_and_said_once() -> None:
    text = printed(
        full_report(0, warnings=("h.3: autograd.Function",)),
        full_report(50, warnings=("h.3: autograd.Function", "h.4: nested tensor"), alarms=(alarm(50),)),
        full_report(100, warnings=("h.4: nested tensor",), alarms=(alarm(100, new=False),)),
        StepReport(150, invalid="no backward ran"),
        StepReport(200, invalid="no backward ran"),
        StepReport(250, invalid="overflow"),
        full_report(300),
        StepReport(350, invalid="overflow"),
    )
    assert text.splitlines() == [
        "attnprobe: step 0: warning: h.3: autograd.Function",
        "attnprobe: step 50: warning: h.4: nested tensor",
        "attnprobe: step 50: alarm logit_explosion: transformer.h.0.attn heads 0, 2, step 50 (since 0): "
        "123.5 against a threshold of 50. Lower the learning rate.",
        "attnprobe: step 150: not measured: no backward ran",
        "attnprobe: step 250: not measured: overflow",
        "attnprobe: step 350: not measured: overflow",
    ]


def test_standard_error_is_the_default(capsys: pytest.CaptureFixture[str]) -> None:
    ConsoleWriter().write(full_report(5, alarms=(alarm(5),)))
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("attnprobe: step 5: alarm logit_explosion")


def test_names_cannot_control_the_terminal() -> None:
    text = printed(*every_kind(), table=True)
    assert set(text) - {"\n"} == {c for c in text if c.isprintable()}
    assert r"\x1b[31m\u202e" in text
    assert all(HOSTILE not in line for line in text.splitlines())


def test_a_stream_that_cannot_encode_a_name_shows_an_escape() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), "ascii")
    ConsoleWriter(stream).write(full_report(warnings=("café",)))
    stream.seek(0)
    assert r"caf\xe9" in stream.read()


def test_the_table_comes_every_nth_probe() -> None:
    text = printed(*(full_report(step) for step in range(7)), table=True, every=3)
    assert [line for line in text.splitlines() if line.startswith("attnprobe")] == [
        f"attnprobe: step {step}" for step in (0, 3, 6)
    ]


def test_the_table_of_a_run() -> None:
    def report(step: int, values: list[list[float]]) -> StepReport:
        return StepReport(step, ("h.0", "h.10"), (2, 1), {"entropy": torch.tensor(values, dtype=torch.float64)})

    first, last = report(0, [[1, 22.5], [math.nan, 0]]), report(9, [[0.12345, 2], [math.inf, 0]])
    assert table(first, last, ["entropy"]) == (
        "layer  head         entropy\n"
        "h.0       0     1 -> 0.1235\n"
        "h.0       1  22.5 ->      2\n"
        "h.10      0     - ->    inf"
    )
    assert table(None, last, ["entropy"]).splitlines()[1] == "h.0       0   0.1235"


def test_the_table_takes_layers_that_came_later_and_statistics_that_went() -> None:
    first = StepReport(0, ("a",), (1,), {"entropy": torch.ones(1, 1), "sink_mass": torch.ones(1, 1)})
    last = StepReport(9, ("b", "a"), (1, 1), {"entropy": torch.zeros(2, 1)})
    rows = [line.split() for line in table(first, last, ["entropy", "sink_mass"]).splitlines()]
    assert rows[1:] == [["b", "0", "-", "->", "0", "-", "->", "-"], ["a", "0", "1", "->", "0", "1", "->", "-"]]
    with pytest.raises(UnknownNameError, match="Did you mean 'entropy'"):
        table(first, last, ["entrpy"])


def test_the_table_of_nothing_is_its_heading() -> None:
    assert table(None, StepReport(0, statistics={"entropy": torch.empty(0, 0)}), ["entropy"]) == "layer  head  entropy"
