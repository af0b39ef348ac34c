"""Every experiment on the paper: it runs, it writes what it says, and it does so again."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from attnprobe.errors import ConfigurationError, UnknownNameError
from attnprobe.experiments.paper.base import EXPERIMENTS, find, run

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of pictures of next to nothing


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment(name: str, tmp_path: Path) -> None:
    said = run(name, tmp_path, seeds=2, steps=12, jobs=1)
    directory = tmp_path / name / "run-001"
    result = json.loads((directory / "result.json").read_text())
    assert result["experiment"] == name
    assert result["seeds"] == [0, 1]
    assert find(name).CLAIM in said
    assert str(directory / "figure.png") in said
    assert (directory / "figure.png").stat().st_size > 20_000
    runs = {path.parent for path in directory.rglob("events*")}
    curves = 0
    for path in runs:
        events = EventAccumulator(str(path), size_guidance={"tensors": 0, "scalars": 0}).Reload()
        names = events.Tags()["scalars"]
        assert names
        if "loss/held_out" in names:
            steps = [event.step for event in events.Scalars("loss/held_out")]
            assert (steps[0], steps[-1]) == (0, 12)
            curves += 1
    assert curves >= 2


def test_the_numbers_depend_on_nothing_but_the_seeds(tmp_path: Path) -> None:
    for place, jobs in (("a", 1), ("b", 2)):
        run("compatibility", tmp_path / place, seeds=2, steps=12, jobs=jobs)
    first, second = ((tmp_path / place / "compatibility/run-001/result.json").read_bytes() for place in "ab")
    assert first == second


def test_what_cannot_be_run(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="compatibility"):
        run("compatability", tmp_path)
    with pytest.raises(ConfigurationError, match="steps must be at least 1"):
        run("compatibility", tmp_path, steps=-1)
    assert not list(tmp_path.iterdir())
