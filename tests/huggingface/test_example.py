"""The example, run as a user would, at a small size in an empty directory; its event file is read back."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

EXAMPLE = Path(__file__).parents[2] / "examples" / "finetune_gpt2.py"
# What transformers says of GPT-2; anything else on standard error is a finding.
THIRD_PARTY = "[transformers] `loss_type=None` was set in the config but it is unrecognized."


def run(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, str(EXAMPLE), *options]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, encoding="utf-8", timeout=120)


def test_nothing_to_do_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE.parent))
    with pytest.raises(SystemExit) as exit_:
        __import__(EXAMPLE.stem).main(["--steps", "0"])
    assert exit_.value.code == 2
    assert "--steps must be at least 1" in capsys.readouterr().err


def test_finetune_gpt2(tmp_path: Path) -> None:
    done = run(tmp_path, "--steps", "12", "--batch-size", "4", "--logdir", "logs")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if line and not line.startswith(THIRD_PARTY)] == []
    assert list(tmp_path.iterdir()) == [tmp_path / "logs"]

    [path] = (tmp_path / "logs").rglob("events.*")
    events = EventAccumulator(str(path), {"tensors": 0, "scalars": 0, "images": 0}).Reload()
    entropy = {e.step: make_ndarray(e.tensor_proto) for e in events.Tensors("attnprobe/normalized_entropy")}
    assert list(entropy) == [1, 11]
    assert entropy[1].shape == (2, 4)
    assert (entropy[1] > 0.9).all(), "attention starts out diffuse"
    assert [event.step for event in events.Scalars("eval/loss")] == [4, 8, 12]
    assert "attention_maps/transformer.h.1.attn/head0" in events.Tags()["images"]

    layer, head = np.unravel_index((entropy[11] - entropy[1]).argmin(), (2, 4))
    assert f"sharpened most: transformer.h.{layer}.attn head {head}\n" in done.stdout
    row = f"{entropy[1][layer, head]:5.2f} -> {entropy[11][layer, head]:5.2f}  normalised entropy"
    assert row in done.stdout
    assert re.search(r"^transformer\.h\.1\.attn +3 .* -> ", done.stdout, re.MULTILINE)
    # Twelve steps are enough to learn which characters are frequent, and no more.
    held_out, unigram = (
        float(re.search(rf"([\d.]+)  {what}", done.stdout)[1]) for what in ("held-out text", "unigram entropy")
    )
    assert 4 < unigram < 5
    assert unigram - 1 < held_out < 7
    assert "tensorboard --logdir logs" in done.stdout
