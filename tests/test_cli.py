"""The command line: what it does, and what it says when it cannot."""

import subprocess
import sys
from pathlib import Path

import pytest

from attnprobe import __version__
from attnprobe.cli import main
from attnprobe.report import Alarm, StepReport
from attnprobe.writers import JSONLWriter


def test_help_and_version() -> None:
    command = [sys.executable, "-m", "attnprobe.cli"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "markov" in done.stdout
    assert "toy" in done.stdout
    assert "paper" in done.stdout
    assert "report" in done.stdout
    assert "calibrate" in done.stdout
    assert __version__ in subprocess.run([*command, "--version"], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "COMMAND"),
        (["nonsense"], "invalid choice"),
        (["markov", "--steps", "0"], "must be at least 1"),
        (["markov", "--steps", "many"], "whole number"),
        (["markov", "--length", "1"], "must be at least 2"),
        (["markov", "--protocol", "other"], "invalid choice"),
        (["markov", "--jobs", "0"], "must be at least 1"),
        (["paper", "manifold", "--seeds", "0"], "must be at least 1"),
        (["toy", "--lr", "fast"], "invalid float"),
        (["report"], "RUN_DIR"),
        (["calibrate"], "RUN_DIR"),
        (["calibrate", "runs", "--alarms", "none"], "invalid choice"),
    ],
)
def test_wrong_options_exit_with_2(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("command", [["markov", "--logdir"], ["toy", "--out"]])
def test_a_place_that_cannot_be_written(command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main([*command, str(tmp_path / "file" / "x.png")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("attnprobe: error:")
    assert str(tmp_path / "file") in error


def test_toy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["toy", "--out", str(tmp_path / "toy.png"), "--steps", "20"]) == 0
    assert (tmp_path / "toy.png").stat().st_size > 10_000
    assert "toy.png" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "said"), [(["markov", "--arms", "sgd,lion"], "no arm is called 'lion'"),
                                                 (["paper", "nonsense"], "manifold")])  # fmt: skip
def test_names_that_stand_for_nothing(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_papers_experiments_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper"]) == 0
    out = capsys.readouterr().out
    assert "manifold" in out
    assert "?" in out


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raised = Alarm("logit_explosion", "encoder.attn", (0, 1), 10, 0, 130.0, 100.0, "Lower the learning rate.")
    writer = JSONLWriter(tmp_path / "lightning_logs" / "version_0")
    writer.write(StepReport(0, loss=2.0))
    writer.write(StepReport(10, loss=1.0, alarms=(raised,)))
    for place in (tmp_path, writer.path):
        assert main(["report", str(place)]) == 0
        out = capsys.readouterr().out
        for text in ("attention.jsonl", "2 probes, step 0 to 10", "encoder.attn", "stands", "Lower the learning rate."):
            assert text in out


def test_report_of_a_place_without_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place, said in ((tmp_path, "no log found in"), (tmp_path / "missing", "does not exist")):
        assert main(["report", str(place)]) == 2
        out, error = capsys.readouterr()
        assert error.startswith("attnprobe: error:")
        assert said in error
        assert not out
