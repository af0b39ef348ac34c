"""Every example, run as a user would, at a small size in an empty directory; its files are read back."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

EXAMPLES = Path(__file__).parents[1] / "examples"
ALL = sorted(path.stem for path in EXAMPLES.glob("*.py"))

# What Lightning itself writes to standard error; anything else there is a finding.
THIRD_PARTY = re.compile(
    r"""
    (GPU|TPU|HPU)\ available:
    | .*litlogger
    | .*(pytorch_lightning|lightning)/.*(LeafSpec|does\ not\ have\ many\ workers)
    | `Trainer\.fit`\ stopped:
    """,
    re.VERBOSE,
)


def run(name: str, directory: Path, *options: str) -> str:
    """Standard output of an example, which must end well and have nothing to complain about."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *options],
        cwd=directory,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    complaints = [line for line in done.stderr.splitlines() if line.strip() and not THIRD_PARTY.match(line)]
    assert complaints == []
    return done.stdout


def read_events(directory: Path) -> EventAccumulator:
    """The only event file of a directory."""
    [path] = directory.glob("events.*")
    return EventAccumulator(str(path), {"tensors": 0, "scalars": 0, "images": 0}).Reload()


def heads_over_time(events: EventAccumulator, name: str) -> dict[int, np.ndarray]:
    """Step -> ``[layers, heads]``."""
    return {event.step: make_ndarray(event.tensor_proto) for event in events.Tensors(f"attnprobe/{name}")}


@pytest.mark.parametrize("name", ALL)
def test_importing_runs_nothing_and_help_explains(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = __import__(name)
    assert capsys.readouterr() == ("", "")
    with pytest.raises(SystemExit) as exit_:
        example.main(["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert f"python examples/{name}.py" in text
    assert f"runs/{name}" in text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "option"), [("lightning_text", "--steps"), ("plain_loop", "--epochs")])
def test_nothing_to_do_is_refused(
    name: str, option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    with pytest.raises(SystemExit) as exit_:
        __import__(name).main([option, "0"])
    assert exit_.value.code == 2
    assert f"{option} must be at least 1" in capsys.readouterr().err


def test_lightning_text(tmp_path: Path) -> None:
    out = run("lightning_text", tmp_path, "--steps", "12", "--batch-size", "4", "--logdir", "logs")
    assert list(tmp_path.iterdir()) == [tmp_path / "logs"]
    version = tmp_path / "logs" / "version_0"

    events = read_events(version)
    entropy, previous = heads_over_time(events, "normalized_entropy"), heads_over_time(events, "previous_share")
    assert list(entropy) == list(previous) == [0, 10]
    assert entropy[0].shape == previous[0].shape == (2, 4)
    assert (entropy[0] > 0.9).all(), "attention starts out diffuse"
    assert ((previous[10] > 0) & (previous[10] < 1)).all()
    assert [event.step for event in events.Scalars("attention/normalized_entropy/mean")] == [0, 10]
    assert {"train_loss", "val_loss"} <= set(events.Tags()["scalars"])

    lines = [json.loads(line) for line in (version / "attention.jsonl").read_text("utf-8").splitlines()]
    assert [line["step"] for line in lines] == [0, 10]
    assert all(line["valid"] and line["layers"] == ["blocks.0.attention", "blocks.1.attention"] for line in lines)
    np.testing.assert_allclose(lines[1]["statistics"]["previous_share"], previous[10], rtol=1e-6)

    assert re.search(r"^blocks\.1\.attention +3 .* -> ", out, re.MULTILINE)
    # Twelve steps are enough to learn which characters are frequent, and no more.
    held_out, unigram = (
        float(re.search(rf"([\d.]+)  {what}", out)[1]) for what in ("held-out text", "unigram entropy")
    )
    assert 4 < unigram < 5
    assert unigram - 1 < held_out < 7
    assert "tensorboard --logdir logs" in out


def test_plain_loop(tmp_path: Path) -> None:
    out = run("plain_loop", tmp_path, "--epochs", "2", "--batch-size", "128", "--logdir", "logs")
    assert list(tmp_path.iterdir()) == [tmp_path / "logs"]

    events = read_events(tmp_path / "logs")
    entropy = heads_over_time(events, "normalized_entropy")
    assert list(entropy) == [0, 10, 20]
    assert all(table.shape == (2, 4) and np.isfinite(table).all() for table in entropy.values())
    assert len(events.Scalars("train/loss")) == 24
    accuracies = [event.value for event in events.Scalars("held_out/accuracy")]
    assert len(accuracies) == 2
    assert f"accuracy {accuracies[-1]:.1%} on 359 held-out digits" in out
    assert "attention_maps/encoder.layers.1.self_attn/head0" in events.Tags()["images"]
    assert "encoder.layers.0.self_attn     3" in out


def test_one_batch(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    out = run("one_batch", tmp_path, "--steps", "10", "--logdir", "logs")
    assert [path.relative_to(tmp_path) for path in tmp_path.rglob("*.*")] == [Path("logs/head.png")]
    picture = (tmp_path / "logs" / "head.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", picture[16:24])
    assert width > height > 300
    assert "gradients left on the model: 0" in out
    assert re.search(r"^most important: layers\.[01] head [0-3]\.", out, re.MULTILINE)
    assert re.search(r"^head_importance|^layers\.0 +0 ", out, re.MULTILINE)
