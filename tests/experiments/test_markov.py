"""The sticky Markov task, its protocols, and the command that trains it."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from attnprobe.cli import main
from attnprobe.errors import ConfigurationError
from attnprobe.experiments.ensemble.arms import Arm
from attnprobe.experiments.ensemble.training import Course
from attnprobe.experiments.markov import tuning
from attnprobe.experiments.markov.run import Job, run, seeds_of
from attnprobe.experiments.markov.summary import comparison, summarize
from attnprobe.experiments.markov.task import (
    Sequence,
    entropy_rate,
    predictive,
    sequences,
    stationary,
    task,
    transitions,
)
from attnprobe.writers import read_jsonl

SMALL = ["--steps", "60", "--length", "64", "--jobs", "1"]


def test_the_chains_are_what_they_say() -> None:
    clean, authors, varied = (transitions(protocol) for protocol in ("clean", "authors", "varied"))
    assert clean.diagonal().tolist() == pytest.approx([0.3] * 8)
    assert authors.diagonal().tolist() == pytest.approx([0.3498] * 8, abs=5e-5)
    assert sorted(varied.diagonal().tolist()) == pytest.approx(np.linspace(0.05, 0.95, 8).tolist())
    for chain in (clean, authors, varied):
        assert chain.sum(-1).tolist() == pytest.approx([1.0] * 8)
        torch.testing.assert_close(stationary(chain) @ chain, stationary(chain))
    assert entropy_rate("clean") == pytest.approx(1.8833, abs=5e-5)
    assert entropy_rate("authors") == pytest.approx(1.8292, abs=5e-5)
    assert seeds_of("authors", 6) == (42, 2024, 1337, 7777, 9999, 0)
    assert seeds_of("clean", 3) == (0, 1, 2)


def test_the_sequences_follow_the_chain() -> None:
    """Transition frequencies within five standard errors, and x is the mean of the previous symbol plus unit noise."""
    (first, second) = sequences("clean", 20_000, seed=1)
    pairs = first.y[:-1] * 8 + first.y[1:]
    counts = pairs.bincount(minlength=64).view(8, 8).double()
    expected = transitions("clean")
    error = (expected * (1 - expected) / counts.sum(1, keepdim=True)).sqrt()
    assert ((counts / counts.sum(1, keepdim=True) - expected).abs() < 5 * error).all()
    assert torch.equal(first.z[1:], first.y[:-1])
    noise = first.x - first.means[first.z]
    assert float(noise.mean()) == pytest.approx(0, abs=0.01)
    assert float(noise.std()) == pytest.approx(1, abs=0.01)
    assert not first.x.equal(second.x)
    assert first.means.equal(second.means)


def test_the_best_prediction_is_bayes_rule() -> None:
    """Against the sum over all hidden paths of a short sequence."""
    whole = sequences("varied", 4, seed=3)[0]
    # Symbols close together, so that observations leave doubt.
    short = Sequence(0.3 * whole.x, whole.y, whole.z, 0.3 * whole.means)
    chain = transitions("varied")
    density = (-(torch.cdist(short.x.double(), short.means.double()) ** 2) / 2).exp()
    for t in range(4):
        total = torch.zeros(8, dtype=torch.float64)
        for path in itertools.product(range(8), repeat=t + 1):
            weight = math.prod(float(chain[a, b]) for a, b in itertools.pairwise(path))
            weight *= math.prod(float(density[i, z]) for i, z in enumerate(path))
            total += weight * chain[path[-1]]
        torch.testing.assert_close(predictive("varied", short)[t], total / total.sum(), atol=1e-10, rtol=1e-7)


def test_a_task_has_a_sequence_for_each_seed() -> None:
    made = task("clean", 30, (4, 9))
    training, held_out = sequences("clean", 30, 9)
    assert torch.equal(made.x[0, 1], training.x)
    assert torch.equal(made.held_y[0, 1], held_out.y)


def course(arm: str, losses: list[list[float]], held_out: list[list[float]]) -> Course:
    steps = len(losses)
    entropy = np.linspace(1, 0.9, steps)[:, None, None].repeat(2, 2)
    return Course(
        Arm.of(arm),
        np.array(losses),
        np.arange(len(held_out), dtype=float) * 2,
        np.array(held_out),
        np.arange(steps, dtype=float),
        {"normalized_entropy": entropy},
    )


SGD = course("sgd", [[2.0, 4.0], [1.8, 3.0], [1.5, 2.5], [1.0, 2.0]], [[2.0, 4.0], [1.5, 3.0]])
EM = course("v10", [[2.0, 4.0], [0.9, 1.9], [0.5, 1.0], [0.4, 0.5]], [[2.0, 4.0], [1.4, 3.5]])


def test_the_clean_protocol_compares_each_seed_with_itself() -> None:
    result = summarize([SGD, EM], Job(Arm("sgd"), "clean", (0, 1), 4, 8, Path()))
    assert result["thresholds"] == [1.0, 2.0]
    assert result["arms"]["v10"]["seeds"]["steps_to_sgd_loss"] == [1, 1]
    assert result["arms"]["v10"]["times_sooner"] == [4, 4, 4]
    assert result["arms"]["v10"]["seeds"]["steps_to_sgd_held_out"] == [2, None]
    assert result["arms"]["v10"]["seeds"]["best_held_out"] == [1.4, 3.5]
    assert result["arms"]["v10"]["seeds"]["entropy_at_sgd_loss"] == pytest.approx([1 - 0.1 / 3] * 2)
    json.dumps(result, allow_nan=False)


def test_the_authors_protocol_compares_with_the_mean_over_seeds() -> None:
    result = summarize([SGD, EM], Job(Arm("sgd"), "authors", (0, 1), 4, 8, Path()))
    assert result["thresholds"] == [1.5, 1.5]
    assert result["arms"]["v10"]["seeds"]["steps_to_sgd_loss"] == [1, 2]
    assert result["arms"]["sgd"]["seeds"]["steps_to_sgd_loss"] == [3, None]  # strictly below
    assert result["arms"]["v10"]["intervals"]["steps_to_sgd_loss"]["mean"] == 1.5
    assert result["arms"]["v10"]["times_sooner"][0] == pytest.approx(4 / 1.5)


def test_seeds_that_do_not_get_there_are_no_speed_up() -> None:
    late = course("o10", [[2.0, 4.0], [0.9, 3.9], [0.5, 3.0], [0.4, 2.5]], [[2.0, 4.0], [1.4, math.nan]])
    result = summarize([SGD, EM, late], Job(Arm("sgd"), "clean", (0, 1), 4, 8, Path()))
    assert result["arms"]["o10"]["seeds"]["steps_to_sgd_loss"] == [1, None]
    assert result["arms"]["o10"]["times_sooner"] == [None, None, None]
    text = "\n".join(comparison(result))
    (line,) = [line for line in text.splitlines() if line.startswith("SGD, W_O x10")]
    assert "1 (1 of 2)" in line
    assert "-" in line.split()
    assert not [line for line in text.splitlines() if "V x10, seed by seed" in line]
    slow = course("v10", [[2.0, 4.0], [1.9, 3.9], [0.5, 3.0], [0.4, 2.5]], [[2.0, 4.0], [1.4, 3.5]])
    text = "\n".join(comparison(summarize([SGD, slow], Job(Arm("sgd"), "clean", (0, 1), 4, 8, Path()))))
    assert "1 of 2" in text
    assert "reaches the same loss sooner" not in text


def test_arms_are_compared_seed_by_seed() -> None:
    """All seeds are a step later, however far the seeds are apart."""
    steps, seeds = 40, 4
    base = np.linspace(2, 1, steps)[:, None].repeat(seeds, 1)

    def reaching(arm: str, at: list[int]) -> Course:
        losses = base.copy() + 1
        for seed, step in enumerate(at):
            losses[step:, seed] = 0.5
        found = course(arm, losses.tolist(), [[1.0] * seeds])
        found.statistics["normalized_entropy"] = np.ones((steps, 1, seeds))
        return found

    courses = [reaching("sgd", []), reaching("v10", [5, 15, 25, 35]), reaching("qk10", [6, 16, 27, 36])]
    courses[0].losses = base
    result = summarize(courses, Job(Arm("sgd"), "clean", tuple(range(seeds)), steps, 8, Path()))
    later = result["arms"]["qk10"]["steps_after_v10"]
    assert later["mean"] == 1.25
    assert later["low"] > 0
    assert "Later than V x10, seed by seed: SGD, Q,K x10" in "\n".join(comparison(result))


def test_tuning_finds_the_rate_with_the_fewest_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every rate's whole training."""
    from attnprobe.experiments.ensemble.model import Ensemble
    from attnprobe.experiments.ensemble.training import train
    from attnprobe.experiments.markov.model import FORM

    monkeypatch.setattr(tuning, "SEEDS", (1, 2))
    monkeypatch.setattr(tuning, "GRID", (0.01, 0.1, 1.0, 100.0))
    data = task("clean", 60, (1, 2))
    thresholds = train(Ensemble(FORM, (1, 2)), data, Arm("sgd"), 40).losses[-1]
    needed = {}
    for rate in tuning.GRID:
        losses = train(Ensemble(FORM, (1, 2)), data, Arm("sgd", rate=rate), 40).losses
        below = [np.flatnonzero(losses[:, s] < thresholds[s]) for s in range(2)]
        needed[rate] = sum(int(steps[0]) if steps.size else 40 for steps in below)
    best = min(needed, key=needed.__getitem__)
    assert best not in (0.01, 100.0)
    assert tuning.tuned(Arm("tuned", tuned=True), "clean", steps=40, length=60).rate == best


@pytest.mark.parametrize("protocol", ["clean", "authors"])
def test_the_command(protocol: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert main(["markov", "--logdir", str(tmp_path), "--protocol", protocol, "--seeds", "2", *SMALL]) == 0
    out, err = capfd.readouterr()
    assert f"tensorboard --logdir {tmp_path / 'run-002'}" in out
    assert "Traceback" not in err
    for text in ("normalized_entropy", "Alarms:", "held-out", "What it does not show", "95% interval"):
        assert text in out
    assert ("As the authors' script prints it" in out) == (protocol == "authors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run-001", "run-002"]  # nothing overwritten

    for arm in ("sgd", "v10"):
        directory = tmp_path / "run-001" / arm
        lines = read_jsonl(directory)
        assert [line["step"] for line in lines] == [0, 10, 20, 30, 40]
        # The mean over seeds, which is what the alarms compare with ln 8.
        found = json.loads((tmp_path / "run-001" / "summary.json").read_text())["arms"][arm]["losses"]["mean"]
        assert [line["loss"] for line in lines] == pytest.approx(found[:5], rel=1e-5)
        assert all(json.dumps(line, allow_nan=False) for line in lines)
        assert len(list(directory.glob("events*"))) == 1
        events = EventAccumulator(str(directory), size_guidance={"tensors": 0, "scalars": 0}).Reload()
        assert len(events.Tensors("attnprobe/entropy")) == 5
        assert {"attention/entropy/min", "loss"} <= set(events.Tags()["scalars"])
    first, second = ((tmp_path / run / "summary.json").read_bytes() for run in ("run-001", "run-002"))
    assert first == second  # deterministic for a seed
    assert json.loads(first)["protocol"] == protocol
    assert (tmp_path / "run-001" / "summary.png").stat().st_size > 10_000


def test_more_arms(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SEEDS", (1, 2))
    assert (
        main(["markov", "--logdir", str(tmp_path), "--arms", "v10,qk10,all10,adam,tuned", "--seeds", "3", *SMALL]) == 0
    )
    out = capfd.readouterr().out
    for label in ("SGD, Q,K x10", "SGD, everything x10", "Adam", "SGD, rate"):
        assert label in out
    assert "seed by seed" in out
    saved = json.loads((tmp_path / "run-001" / "summary.json").read_text())
    assert list(saved["arms"]) == ["sgd", "v10", "qk10", "all10", "adam", "tuned"]
    assert saved["arms"]["adam"]["intervals"]["final_loss"]["of"] == 3


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_arm_that_diverges_is_reported_as_such(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["markov", "--logdir", str(tmp_path), "--arms", "all100000", "--seeds", "2", *SMALL]) == 0
    out = capfd.readouterr().out
    assert "nonfinite" in out
    found = json.loads((tmp_path / "run-001" / "summary.json").read_text())["arms"]["all100000"]
    assert found["intervals"]["final_loss"]["mean"] is None
    assert found["seeds"]["final_loss"] == [None, None]
    (line,) = [line for line in out.splitlines() if line.startswith("SGD, everything x100000")]
    assert "none of 2" in line


@pytest.mark.parametrize("sizes", [{"steps": 0}, {"seeds": 0}, {"length": 1}])
def test_sizes_that_cannot_work(sizes: dict[str, int], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="must be at least"):
        run(tmp_path, **{"steps": 1, "seeds": 1, "length": 2, "protocol": "clean", **sizes})
    assert not list(tmp_path.iterdir())
