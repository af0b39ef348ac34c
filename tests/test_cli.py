"""The command line: what it does, and what it says when it cannot."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from attnprobe import __version__
from attnprobe.cli import main
from attnprobe.experiments.markov.run import seeds_of
from attnprobe.experiments.markov.task import entropy_rate, sequences, transitions
from attnprobe.report import Alarm, StepReport
from attnprobe.writers import JSONLWriter, read_jsonl

SMALL = ["--steps", "60", "--seeds", "1", "--length", "64"]


def test_help_and_version() -> None:
    command = [sys.executable, "-m", "attnprobe.cli"]
    done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "markov" in done.stdout
    assert "toy" in done.stdout
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


@pytest.mark.parametrize("protocol", ["clean", "authors"])
def test_markov(protocol: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main(["markov", "--logdir", str(tmp_path), "--protocol", protocol, *SMALL]) == 0
    out, err = capfd.readouterr()
    assert f"tensorboard --logdir {tmp_path / 'run-002'}" in out
    assert "Traceback" not in err
    for text in ("normalized_entropy", "Alarms:", "held-out", "What it does not show"):
        assert text in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-001", "run-002"]  # nothing overwritten

    runs = sorted(tmp_path.glob("run-001/*/seed*"))
    assert len(runs) == 2
    for run in runs:
        lines = read_jsonl(run)
        assert [line["step"] for line in lines] == [0, 10, 20, 30, 40]
        assert all(json.dumps(line, allow_nan=False) for line in lines)
        assert len(list(run.glob("events*"))) == 1
        events = EventAccumulator(str(run), size_guidance={"tensors": 0, "scalars": 0}).Reload()
        assert len(events.Tensors("attnprobe/entropy")) == 5
        assert {"attention/entropy/min", "loss"} <= set(events.Tags()["scalars"])
    summary = json.loads((tmp_path / "run-001" / "summary.json").read_text())
    assert summary["protocol"] == protocol
    assert len(summary["runs"]) == 2
    again = json.loads((tmp_path / "run-002" / "summary.json").read_text())
    assert again["final_loss"] == summary["final_loss"]  # deterministic for a seed
    assert (tmp_path / "run-001" / "summary.png").stat().st_size > 10_000


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


def test_the_task_is_what_it_says() -> None:
    clean, authors = transitions("clean"), transitions("authors")
    assert clean.diagonal().tolist() == pytest.approx([0.3] * 8)
    assert authors.diagonal().tolist() == pytest.approx([0.3498] * 8, abs=5e-5)
    assert clean.sum(-1).tolist() == pytest.approx([1.0] * 8)
    assert entropy_rate("clean") == pytest.approx(1.8833, abs=5e-5)
    assert entropy_rate("authors") == pytest.approx(1.8292, abs=5e-5)
    assert seeds_of("authors", 6) == [42, 2024, 1337, 7777, 9999, 0]
    assert seeds_of("clean", 3) == [0, 1, 2]


def test_the_sequences_follow_the_chain() -> None:
    """Transition frequencies within five standard errors, and x is the mean of the previous symbol plus unit noise."""
    (first, second) = sequences("clean", 20_000, seed=1)
    pairs = first.y[:-1] * 8 + first.y[1:]
    counts = pairs.bincount(minlength=64).view(8, 8).double()
    expected = transitions("clean")
    error = (expected * (1 - expected) / counts.sum(1, keepdim=True)).sqrt()
    assert ((counts / counts.sum(1, keepdim=True) - expected).abs() < 5 * error).all()
    previous = first.y[:-1]
    for symbol in range(8):
        inside = first.x[1:][previous == symbol]
        assert inside.std(0).mean() == pytest.approx(1, abs=0.05)
    assert not first.x.equal(second.x)
